// Host side of swiglu_backward.
#include "swiglu_backward.cuh"

#include "checks.h"

namespace activation {
namespace {

using namespace activation_kernels;

constexpr size_t kSharedOfSm = 228 << 10, kReserved = 1 << 10, kRoom = kBackwardThreads / 32 * kRows * sizeof(double);
static_assert(4 * (backward_patches<bf16> + kRoom + kReserved) <= kSharedOfSm && backward_patches<bf16> >= 48 << 10);
static_assert(2 * (backward_patches<float> + kRoom + kReserved) <= kSharedOfSm);

template <class T>
void run(hopper::LaunchConfig config, const SwigluBackwardParams& p, bool vector) {
  config.smem_bytes += backward_patches<T> / kBackwardThreads * config.block.x;
  vector ? hopper::launch(config, swiglu_backward_kernel<T, true>, p)
         : hopper::launch(config, swiglu_backward_kernel<T, false>, p);
}

}  // namespace

void swiglu_backward(const SwigluBackwardArguments& a, hopper::Stream stream) {
  const Matrix& x = a.gate_up;
  check_gate_up(x);
  require(x.type != Type::e4m3, "gate_up", "must be bf16 or fp32", "e4m3");
  check_dy(a.dy, x);
  require(a.dy.type == x.type, "dy", "must have gate_up's type", "another one");
  check_weight(a.weight);
  require((a.weight.data == nullptr) == (a.dweight == nullptr) || x.rows == 0, "dweight",
          "must be null exactly when weight is", a.dweight);
  if (x.rows == 0 || (x.columns == 0 && !a.dweight)) return;
  const int64_t bytes = x.rows * x.columns * quantize::size_of(x.type);
  if (x.columns > 0) {
    quantize::check_output("dgate_up", a.dgate_up, quantize::size_of(x.type));
    for (const Matrix* m : {&x, &a.dy}) quantize::check_apart("dgate_up", a.dgate_up, bytes, *m);
  }

  SwigluBackwardParams p{};
  p.dy = {a.dy.data, a.dy.row_stride, a.dy.column_stride};
  p.gate_up = {x.data, x.row_stride, x.column_stride};
  p.rows = x.rows;
  p.inner = x.columns / 2;
  p.tiles = static_cast<uint32_t>(ceil_div(p.inner, kTile));
  p.weight = {a.weight.data, a.weight.stride};
  p.dgate_up = a.dgate_up;
  p.dweight = a.dweight;
  const int64_t most = kBackwardThreads / 32, wanted = ceil_div(p.tiles, 4);
  p.warps = static_cast<uint32_t>(wanted < 1 ? 1 : wanted < most ? wanted : most);
  p.teams = static_cast<uint32_t>(most) / p.warps;
  p.passes = static_cast<uint32_t>(ceil_div(p.tiles, 4 * int64_t{p.warps}));
  const uint32_t blocks = quantize::checked_tiles("gate_up", ceil_div(x.rows, int64_t{p.teams} * kRows), 1);
  const uint32_t warps = p.warps * p.teams;
  const auto config = launch_config("swiglu_backward", blocks, 32 * warps, a.programmatic, stream,
                                    warps * kRows * sizeof(double));
  const bool vector = vectorised(x) && quantize::vectorised(a.dy, a.dgate_up);
  x.type == Type::bf16 ? run<bf16>(config, p, vector) : run<float>(config, p, vector);
}

}  // namespace activation
