// Host side of rms_norm: alone, after a residual addition, and with 1 x 128 quantisation behind it.
#include "rms_norm.cuh"

#include "checks.h"

namespace norms {
namespace {

using namespace norm_kernels;

constexpr size_t kMaxShared = 227 << 10;
constexpr uint32_t kMaxKept = 64;   // patches of a thread; shared memory is full long before
static_assert(OwnPatches<bf16>::bytes(3, 512) + 512 / 32 * kRows * sizeof(double) <= kMaxShared, "18432 columns, read once");

void check(const RmsNormArguments& a) {
  const Matrix& x = a.x;
  quantize::check_input("x", x);
  require(x.type != Type::e4m3, "x", "must be bf16 or fp32", "e4m3");
  check_columns(x);
  check_weight(a.weight, x.columns);
  require(a.eps >= 0, "eps", "must not be negative", a.eps);
  require((a.q == nullptr) == (a.scale == nullptr), "scale", "must be null exactly when q is", a.scale);
  if (x.rows == 0) return;
  const int64_t bytes = quantize::size_of(x.type), size = x.rows * x.columns;
  if (a.residual.data) {
    check_like("residual", a.residual, x);
    quantize::check_output("new_residual", a.new_residual, bytes);
    quantize::check_apart("new_residual", a.new_residual, size * bytes, x);
    quantize::check_apart("new_residual", a.new_residual, size * bytes, a.residual);
  }
  quantize::check_output("rstd", a.rstd, sizeof(float));
  if (a.q != nullptr) {
    quantize::check_output("scale", a.scale, sizeof(float));
    quantize::check_apart("q", a.q, size, x);
  } else {
    quantize::check_output("y", a.y, bytes);
    quantize::check_apart("y", a.y, size * bytes, x);
  }
}

template <class T, bool kHeld>
void run(const hopper::LaunchConfig& config, const NormParams& p, bool residual, bool quantized) {
  if (residual) {
    quantized ? hopper::launch(config, rms_norm_kernel<T, kHeld, true, true>, p)
              : hopper::launch(config, rms_norm_kernel<T, kHeld, true, false>, p);
  } else {
    quantized ? hopper::launch(config, rms_norm_kernel<T, kHeld, false, true>, p)
              : hopper::launch(config, rms_norm_kernel<T, kHeld, false, false>, p);
  }
}

}  // namespace

void rms_norm(const RmsNormArguments& a, hopper::Stream stream) {
  check(a);
  const Matrix& x = a.x;
  if (x.rows == 0) return;
  const bool residual = a.residual.data != nullptr, quantized = a.q != nullptr;

  NormParams p{};
  p.x = {x.data, x.row_stride, x.column_stride};
  p.residual = {a.residual.data, a.residual.row_stride, a.residual.column_stride};
  p.rows = x.rows;
  p.columns = x.columns;
  p.tiles = static_cast<uint32_t>(ceil_div(x.columns, kTile));
  p.weight = {a.weight.data, a.weight.stride, a.weight.type == Type::bf16};
  p.width = static_cast<float>(x.columns);
  p.eps = static_cast<float>(a.eps);
  p.y = a.y;
  p.new_residual = a.new_residual;
  p.rstd = a.rstd;
  p.out = {static_cast<uint8_t*>(a.q), x.columns, a.scale, round_up(x.rows, 4)};
  p.rule.pow2 = a.pow2;
  p.vector = quantize::vectorised(x, quantized ? a.q : a.y) && vectorised(a.weight) &&
             (!residual || quantize::vectorised(a.residual, a.new_residual));

  const bool is_bf16 = x.type == Type::bf16, held = p.vector && p.tiles <= kHeldTiles;
  const int64_t most = (held ? norm_threads<bf16, true> : is_bf16 ? norm_threads<bf16, false> : norm_threads<float, false>) / 32;
  const int64_t wanted = ceil_div(p.tiles, 4);
  p.warps = static_cast<uint32_t>(wanted < most ? wanted : most);
  p.passes = static_cast<uint32_t>(ceil_div(p.tiles, 4 * int64_t{p.warps}));
  p.teams = p.warps < 4 ? 4 / p.warps : 1;   // narrow rows: some 128 threads a block
  const uint32_t warps = p.warps * p.teams;
  const size_t room = warps * kRows * sizeof(double);
  size_t kept = 0;
  if (!held && p.passes <= kMaxKept) {
    kept = is_bf16 ? OwnPatches<bf16>::bytes(p.passes, 32 * warps) : OwnPatches<float>::bytes(p.passes, 32 * warps);
    if (room + kept > kMaxShared) kept = 0;
  }
  p.keep = kept > 0;
  const uint32_t blocks = quantize::checked_tiles("x", ceil_div(x.rows, int64_t{p.teams} * kRows), 1);
  const auto config = launch_config(quantized ? "rms_norm_quantize" : "rms_norm", blocks, 32 * warps, a.programmatic, stream,
                                    room + kept);
  if (is_bf16) {
    held ? run<bf16, true>(config, p, residual, quantized) : run<bf16, false>(config, p, residual, quantized);
  } else {
    held ? run<float, true>(config, p, residual, quantized) : run<float, false>(config, p, residual, quantized);
  }
}

}  // namespace norms
