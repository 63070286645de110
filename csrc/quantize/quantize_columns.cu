// Host side of quantize_128x1: with and without rows, grouped or not, from bf16, fp32 or e4m3 with scales.
#include "quantize_columns.cuh"

#include "checks.h"

namespace quantize {
namespace {

using namespace quantize_kernels;

constexpr int64_t kMaxGroups = (int64_t{1} << 31) - 256;

static_assert(sizeof(ColumnShared) <= 48 << 10, "more shared memory needs an opt-in and lowers the blocks per SM");

template <class T, bool kWithRows>
void run(const hopper::LaunchConfig& config, const ColumnParams& params, bool vector) {
  vector ? hopper::launch(config, quantize_columns_kernel<T, kWithRows, true>, params)
         : hopper::launch(config, quantize_columns_kernel<T, kWithRows, false>, params);
}

void check(const ColumnsArguments& a) {
  const Matrix& x = a.x;
  check_input("x", x);
  const bool grouped = a.offsets != nullptr;
  require(a.padded_rows >= 0 && a.padded_rows % kTile == 0, "padded_rows", "must be a multiple of 128", a.padded_rows);
  require(grouped || a.padded_rows == round_up(x.rows, kTile), "padded_rows",
          "must be the rows of x padded to 128 when there are no groups", a.padded_rows);
  require(a.groups >= 0 && a.groups <= kMaxGroups, "groups", "must be in 0..2^31-256", a.groups);
  require(!grouped || a.padded_offsets != nullptr, "padded_offsets", "must not be null when there are offsets",
          "a null pointer");
  require((a.q == nullptr) == (a.scale == nullptr), "scale", "must be null exactly when q is", a.scale);
  require(a.q == nullptr || !is_coded(x.type), "q", "must be null for e4m3 and e5m6 input, which has its rows already", a.q);
  if (x.rows == 0 || x.columns == 0) return;
  require(is_coded(x.type) == (a.x_scale != nullptr), "x_scale", "must be given exactly when x is e4m3 or e5m6",
          a.x_scale);
  require(!is_coded(x.type) || a.x_scale_stride >= x.rows || x.columns <= kTile, "x_scale_stride",
          "must be at least the rows of x", a.x_scale_stride);
  require(x.type != Type::e5m6 || (is_aligned(x.data, 4) && x.row_stride % 4 == 0), "x",
          "must have packed rows at multiples of 4 bytes", x.data);
  if (a.padded_rows > 0) {
    check_output("q_t", a.q_t, 16);
    check_output("scale_t", a.scale_t, sizeof(float));
    const Matrix bytes = x.type == Type::e5m6 ? Matrix{x.data, x.type, x.rows, packed_bytes(x.columns), x.row_stride, 1} : x;
    check_apart("q_t", a.q_t, a.padded_rows * x.columns, bytes);
  }
  if (a.q != nullptr) {
    check_output("q", a.q, 1);
    check_output("scale", a.scale, sizeof(float));
    check_apart("q", a.q, x.rows * x.columns, x);
  }
}

}  // namespace

void quantize_128x1(const ColumnsArguments& a, hopper::Stream stream) {
  check(a);
  const Matrix& x = a.x;
  const bool grouped = a.offsets != nullptr, with_rows = a.q != nullptr;
  bool programmatic = a.programmatic;
  if (grouped) {
    const auto config = launch_config("pad_offsets", 1, 32, programmatic, stream);
    hopper::launch(config, pad_offsets_kernel, a.offsets, a.padded_offsets, static_cast<int32_t>(a.groups));
    programmatic = true;
  }
  if (x.rows == 0 || x.columns == 0) return;

  ColumnParams p{};
  p.x = {x.data, x.row_stride, x.column_stride};
  p.x_scale = a.x_scale;
  p.x_scale_stride = a.x_scale_stride;
  p.tokens = x.rows;
  p.channels = x.columns;
  p.column_tiles = static_cast<uint32_t>(ceil_div(x.columns, kTile));
  p.groups = {a.offsets, a.padded_offsets, static_cast<int32_t>(a.groups)};
  p.rows = {static_cast<uint8_t*>(a.q), x.columns, a.scale, round_up(x.rows, 4)};
  p.columns = {static_cast<uint8_t*>(a.q_t), a.padded_rows / kTile, a.scale_t, round_up(x.columns, 4)};
  p.rule.pow2 = a.pow2;

  // Rows of no group are quantised by tiles that are padding of q_t. The smallest padded_rows leaves floor(rest / 128)
  // of those, and two runs of rows, before and behind the groups, need at most two more. Without groups all are rest.
  int64_t row_tiles = p.columns.token_tiles;
  if (grouped && with_rows) row_tiles += 2 + (a.groups == 0 ? x.rows / kTile : 0);
  if (row_tiles == 0) return;
  const uint32_t blocks = checked_tiles("x", row_tiles, p.column_tiles);
  const auto config = launch_config("quantize_128x1", blocks, kThreads, programmatic, stream, sizeof(ColumnShared));
  const bool vector = vectorised(x, a.q);
  if (x.type == Type::e4m3) {
    run<e4m3, false>(config, p, vector);
  } else if (x.type == Type::e5m6) {
    run<e5m6, false>(config, p, is_aligned(x.data, 8) && x.row_stride % 8 == 0 && x.columns % 16 == 0);
  } else if (x.type == Type::bf16) {
    with_rows ? run<bf16, true>(config, p, vector) : run<bf16, false>(config, p, vector);
  } else {
    with_rows ? run<float, true>(config, p, vector) : run<float, false>(config, p, vector);
  }
}

}  // namespace quantize
