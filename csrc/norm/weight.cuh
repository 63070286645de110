// The weight of the norm's columns, as a thread needs it for its patch.
#pragma once

#include "../quantize/patch.cuh"

namespace norm_kernels {

using namespace quantize_kernels;

struct WeightRow {
  const void* data;
  int64_t stride;
  bool bf16;                     // else fp32
};

// fp32 values of one piece of a thread's columns, of which `left` (or more) exist; zeros past them.
template <int kPiece, bool kVector>
HOPPER_DEVICE void load_weight(const WeightRow& weight, int64_t first, int left, float (&w)[kPiece]) {
  HOPPER_UNROLL
  for (float& value : w) value = 0.0f;
  if constexpr (kVector) {
    if (left <= 0) return;
    HOPPER_UNROLL
    for (int i = 0; i < kPiece; i += 4) {
      if (weight.bf16) {
        const uint2 words = hopper::load_vector<uint2>(static_cast<const hopper::bf16*>(weight.data) + first + i);
        const float2 low = hopper::bf16x2_to_float2(words.x), high = hopper::bf16x2_to_float2(words.y);
        w[i] = low.x, w[i + 1] = low.y, w[i + 2] = high.x, w[i + 3] = high.y;
      } else {
        const float4 four = hopper::load_vector<float4>(static_cast<const float*>(weight.data) + first + i);
        w[i] = four.x, w[i + 1] = four.y, w[i + 2] = four.z, w[i + 3] = four.w;
      }
    }
  } else {
    HOPPER_UNROLL
    for (int i = 0; i < kPiece; ++i) {
      if (i >= left) continue;
      const int64_t at = (first + i) * weight.stride;
      w[i] = weight.bf16 ? hopper::to_float(static_cast<const hopper::bf16*>(weight.data)[at])
                         : static_cast<const float*>(weight.data)[at];
    }
  }
}

}  // namespace norm_kernels
