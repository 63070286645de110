// Host side of unpack_e5m6.
#include "unpack_e5m6.cuh"

#include "checks.h"

namespace quantize {

using namespace quantize_kernels;

static_assert(6 * (kUnpackThreads / 32 * sizeof(UnpackTile) + 1024) <= 227 << 10, "6 blocks fit on an SM");

void unpack_e5m6(const UnpackArguments& a, hopper::Stream stream) {
  require(a.rows >= 0 && a.columns >= 0, "packed", "must not have a negative size", a.rows < 0 ? a.rows : a.columns);
  require(a.out_type != Type::e4m3 && a.out_type != Type::fp64, "dtype", "must be bf16 or fp32", "another type");
  if (a.rows == 0 || a.columns == 0) return;
  require(a.packed != nullptr && is_aligned(a.packed, 4), "packed", "must start at a multiple of 4 bytes", a.packed);
  require(a.scale != nullptr, "scale", "must not be null unless it is empty", "a null pointer");
  check_output("out", a.out, static_cast<uintptr_t>(size_of(a.out_type)));
  UnpackParams p{};
  p.packed = static_cast<const uint8_t*>(a.packed);
  p.stride = packed_bytes(a.columns);
  p.scale = a.scale;
  p.scale_tile_stride = a.scale_tile_stride;
  p.scale_row_stride = a.scale_row_stride;
  p.rows = a.rows;
  p.columns = a.columns;
  p.column_tiles = static_cast<uint32_t>(ceil_div(a.columns, kTile));
  p.out = a.out;
  const uint32_t blocks = checked_tiles("packed", ceil_div(a.rows, kUnpackRows), p.column_tiles);
  const auto config = launch_config("unpack_e5m6", blocks, kUnpackThreads, a.programmatic, stream,
                                    kUnpackThreads / 32 * sizeof(UnpackTile));
  const bool vector = is_aligned(a.packed, 16) && p.stride % 16 == 0 && is_aligned(a.out, 16);   // 32 columns divide
  if (a.out_type == Type::bf16) {
    vector ? hopper::launch(config, unpack_e5m6_kernel<bf16, true>, p) : hopper::launch(config, unpack_e5m6_kernel<bf16, false>, p);
  } else {
    vector ? hopper::launch(config, unpack_e5m6_kernel<float, true>, p) : hopper::launch(config, unpack_e5m6_kernel<float, false>, p);
  }
}

}  // namespace quantize
