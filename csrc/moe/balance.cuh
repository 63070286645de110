// The sequence-wise balance loss with its gradient, and the bias rule of the loss-free balance (report eq. 16-20).
//
// With c[s, i] = alpha f[s, i] / (N T_s), a constant, the loss is the sum over tokens t and experts i of
// c[seq(t), i] s'[t, i]: one pass over the scores, and no P_i per sequence is ever summed.
//
//   clear   counts = 0
//   count   counts[s, i] += 1 for each choice, integer atomics; one more word counts sequences that have tokens
//   tokens  each token's part of the loss, and its gradient
//   total   the sum of the parts, one block
#pragma once

#include "choose.cuh"

namespace moe_kernels {

constexpr int kBlockThreads = 256;         // of the kernels that are one block

using ScoresPlace = Place<16, 8>;          // 512 experts at most; units of 8 are the groups of docs/numerics.md, "Sums"

struct BalanceParams {
  const float* scores;
  int64_t row_stride, column_stride;
  const int64_t* topk_idx;
  int64_t idx_strides[2];
  const int32_t* cu_seqlens;
  int64_t cu_stride, sequences, tokens;
  Spread spread;
  int32_t experts, top_k;
  bool biased;
  float alpha;
  uint32_t* counts;          // [sequences, experts], then the number of sequences that have tokens
  float *token_loss, *dscores;
};

// The last sequence that begins at or before the token; -1 before the first and past the last border. Borders that do
// not ascend give some sequence or none.
HOPPER_DEVICE int64_t sequence_of(const BalanceParams& p, int64_t token) {
  int64_t low = 0, high = p.sequences + 1;   // borders up to the token
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.cu_seqlens[middle * p.cu_stride] <= token) low = middle + 1;
    else high = middle;
  }
  return low > p.sequences ? -1 : low - 1;
}

template <bool kVector>
HOPPER_KERNEL_BLOCKS(kThreads, 6) balance_count_kernel(const BalanceParams p) {
  using hopper::Order, hopper::Reduce, hopper::Scope;
  const int64_t token = token_of_warp();
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  const ScoresPlace place(p.spread);

  hopper::grid_dependency_wait();
  if (token >= p.tokens) return;
  const int64_t sequence = sequence_of(p, token);
  if (sequence < 0) return;
  uint32_t* counts = p.counts + sequence * p.experts;
  if (lane == 0 && p.cu_seqlens[sequence * p.cu_stride] == token)
    hopper::reduce_add<Order::relaxed, Scope::gpu>(p.counts + p.sequences * p.experts, 1);
  if (p.biased) {
    for (int32_t slot = lane; slot < p.top_k; slot += 32) {
      const int64_t expert = p.topk_idx[token * p.idx_strides[0] + slot * p.idx_strides[1]];
      if (expert >= 0 && expert < p.experts) hopper::reduce_add<Order::relaxed, Scope::gpu>(counts + expert, 1);
    }
  } else {
    float score[ScoresPlace::kValues];
    uint32_t keys[ScoresPlace::kValues];
    place.load<kVector>(p.scores + token * p.row_stride, p.column_stride, score);
    HOPPER_UNROLL for (int v = 0; v < ScoresPlace::kValues; ++v) keys[v] = place.has(v) ? key_of(score[v]) : 0;
    for (int32_t slot = 0; slot < p.top_k; ++slot) {
      const int32_t expert = place.expert_of(take_largest(place, keys), p.experts);
      if (lane == 0) hopper::reduce_add<Order::relaxed, Scope::gpu>(counts + expert, 1);
    }
  }
  hopper::grid_dependency_launch();
}

// docs/numerics.md, "Sums", over a token's experts.
HOPPER_DEVICE float sum_of_scores(const float (&x)[ScoresPlace::kValues]) {
  double sum = 0;
  HOPPER_UNROLL for (int v = 0; v < ScoresPlace::kValues; v += 8)
    sum += sum_of_8({x[v], x[v + 1], x[v + 2], x[v + 3], x[v + 4], x[v + 5], x[v + 6], x[v + 7]});
  return static_cast<float>(warp_sum(sum));
}

