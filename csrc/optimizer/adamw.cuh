// AdamW on a list of tensors: a block takes one chunk of one tensor, a thread two groups of four elements of it.
//
//   find the tensor | load p, g, m, v: 8 loads a thread in flight | next kernel may start | step | noise | store
//
// The arithmetic is the reference's, operation by operation (reference/optimizer.py), each rounded once.
#pragma once

#include "groups.cuh"
#include "tensor_table.h"

namespace optimizer_kernels {

constexpr int kThreads = 256;
constexpr int kGroups = 2;                                  // of a thread; groups of one number are neighbours in memory
constexpr int kAdamwChunk = kThreads * kGroups * kGroup;    // elements

struct AdamwEntry {
  float* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  bf16* out;                     // or null
  int64_t count;                 // elements
  int64_t first_index;           // of the noise
  float decay;                   // lr * weight_decay
  bool decays;                   // a decay of 0 is not added, as 0 * inf would matter
  bool wide_grad, wide_exp_avg, wide_exp_avg_sq;   // fp32, not bf16
};
static_assert(sizeof(AdamwEntry) == 64);

struct AdamwStep {
  float grad_scale;
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float denominator_scale;       // 1 / sqrt(1 - beta2^step)
  float eps;
  float step_size;               // lr / (1 - beta1^step)
  uint32_t noise_key;            // of seed and step
  bool stochastic_rounding;
};

struct AdamwParams {
  TensorTable<AdamwEntry, 58> table;
  AdamwStep step;
  const float* grad_scale;       // on the device, or null
};
static_assert(sizeof(AdamwParams) <= kParameterBytes);

// ---- noise: the reference's random_bits ----------------------------------------------------------------------------

constexpr uint32_t kWeyl = 0x9E3779B9;

TABLE_FUNCTION uint32_t mix(uint32_t h) {   // the 32-bit finaliser of MurmurHash3
  h = (h ^ h >> 16) * 0x85EBCA6B;
  h = (h ^ h >> 13) * 0xC2B2AE35;
  return h ^ h >> 16;
}
TABLE_FUNCTION uint32_t next_key(uint32_t key, uint32_t word) { return mix((key ^ word) * kWeyl); }

// The keys of a run of elements, which may cross a multiple of 2^32 once.
struct Noise {
  uint32_t low, key, key_behind;

  TABLE_FUNCTION Noise(uint32_t noise_key, int64_t index)
      : low(static_cast<uint32_t>(index)),
        key(next_key(noise_key, static_cast<uint32_t>(index >> 32))),
        key_behind(next_key(noise_key, static_cast<uint32_t>((index >> 32) + 1))) {}

