// Host side of swiglu, with and without 1 x 128 quantisation.
#include "swiglu.cuh"

#include "checks.h"

namespace activation {
namespace {

using namespace activation_kernels;

template <class T>
void run(const hopper::LaunchConfig& config, const SwigluParams& p, bool quantized, bool vector) {
  if (quantized) {
    vector ? hopper::launch(config, swiglu_kernel<T, true, true>, p) : hopper::launch(config, swiglu_kernel<T, true, false>, p);
  } else {
    vector ? hopper::launch(config, swiglu_kernel<T, false, true>, p)
           : hopper::launch(config, swiglu_kernel<T, false, false>, p);
  }
}

}  // namespace

void swiglu(const SwigluArguments& a, hopper::Stream stream) {
  const Matrix& x = a.gate_up;
  check_gate_up(x);
  require(x.type != Type::e4m3, "gate_up", "must be bf16 or fp32", "e4m3");
  check_weight(a.weight);
  require((a.q == nullptr) == (a.scale == nullptr) || x.rows == 0 || x.columns == 0, "scale",
          "must be null exactly when q is", a.scale);
  if (x.rows == 0 || x.columns == 0) return;
  const int64_t inner = x.columns / 2;
  const bool quantized = a.q != nullptr;
  if (quantized) {
    quantize::check_output("scale", a.scale, sizeof(float));
    quantize::check_apart("q", a.q, x.rows * inner, x);
  } else {
    quantize::check_output("y", a.y, quantize::size_of(x.type));
    quantize::check_apart("y", a.y, x.rows * inner * quantize::size_of(x.type), x);
  }

  SwigluParams p{};
  p.gate_up = {x.data, x.row_stride, x.column_stride};
  p.rows = x.rows;
  p.inner = inner;
  p.column_tiles = static_cast<uint32_t>(ceil_div(inner, kTile));
  p.weight = {a.weight.data, a.weight.stride};
  p.y = a.y;
  p.out = {static_cast<uint8_t*>(a.q), inner, a.scale, round_up(x.rows, 4)};
  p.rule.pow2 = a.pow2;
  const uint32_t blocks = quantize::checked_tiles("gate_up", ceil_div(x.rows, kRowsOfBlock), p.column_tiles);
  const auto config = launch_config(quantized ? "swiglu_quantize" : "swiglu", blocks, kSwigluThreads, a.programmatic, stream);
  const bool vector = vectorised(x) && is_aligned(quantized ? a.q : a.y, 16);
  x.type == Type::bf16 ? run<bf16>(config, p, quantized, vector) : run<float>(config, p, quantized, vector);
}

}  // namespace activation