template <bool kVector>
HOPPER_KERNEL_BLOCKS(kThreads, 6) balance_tokens_kernel(const BalanceParams p) {
  using hopper::mul_rn;
  constexpr int kValues = ScoresPlace::kValues;
  const int64_t token = token_of_warp();
  const ScoresPlace place(p.spread);

  hopper::grid_dependency_wait();
  if (token >= p.tokens) return;
  const int64_t sequence = sequence_of(p, token);
  float score[kValues], constant[kValues];
  float token_loss = 0.0f;
  if (sequence < 0) {        // padding: nothing of it counts, NaN neither
    HOPPER_UNROLL for (int v = 0; v < kValues; ++v) constant[v] = 0.0f;
  } else {
    place.load<kVector>(p.scores + token * p.row_stride, p.column_stride, score);
    const int32_t begin = p.cu_seqlens[sequence * p.cu_stride], end = p.cu_seqlens[(sequence + 1) * p.cu_stride];
    const auto length = static_cast<float>(int64_t{end} - begin);
    const auto nonempty = static_cast<float>(p.counts[p.sequences * p.experts]);
    const float factor = hopper::div_rn(mul_rn(static_cast<float>(p.experts), p.alpha),
                                        mul_rn(mul_rn(static_cast<float>(p.top_k), length), mul_rn(length, nonempty)));
    const uint32_t* counts = p.counts + sequence * p.experts;
    float term[kValues];
    HOPPER_UNROLL for (int v = 0; v < kValues; ++v) {
      constant[v] = place.has(v) ? mul_rn(static_cast<float>(counts[place.expert(v)]), factor) : 0.0f;
      term[v] = mul_rn(constant[v], score[v]);
    }
    const float total = hopper::add_rn(sum_of_scores(score), kEpsilon);
    token_loss = hopper::div_rn(sum_of_scores(term), total);
    const float inverse = hopper::div_rn(1.0f, total);
    HOPPER_UNROLL for (int v = 0; v < kValues; ++v)
      constant[v] = mul_rn(hopper::sub_rn(constant[v], token_loss), inverse);
  }
  hopper::grid_dependency_launch();
  place.store<kVector>(constant, p.dscores + token * p.experts);
  if (threadIdx.x % 32 == 0) p.token_loss[token] = token_loss;
}

// The sum of what the threads of a block bring, in every thread. `room` is the block's shared memory.
template <class T>
HOPPER_DEVICE T sum_of_block(T value, T* room) {
  HOPPER_UNROLL for (int bits = 16; bits > 0; bits /= 2) value += hopper::shuffle_xor(value, bits);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  hopper::block_sync();
  T total = room[0];
  for (uint32_t warp = 1; warp < kBlockThreads / 32; ++warp) total += room[warp];
  return total;
}

HOPPER_KERNEL(kBlockThreads) balance_total_kernel(const float* token_loss, int64_t tokens, float* loss) {
  hopper::grid_dependency_wait();
  double sum = 0;
  for (int64_t first = 8 * int64_t{threadIdx.x}; first < tokens; first += 8 * kBlockThreads) {
    float x[8];
    HOPPER_UNROLL for (int i = 0; i < 8; ++i) x[i] = first + i < tokens ? token_loss[first + i] : 0.0f;
    sum += sum_of_8(x);
  }
  hopper::grid_dependency_launch();
  const double total = sum_of_block(sum, reinterpret_cast<double*>(hopper::dynamic_smem()));
  if (threadIdx.x == 0) *loss = static_cast<float>(total);
}

// bias += speed sign(mean(counts) - counts), compared as counts times experts with their sum, in integers.
HOPPER_KERNEL(kBlockThreads) update_bias_kernel(float* bias, int64_t bias_stride, const int64_t* counts,
                                                int64_t counts_stride, int32_t experts, float speed) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  hopper::grid_dependency_wait();
  uint64_t sum = 0;
  for (int32_t e = thread; e < experts; e += kBlockThreads) sum += static_cast<uint64_t>(counts[e * counts_stride]);
  const uint64_t total = sum_of_block(sum, reinterpret_cast<uint64_t*>(hopper::dynamic_smem()));
  for (int32_t e = thread; e < experts; e += kBlockThreads) {
    const auto below = static_cast<int64_t>(total - static_cast<uint64_t>(counts[e * counts_stride]) * experts);
    const float sign = below > 0 ? 1.0f : below < 0 ? -1.0f : 0.0f;
    float& b = bias[e * bias_stride];
    b = hopper::add_rn(b, hopper::mul_rn(speed, sign));
  }
  hopper::grid_dependency_launch();
}

}  // namespace moe_kernels