  // 16 random bits for the first moment in the low half, 16 for the second in the high half.
  TABLE_FUNCTION uint32_t bits(uint32_t i) const {
    const uint32_t at = low + i;
    return mix(at * kWeyl + (at < low ? key_behind : key));
  }
};

// fp32 to bf16 by adding 16 random bits below those that stay. Inf and NaN stay what they are.
HOPPER_DEVICE uint32_t stochastic_bf16(float x, uint32_t noise) {
  const uint32_t bits = hopper::float_bits(x);
  if ((bits & 0x7FFFFFFF) >= 0x7F800000) return hopper::to_bf16(x).bits;
  return (bits + noise) >> 16;
}

// ---- one element, one group, one block -----------------------------------------------------------------------------

HOPPER_DEVICE void adamw_element(float& p, float g, float& m, float& v, const AdamwStep& s, float grad_scale,
                                 const AdamwEntry& entry) {
  using namespace hopper;
  g = mul_rn(g, grad_scale);
  m = add_rn(mul_rn(m, s.beta1), mul_rn(g, s.one_minus_beta1));
  v = add_rn(mul_rn(v, s.beta2), mul_rn(mul_rn(g, g), s.one_minus_beta2));
  const float denominator = add_rn(mul_rn(sqrt_rn(v), s.denominator_scale), s.eps);
  float update = mul_rn(div_rn(m, denominator), s.step_size);
  if (entry.decays) update = add_rn(update, mul_rn(p, entry.decay));   // not multiplied into p: one rounding of p
  p = sub_rn(p, update);
}

// Stores a moment as its type; `noise` holds 16 random bits for each element, from bit `shift` on.
HOPPER_DEVICE void store_moment(void* array, bool wide, int64_t index, const float (&values)[kGroup], bool stochastic,
                                const uint32_t (&noise)[kGroup], int shift, int present, bool vector) {
  if (wide) {
    store_fp32(static_cast<float*>(array) + index, values, present, vector);
    return;
  }
  uint32_t words[kGroup / 2];
  HOPPER_UNROLL for (int i = 0; i < kGroup / 2; ++i) {
    const float low = values[2 * i], high = values[2 * i + 1];
    words[i] = stochastic ? stochastic_bf16(low, noise[2 * i] >> shift & 0xFFFF) |
                                stochastic_bf16(high, noise[2 * i + 1] >> shift & 0xFFFF) << 16
                          : hopper::pack_bf16(low, high);
  }
  store_bf16(static_cast<bf16*>(array) + index, words, present, vector);
}

HOPPER_DEVICE bool aligned_groups(const AdamwEntry& e) {
  const auto off = [](const void* p, bool wide) { return reinterpret_cast<uintptr_t>(p) & (wide ? 15 : 7); };
  return (off(e.param, true) | off(e.grad, e.wide_grad) | off(e.exp_avg, e.wide_exp_avg) |
          off(e.exp_avg_sq, e.wide_exp_avg_sq) | off(e.out, false)) == 0;
}

// 4 blocks of 24 KB in flight on an SM (bf16 moments, fp32 gradients).
HOPPER_KERNEL_BLOCKS(kThreads, 4) adamw_kernel(HOPPER_GRID_CONSTANT const AdamwParams p) {
  const auto place = p.table.find(blockIdx.x);
  const AdamwEntry& e = p.table.entries[place.entry];
  const int64_t first = int64_t{place.chunk} * kAdamwChunk + threadIdx.x * kGroup;
  const bool aligned = aligned_groups(e);

  hopper::grid_dependency_wait();
  RawGroup param[kGroups], grad[kGroups], exp_avg[kGroups], exp_avg_sq[kGroups];
  int present[kGroups];
  HOPPER_UNROLL for (int k = 0; k < kGroups; ++k) {
    const int64_t index = first + k * kThreads * kGroup;
    present[k] = static_cast<int>(e.count - index < kGroup ? (e.count - index < 0 ? 0 : e.count - index) : kGroup);
    const bool vector = aligned && present[k] == kGroup;
    param[k] = load_group(e.param, true, index, present[k], vector);
    grad[k] = load_group(e.grad, e.wide_grad, index, present[k], vector);
    exp_avg[k] = load_group(e.exp_avg, e.wide_exp_avg, index, present[k], vector);
    exp_avg_sq[k] = load_group(e.exp_avg_sq, e.wide_exp_avg_sq, index, present[k], vector);
  }
  const float grad_scale = p.grad_scale ? *p.grad_scale : p.step.grad_scale;
  hopper::grid_dependency_launch();
  if ((hopper::float_bits(grad_scale) & 0x7FFFFFFF) >= 0x7F800000) return;   // a bad gradient somewhere: skip the step

  HOPPER_UNROLL for (int k = 0; k < kGroups; ++k) {
    if (present[k] == 0) continue;
    const int64_t index = first + k * kThreads * kGroup;
    const bool vector = aligned && present[k] == kGroup;
    float x[kGroup], m[kGroup], v[kGroup];
    HOPPER_UNROLL for (int i = 0; i < kGroup; ++i) {
      x[i] = param[k].value(i, true);
      m[i] = exp_avg[k].value(i, e.wide_exp_avg);
      v[i] = exp_avg_sq[k].value(i, e.wide_exp_avg_sq);
      adamw_element(x[i], grad[k].value(i, e.wide_grad), m[i], v[i], p.step, grad_scale, e);
    }
    uint32_t noise[kGroup] = {};
    if (p.step.stochastic_rounding) {
      const Noise source(p.step.noise_key, e.first_index + index);
      HOPPER_UNROLL for (int i = 0; i < kGroup; ++i) noise[i] = source.bits(i);
    }
    store_fp32(e.param + index, x, present[k], vector);
    store_moment(e.exp_avg, e.wide_exp_avg, index, m, p.step.stochastic_rounding, noise, 0, present[k], vector);
    store_moment(e.exp_avg_sq, e.wide_exp_avg_sq, index, v, p.step.stochastic_rounding, noise, 16, present[k], vector);
    if (e.out) store_bf16(e.out + index, {hopper::pack_bf16(x[0], x[1]), hopper::pack_bf16(x[2], x[3])}, present[k], vector);
  }
}

}  // namespace optimizer_kernels
