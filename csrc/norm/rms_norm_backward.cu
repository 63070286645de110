// Host side of rms_norm_backward: the gradients by rows with column sums for each block, then the sum over blocks.
#include "rms_norm_backward.cuh"

#include "checks.h"

namespace norms {
namespace {

using namespace norm_kernels;

constexpr size_t kMaxShared = 227 << 10;
static_assert(backward_bytes(448) + backward_sums(448) <= kMaxShared, "hidden size 7168");
static_assert(backward_bytes(kBackwardThreads) <= kMaxShared, "then the sums lie in the workspace");

void check(const RmsNormBackwardArguments& a) {
  const Matrix& x = a.x;
  quantize::check_input("x", x);
  require(x.type != Type::e4m3, "x", "must be bf16 or fp32", "e4m3");
  check_columns(x);
  check_like("dy", a.dy, x);
  check_weight(a.weight, x.columns);
  if (x.columns == 0) return;
  quantize::check_output("dweight", a.dweight, quantize::size_of(a.weight.type));
  require(a.parts >= 0 && a.parts <= quantize::kMaxTiles, "parts", "must be in 0..2^31-1", a.parts);
  if (x.rows == 0) return;
  require(a.parts >= 1, "parts", "must be positive", a.parts);
  quantize::check_output("workspace", a.workspace, sizeof(double));
  require(a.rstd != nullptr, "rstd", "must not be null", "a null pointer");
  const int64_t bytes = quantize::size_of(x.type);
  quantize::check_output("dx", a.dx, bytes);
  for (const Matrix* m : {&a.dy, &x}) quantize::check_apart("dx", a.dx, x.rows * x.columns * bytes, *m);
  if (a.dresidual.data) {
    check_like("dresidual", a.dresidual, x);
    quantize::check_apart("dx", a.dx, x.rows * x.columns * bytes, a.dresidual);
  }
}

}  // namespace

void rms_norm_backward(const RmsNormBackwardArguments& a, hopper::Stream stream) {
  check(a);
  const Matrix& x = a.x;
  if (x.columns == 0) return;
  const int64_t pairs = ceil_div(x.rows, kHalves * kRows), parts = pairs < a.parts ? pairs : a.parts;
  const bool bf16_x = x.type == Type::bf16;
  bool programmatic = a.programmatic;

  NormBackwardParams p{};
  p.dy = {a.dy.data, a.dy.row_stride, a.dy.column_stride};
  p.x = {x.data, x.row_stride, x.column_stride};
  p.dresidual = {a.dresidual.data, a.dresidual.row_stride, a.dresidual.column_stride};
  p.rows = x.rows;
  p.columns = x.columns;
  p.tiles = static_cast<uint32_t>(ceil_div(x.columns, kTile));
  p.weight = {a.weight.data, a.weight.stride, a.weight.type == Type::bf16};
  p.width = static_cast<float>(x.columns);
  p.rstd = a.rstd;
  p.dx = a.dx;
  p.workspace = a.workspace;
  p.workspace_stride = round_up(x.columns, 512);

  const int threads = static_cast<int>(ceil_div(p.tiles, 4)) * 32;
  const bool fast = bf16_x && p.tiles <= kBackwardTiles && quantize::vectorised(x, a.dx) &&
                    quantize::vectorised(a.dy, a.dx) && vectorised(a.weight) &&
                    (!a.dresidual.data || quantize::vectorised(a.dresidual, a.dx));
  if (x.rows > 0) {
    const size_t base = backward_bytes(threads);
    p.sums_in_shared = base + backward_sums(threads) <= kMaxShared;
    const size_t smem = !fast ? backward_room(kAnyThreads) : base + (p.sums_in_shared ? backward_sums(threads) : 0);
    const auto config = launch_config("rms_norm_backward", static_cast<uint32_t>(parts), fast ? threads : kAnyThreads,
                                      programmatic, stream, smem);
    fast     ? hopper::launch(config, rms_norm_backward_kernel, p)
    : bf16_x ? hopper::launch(config, rms_norm_backward_any_kernel<bf16>, p)
             : hopper::launch(config, rms_norm_backward_any_kernel<float>, p);
    programmatic = true;
  }

  WeightSumParams s{};
  s.workspace = a.workspace;
  s.parts = parts;
  s.stride = p.workspace_stride;
  s.columns = x.columns;
  s.by_patches = fast;
  s.dweight = a.dweight;
  s.bf16 = a.weight.type == Type::bf16;
  const auto config = launch_config("sum_weight_gradient", static_cast<uint32_t>(s.stride / 32), 32 * kSumLanes,
                                    programmatic, stream, 32 * kSumLanes * sizeof(double));
  hopper::launch(config, sum_weight_gradient_kernel, s);
}

}  // namespace norms
