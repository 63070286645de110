// AdamW on a list of tensors: a block takes one chunk of one tensor, a thread two groups of four elements of it.
//
//   find the tensor | p, g, m, v: 8 loads a thread in flight | the next kernel may start | step | noise | store
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

// A moment as its type: a bf16 one by 16 random bits for each element, from bit `shift` of `noise` on, or to nearest.
template <class T>
HOPPER_DEVICE Group<T> rounded(const float (&values)[kGroup], bool stochastic, const uint32_t (&noise)[kGroup], int shift) {
  Group<T> group = Group<T>::of(values);
  if constexpr (sizeof(T) == 2) {
    if (stochastic) {
      HOPPER_UNROLL for (int i = 0; i < kGroup; i += 2)
        group.words[i / 2] = stochastic_bf16(values[i], noise[i] >> shift & 0xFFFF) |
                             stochastic_bf16(values[i + 1], noise[i + 1] >> shift & 0xFFFF) << 16;
    }
  }
  return group;
}

// What adamw reads of one group: every kernel with an AdamW step in it loads all of its groups, then updates each.
template <class Grad, class First, class Second>
struct AdamwGroup {
  Group<float> param;
  Group<Grad> grad;
  Group<First> exp_avg;
  Group<Second> exp_avg_sq;

  // `present` elements from `index` on; kVector: four, at multiples of a group's size.
  template <bool kVector>
  HOPPER_DEVICE void load(const AdamwEntry& e, int64_t index, int present) {
    param.template load<kVector>(e.param + index, present);
    grad.template load<kVector>(static_cast<const Grad*>(e.grad) + index, present);
    exp_avg.template load<kVector>(static_cast<First*>(e.exp_avg) + index, present);
    exp_avg_sq.template load<kVector>(static_cast<Second*>(e.exp_avg_sq) + index, present);
  }

  // The step; stores the results and leaves the new master in `param`.
  template <bool kVector>
  HOPPER_DEVICE void update(const AdamwStep& step, float grad_scale, const AdamwEntry& e, int64_t index, int present) {
    float x[kGroup], m[kGroup], v[kGroup];
    HOPPER_UNROLL for (int i = 0; i < kGroup; ++i) {
      x[i] = param.value(i);
      m[i] = exp_avg.value(i);
      v[i] = exp_avg_sq.value(i);
      adamw_element(x[i], grad.value(i), m[i], v[i], step, grad_scale, e);
    }
    uint32_t noise[kGroup] = {};
    if (step.stochastic_rounding) {
      const Noise source(step.noise_key, e.first_index + index);
      HOPPER_UNROLL for (int i = 0; i < kGroup; ++i) noise[i] = source.bits(i);
    }
    param = Group<float>::of(x);
    param.template store<kVector>(e.param + index, present);
    rounded<First>(m, step.stochastic_rounding, noise, 0)
        .template store<kVector>(static_cast<First*>(e.exp_avg) + index, present);
    rounded<Second>(v, step.stochastic_rounding, noise, 16)
        .template store<kVector>(static_cast<Second*>(e.exp_avg_sq) + index, present);
    if (e.out) Group<bf16>::of(x).template store<kVector>(e.out + index, present);
  }
};

// A bad gradient somewhere: the step is skipped.
HOPPER_DEVICE bool skips(float grad_scale) { return (hopper::float_bits(grad_scale) & 0x7FFFFFFF) >= 0x7F800000; }

// Whether every array lies at a multiple of its groups' size.
template <class Grad, class First, class Second>
TABLE_FUNCTION bool groups_aligned(const AdamwEntry& e) {
  const auto off = [](const void* array, size_t element) { return reinterpret_cast<uintptr_t>(array) % (kGroup * element); };
  return off(e.param, 4) + off(e.grad, sizeof(Grad)) + off(e.exp_avg, sizeof(First)) +
         off(e.exp_avg_sq, sizeof(Second)) + off(e.out, 2) == 0;
}

// The thread's groups of a chunk; the first of them begins at element `first`.
template <bool kVector, class Grad, class First, class Second>
HOPPER_DEVICE void adamw_chunk(const AdamwParams& p, const AdamwEntry& e, int64_t first) {
  constexpr int64_t kStride = kThreads * kGroup;   // from a thread's group to its next
  AdamwGroup<Grad, First, Second> groups[kGroups];
  int present[kGroups];
  HOPPER_UNROLL for (int k = 0; k < kGroups; ++k) {
    const int64_t index = first + k * kStride, left = e.count - index;
    present[k] = kVector || left >= kGroup ? kGroup : left < 0 ? 0 : static_cast<int>(left);
    groups[k].template load<kVector>(e, index, present[k]);
  }
  const float grad_scale = p.grad_scale ? *p.grad_scale : p.step.grad_scale;
  hopper::grid_dependency_launch();
  if (skips(grad_scale)) return;
  HOPPER_UNROLL for (int k = 0; k < kGroups; ++k) {
    groups[k].template update<kVector>(p.step, grad_scale, e, first + k * kStride, present[k]);
  }
}

// 4 blocks of 24 KB in flight on an SM (bf16 moments, fp32 gradients).
template <class Grad, class First, class Second>
HOPPER_KERNEL_BLOCKS(kThreads, 4) adamw_kernel(HOPPER_GRID_CONSTANT const AdamwParams p) {
  const auto place = p.table.find(blockIdx.x);
  const AdamwEntry& e = p.table.entries[place.entry];
  const bool aligned = groups_aligned<Grad, First, Second>(e);
  const int64_t begin = int64_t{place.chunk} * kAdamwChunk, first = begin + threadIdx.x * kGroup;

  hopper::grid_dependency_wait();
  if (aligned && begin + kAdamwChunk <= e.count) adamw_chunk<true, Grad, First, Second>(p, e, first);
  else adamw_chunk<false, Grad, First, Second>(p, e, first);
}

}  // namespace optimizer_kernels
