// Host side of dequantize_1x128, dequantize_128x128 and dequantize_128x1.
#include "dequantize.cuh"

#include "checks.h"

namespace quantize {
namespace {

using namespace quantize_kernels;

static_assert(4 * (sizeof(DequantizeShared) + 1024) <= 227 << 10, "4 blocks fit on an SM");

// False where there is nothing to do.
bool check(const DequantizeArguments& a) {
  require(a.batch >= 0 && a.rows >= 0 && a.columns >= 0, "q", "must not have a negative size", a.rows);
  require(!is_coded(a.out_type), "dtype", "must be bf16, fp32 or fp64", "a coded type");
  if (a.batch == 0 || a.rows == 0 || a.columns == 0) return false;
  require(a.q != nullptr, "q", "must not be null unless it is empty", "a null pointer");
  require(a.scale != nullptr, "scale", "must not be null unless it is empty", "a null pointer");
  check_output("out", a.out, static_cast<uintptr_t>(size_of(a.out_type)));
  return true;
}

DequantizeParams params_of(const DequantizeArguments& a) {
  DequantizeParams p{};
  p.q = static_cast<const uint8_t*>(a.q);
  p.scale = a.scale;
  p.rows = a.rows;
  p.columns = a.columns;
  p.column_tiles = static_cast<uint32_t>(ceil_div(a.columns, kTile));
  p.out = a.out;
  return p;
}

bool vectorised(const DequantizeArguments& a) { return is_aligned(a.q, 16) && is_aligned(a.out, 16) && a.columns % 16 == 0; }

void run_rows(const DequantizeArguments& a, DequantizeParams& p, const char* name, hopper::Stream stream) {
  const auto with = [&](auto out) {
    using Out = decltype(out);
    const int64_t row_blocks = ceil_div(a.rows, rows_of_block<Out>);
    require(row_blocks <= kMaxTiles / a.batch, "q", "must have fewer than 2^31 tiles, one block each", a.rows);
    p.row_blocks = static_cast<uint32_t>(row_blocks);
    const uint32_t blocks = checked_tiles("q", a.batch * row_blocks, p.column_tiles);
    const auto config = launch_config(name, blocks, kDequantizeThreads, a.programmatic, stream);
    vectorised(a) ? hopper::launch(config, dequantize_rows_kernel<Out, true>, p) : hopper::launch(config, dequantize_rows_kernel<Out, false>, p);
  };
  a.out_type == Type::bf16 ? with(bf16{}) : a.out_type == Type::fp32 ? with(float{}) : with(double{});
}

}  // namespace

void dequantize_1x128(const DequantizeArguments& a, hopper::Stream stream) {
  if (!check(a)) return;
  DequantizeParams p = params_of(a);
  p.s1 = 1;
  p.s2 = a.scale_stride;
  run_rows(a, p, "dequantize_1x128", stream);
}

void dequantize_128x128(const DequantizeArguments& a, hopper::Stream stream) {
  if (!check(a)) return;
  DequantizeParams p = params_of(a);
  p.s2 = 1;
  p.s1 = p.column_tiles;
  p.s0 = ceil_div(a.rows, kTile) * p.s1;
  p.row_shift = 7;
  run_rows(a, p, "dequantize_128x128", stream);
}

void dequantize_128x1(const DequantizeArguments& a, int64_t padded_rows, hopper::Stream stream) {
  require(padded_rows % kTile == 0 && padded_rows >= a.rows, "q_t", "must have a multiple of 128 columns that holds all tokens", padded_rows);
  if (!check(a)) return;
  DequantizeParams p = params_of(a);
  p.q_stride = padded_rows;
  p.s1 = a.scale_stride;
  const uint32_t blocks = checked_tiles("q_t", ceil_div(a.rows, kTile), p.column_tiles);
  const auto config = launch_config("dequantize_128x1", blocks, kThreads, a.programmatic, stream, sizeof(DequantizeShared));
  const auto with = [&](auto out) {
    using Out = decltype(out);
    vectorised(a) ? hopper::launch(config, dequantize_columns_kernel<Out, true>, p) : hopper::launch(config, dequantize_columns_kernel<Out, false>, p);
  };
  a.out_type == Type::bf16 ? with(bf16{}) : a.out_type == Type::fp32 ? with(float{}) : with(double{});
}

}  // namespace quantize
