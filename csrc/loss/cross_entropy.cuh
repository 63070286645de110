// The memory-bound halves of a fused linear cross entropy: what happens to a chunk of logits between two products.
// A block takes one row of a chunk: [tokens, classes of the chunk], fp32, rows padded to 8 elements.
#pragma once

#include "../common/sums.h"
#include "../hopper/front.h"

namespace loss_kernels {

using hopper::bf16;

constexpr int kThreads = 256, kWarps = kThreads / 32, kGroup = 8;
constexpr int64_t kIgnored = -100;

// What a row carries from chunk to chunk: the largest logit, the sum of e^(z - largest), the label's logit.
struct RowState {
  float* largest;
  double* sum;
  float* at_label;
};

struct Chunk {
  const float* logits;
  int64_t stride;                // elements between rows, a multiple of 8
  int32_t classes, first_class;
  const int64_t* labels;
  int64_t labels_stride;
};

struct Shared {
  float largest[kWarps];
  double sum[kWarps];
};

// Eight neighbouring logits, -inf past the end: e^-inf is the zero that fills up a sum.
HOPPER_DEVICE void load_group(float (&v)[kGroup], const float* row, int32_t first, int32_t classes) {
  if (first + kGroup <= classes) {
    HOPPER_UNROLL for (int half = 0; half < 2; ++half) {
      const float4 x = hopper::load_vector<float4>(row + first + 4 * half);
      v[4 * half] = x.x, v[4 * half + 1] = x.y, v[4 * half + 2] = x.z, v[4 * half + 3] = x.w;
    }
  } else {
    HOPPER_UNROLL for (int i = 0; i < kGroup; ++i)
      v[i] = first + i < classes ? row[first + i] : hopper::bits_float(0xff800000);
  }
}

HOPPER_DEVICE float larger(float x, float y) { return y > x ? y : x; }

// In every thread. A NaN never wins; it comes back through the sum.
HOPPER_DEVICE float block_largest(Shared& shared, float value) {
  HOPPER_UNROLL for (int bits = 16; bits > 0; bits /= 2) value = larger(value, hopper::shuffle_xor(value, bits));
  if (threadIdx.x % 32 == 0) shared.largest[threadIdx.x / 32] = value;
  hopper::block_sync();
  HOPPER_UNROLL for (int warp = 0; warp < kWarps; ++warp) value = larger(value, shared.largest[warp]);
  return value;
}

// In thread 0.
HOPPER_DEVICE double block_sum(Shared& shared, double value) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) shared.sum[threadIdx.x / 32] = value;
  hopper::block_sync();
  double total = 0;
  if (threadIdx.x == 0) {
    HOPPER_UNROLL for (int warp = 0; warp < kWarps; ++warp) total += shared.sum[warp];
  }
  return total;
}

struct ScanParams {
  Chunk chunk;
  RowState state;
  bool first;
  float* loss;   // of the last chunk: where the loss of each token goes; null before
};

// Takes a chunk into the rows' state; the second reading of the row comes from the caches.
HOPPER_KERNEL(kThreads) cross_entropy_scan_kernel(const ScanParams p) {
  auto& shared = *reinterpret_cast<Shared*>(hopper::dynamic_smem());
  hopper::grid_dependency_wait();
  const int64_t token = blockIdx.x;
  const float* row = p.chunk.logits + token * p.chunk.stride;
  const int64_t label = p.chunk.labels[token * p.chunk.labels_stride];
  if (label == kIgnored) {
    if (p.loss && threadIdx.x == 0) p.loss[token] = 0;
    return;
  }
  const float none = hopper::bits_float(0xff800000), before = p.first ? none : p.state.largest[token];
  float v[kGroup], largest = before;
  for (int32_t i = threadIdx.x * kGroup; i < p.chunk.classes; i += kThreads * kGroup) {
    load_group(v, row, i, p.chunk.classes);
    HOPPER_UNROLL for (float x : v) largest = larger(largest, x);
  }
  largest = block_largest(shared, largest);
  double sum = 0;
  for (int32_t i = threadIdx.x * kGroup; i < p.chunk.classes; i += kThreads * kGroup) {
    load_group(v, row, i, p.chunk.classes);
    HOPPER_UNROLL for (float& x : v) x = hopper::exp_approximate(hopper::sub_rn(x, largest));
    sum += sum_of_8(v);
  }
  hopper::grid_dependency_launch();
  sum = block_sum(shared, sum);
  if (threadIdx.x != 0) return;
  if (!p.first) sum += p.state.sum[token] * hopper::exp_approximate(hopper::sub_rn(before, largest));
  // A label that is no class at all is never met: its loss is NaN.
  const int64_t inside = label - p.chunk.first_class;
  float at_label = p.first ? hopper::bits_float(0x7fffffff) : p.state.at_label[token];
  if (inside >= 0 && inside < p.chunk.classes) at_label = row[inside];
  p.state.largest[token] = largest;
  p.state.sum[token] = sum;
  p.state.at_label[token] = at_label;
  if (p.loss) {
    const float rest = hopper::log_approximate(static_cast<float>(sum));
    p.loss[token] = hopper::add_rn(hopper::sub_rn(largest, at_label), rest);
  }
}

