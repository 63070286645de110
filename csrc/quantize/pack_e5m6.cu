// Host side of pack_e5m6.
#include "pack_e5m6.cuh"

#include "checks.h"

namespace quantize {
namespace {

using namespace quantize_kernels;

// What the kernels' bounds of blocks ask of an SM's 227 KB, a KB each of which is the system's.
static_assert(8 * (kPackThreads / 32 * sizeof(PackedRows) + 1024) <= 227 << 10);
static_assert(5 * (sizeof(RowPackShared) + 1024) <= 227 << 10);

template <class T, bool kVector>
void run(hopper::LaunchConfig config, const PackParams& params, bool whole_rows) {
  if (whole_rows) hopper::launch(config, pack_e5m6_rows_kernel<T, kVector>, params);
  else hopper::launch(config, pack_e5m6_tiles_kernel<T, kVector>, params);
}

}  // namespace

void pack_e5m6(const PackArguments& a, hopper::Stream stream) {
  const Matrix& x = a.x;
  check_input("x", x);
  require(x.type == Type::bf16 || x.type == Type::fp32, "x", "must be bf16 or fp32", "another type");
  if (x.rows == 0 || (x.columns == 0 && !a.whole_rows)) return;
  check_output("scale", a.scale, sizeof(float));
  PackParams p{};
  p.x = {x.data, x.row_stride, x.column_stride};
  p.rows = x.rows;
  p.columns = x.columns;
  p.column_tiles = static_cast<uint32_t>(ceil_div(x.columns, kTile));
  p.packed = static_cast<uint8_t*>(a.packed);
  p.stride = packed_bytes(x.columns);
  p.scale = a.scale;
  p.scale_stride = round_up(x.rows, 4);
  if (x.columns > 0) {
    check_output("packed", a.packed, 4);
    check_apart("packed", a.packed, x.rows * p.stride, x);
  }
  hopper::LaunchConfig config{};
  if (a.whole_rows) {
    require(x.rows <= kMaxTiles, "x", "must have fewer than 2^31 rows, one block each", x.rows);
    config = launch_config("pack_e5m6 rows", static_cast<uint32_t>(x.rows), kRowPackThreads, a.programmatic, stream,
                           sizeof(RowPackShared));
  } else {
    const uint32_t blocks = checked_tiles("x", ceil_div(x.rows, kPackRows), p.column_tiles);
    config = launch_config("pack_e5m6 tiles", blocks, kPackThreads, a.programmatic, stream,
                           kPackThreads / 32 * sizeof(PackedRows));
  }
  const bool vector = vectorised(x, a.packed) && p.stride % 16 == 0;
  if (x.type == Type::bf16) vector ? run<bf16, true>(config, p, a.whole_rows) : run<bf16, false>(config, p, a.whole_rows);
  else vector ? run<float, true>(config, p, a.whole_rows) : run<float, false>(config, p, a.whole_rows);
}

}  // namespace quantize
