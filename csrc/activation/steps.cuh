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

// 16 bytes of T as fp32, and back, rounded.
template <class T>
struct Piece {
  static constexpr int kSize = 16 / sizeof(T);
  float v[kSize];

  HOPPER_DEVICE explicit Piece(uint4 bits) {
    const uint32_t w[4] = {bits.x, bits.y, bits.z, bits.w};
    HOPPER_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        v[i] = hopper::bits_float(w[i]);
      } else {
        const float2 pair = hopper::bf16x2_to_float2(w[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
      }
    }
  }
  HOPPER_DEVICE uint4 bits() const {
    uint32_t w[4];
    HOPPER_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) w[i] = hopper::float_bits(v[i]);
      else w[i] = hopper::pack_bf16(v[2 * i], v[2 * i + 1]);
    }
    return {w[0], w[1], w[2], w[3]};
  }
  // Of 8 neighbours; halves of fp32 lie in lanes 2 m and 2 m + 1, of which the first counts them.
  HOPPER_DEVICE double sum([[maybe_unused]] int lane) const {
    if constexpr (sizeof(T) == 2) {
      return sum_of_8(v);
    } else {
      const float four = add_rn(add_rn(v[0], v[1]), add_rn(v[2], v[3]));
      const float eight = add_rn(four, hopper::shuffle_xor(four, 1));
      return lane % 2 == 0 ? eight : 0.0;
    }
  }
};

// Patches of gate, up and dy that a thread keeps in shared memory become dgate, dup and the activation, each rounded to T.
// Piece by piece, in a loop: three patches in registers are too many. my_weight: lane l's, of row l % 4 of the patch.
// Returns, in lane l, the sum over 8 lanes of row l % 4's terms of dweight.
template <class T>
HOPPER_DEVICE double replace_by_gradients(uint4* gate_slot, uint4* up_slot, uint4* dy_slot, float my_weight, int lane) {
  double mine = 0;
  for (int r = 0; r < kRows; ++r) {
    const float weight = hopper::shuffle(my_weight, (threadIdx.x & 24) + r);
    double row = 0;
    for (int i = 0; i < Patch<T>::kPieces; ++i, gate_slot += 32, up_slot += 32, dy_slot += 32) {
      Piece<T> gate(*gate_slot), up(*up_slot), dy(*dy_slot), terms(dy);
      HOPPER_UNROLL
      for (int c = 0; c < Piece<T>::kSize; ++c) {
        const SwigluGradient g = swiglu_gradient(dy.v[c], gate.v[c], up.v[c], weight);
        gate.v[c] = g.dgate, up.v[c] = g.dup, dy.v[c] = g.activation, terms.v[c] = g.term;
      }
      *gate_slot = gate.bits();
      *up_slot = up.bits();
      *dy_slot = dy.bits();
      row += terms.sum(lane);
    }
    HOPPER_UNROLL
    for (int bits = 1; bits < 8; bits *= 2) row += hopper::shuffle_xor(row, bits);
    if (lane % kRows == r) mine = row;
  }
  return mine;
}

// The patch of `up` that belongs to a patch of `gate`.
HOPPER_DEVICE Window shifted(const Window& window, int64_t columns) {
  return {window.row, window.column + columns, window.rows, window.columns};
}

}  // namespace activation_kernels