struct GradientParams {
  Chunk chunk;
  RowState state;
  const float* dloss;            // null: 1
  int64_t dloss_stride;
  bf16* dlogits;                 // rows as those of the logits
};

// (softmax - 1 at the label) dloss, in bf16; zeros for ignored tokens and in the padding.
HOPPER_KERNEL(kThreads) cross_entropy_gradient_kernel(const GradientParams p) {
  hopper::grid_dependency_wait();
  const int64_t token = blockIdx.x;
  const float* row = p.chunk.logits + token * p.chunk.stride;
  bf16* out = p.dlogits + token * p.chunk.stride;
  const int64_t label = p.chunk.labels[token * p.chunk.labels_stride];
  const bool counts = label != kIgnored;
  const float largest = counts ? p.state.largest[token] : 0;
  const float scale = counts ? hopper::reciprocal_approximate(static_cast<float>(p.state.sum[token])) : 0;
  const float dloss = p.dloss ? p.dloss[token * p.dloss_stride] : 1;
  const int64_t inside = label - p.chunk.first_class;
  for (int32_t i = threadIdx.x * kGroup; i < p.chunk.classes; i += kThreads * kGroup) {
    float v[kGroup];
    uint32_t words[kGroup / 2] = {};
    if (counts) {
      load_group(v, row, i, p.chunk.classes);
      HOPPER_UNROLL for (int j = 0; j < kGroup; ++j) {
        v[j] = hopper::mul_rn(hopper::exp_approximate(hopper::sub_rn(v[j], largest)), scale);
        if (i + j == inside) v[j] = hopper::sub_rn(v[j], 1.0f);
        v[j] = hopper::mul_rn(v[j], dloss);
      }
      HOPPER_UNROLL for (int j = 0; j < kGroup / 2; ++j) words[j] = hopper::pack_bf16(v[2 * j], v[2 * j + 1]);
    }
    hopper::store_vector(out + i, uint4{words[0], words[1], words[2], words[3]});
  }
  hopper::grid_dependency_launch();
}

struct SumParams {
  const float* values;
  int64_t count;
  float* total;
};

// One block: the loss of a batch is a few thousand numbers.
HOPPER_KERNEL(kThreads) loss_sum_kernel(const SumParams p) {
  auto& shared = *reinterpret_cast<Shared*>(hopper::dynamic_smem());
  hopper::grid_dependency_wait();
  double sum = 0;
  for (int64_t i = int64_t{threadIdx.x} * kGroup; i < p.count; i += kThreads * kGroup) {
    float v[kGroup];
    HOPPER_UNROLL for (int j = 0; j < kGroup; ++j) v[j] = i + j < p.count ? p.values[i + j] : 0.0f;
    sum += sum_of_8(v);
  }
  hopper::grid_dependency_launch();
  sum = block_sum(shared, sum);
  if (threadIdx.x == 0) *p.total = static_cast<float>(sum);
}

struct RoundParams {
  const float* from;
  bf16* to;
  int64_t count;                 // both start at multiples of 16 bytes
};

// fp32 sums of dh to bf16.
HOPPER_KERNEL(kThreads) round_to_bf16_kernel(const RoundParams p) {
  hopper::grid_dependency_wait();
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kGroup;
  if (i + kGroup <= p.count) {
    uint32_t words[kGroup / 2];
    HOPPER_UNROLL for (int half = 0; half < 2; ++half) {
      const float4 x = hopper::load_vector<float4>(p.from + i + 4 * half);
      words[2 * half] = hopper::pack_bf16(x.x, x.y);
      words[2 * half + 1] = hopper::pack_bf16(x.z, x.w);
    }
    hopper::store_vector(p.to + i, uint4{words[0], words[1], words[2], words[3]});
  } else {
    for (int64_t j = i; j < p.count; ++j) p.to[j] = hopper::to_bf16(p.from[j]);
  }
  hopper::grid_dependency_launch();
}

}  // namespace loss_kernels
