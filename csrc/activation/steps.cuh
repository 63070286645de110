// SwiGLU and its gradient, step by step (docs/numerics.md), and the weights of a patch's rows.
#pragma once

#include "../common/sums.h"
#include "../quantize/row_sums.cuh"

namespace activation_kernels {

using namespace quantize_kernels;
using hopper::add_rn;
using hopper::mul_rn;
using hopper::sub_rn;

HOPPER_DEVICE float swiglu_of(float gate, float up, float weight) {
  return mul_rn(mul_rn(mul_rn(gate, sigmoid(gate)), up), weight);
}

struct SwigluGradient {
  float dgate, dup;
  float term;                    // of the weight's gradient
  float activation;              // swiglu_of
};

HOPPER_DEVICE SwigluGradient swiglu_gradient(float dy, float gate, float up, float weight) {
  const float s = sigmoid(gate), silu = mul_rn(gate, s), product = mul_rn(dy, up);
  const float slope = mul_rn(s, add_rn(1.0f, mul_rn(gate, sub_rn(1.0f, s))));   // of silu
  return {mul_rn(mul_rn(product, weight), slope), mul_rn(mul_rn(silu, weight), dy), mul_rn(product, silu),
          mul_rn(mul_rn(silu, up), weight)};
}

struct Weights {
  const float* data;             // null: ones
  int64_t stride;
};

// Lane l gets that of row l % 4 of its patch.
HOPPER_DEVICE float load_weight(const Weights& weights, const Window& window, Place at) {
  const int row = at.group * kRows + at.lane % kRows;
  const bool exists = weights.data != nullptr && row < window.rows;
  return exists ? weights.data[(window.row + row) * weights.stride] : 1.0f;
}

// The patch of `up` that belongs to a patch of `gate`.
HOPPER_DEVICE Window shifted(const Window& window, int64_t columns) {
  return {window.row, window.column + columns, window.rows, window.columns};
}

}  // namespace activation_kernels
