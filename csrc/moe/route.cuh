// The router, one warp a token, and its gradient.
#pragma once

#include "choose.cuh"

namespace moe_kernels {

struct RouteParams {
  const float* logits;
  int64_t row_stride, column_stride;
  const float* bias;
  int64_t bias_stride, tokens;
  Spread spread;
  int32_t experts, top_k, top_groups;    // top_groups 0: every group is open
  float scale;
  bool normalize;
  int64_t* topk_idx;
  float *topk_weight, *scores;
  uint64_t* counts;
};

template <int kValues, bool kVector>
HOPPER_KERNEL_BLOCKS(kThreads, kValues <= 8 ? 8 : (kValues == 16 ? 6 : 4) - !kVector) route_kernel(const RouteParams p) {
  const int64_t token = token_of_warp();
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);
  const Place<kValues, 4> place(p.spread);

  hopper::grid_dependency_wait();
  if (token >= p.tokens) return;
  float score[kValues], bias[kValues];
  place.template load<kVector>(p.logits + token * p.row_stride, p.column_stride, score);
  place.template load<kVector>(p.bias, p.bias_stride, bias);
  hopper::grid_dependency_launch();

  uint32_t keys[kValues];
  HOPPER_UNROLL for (int v = 0; v < kValues; ++v) {
    score[v] = sigmoid(score[v]);
    keys[v] = place.has(v) ? key_of(hopper::add_rn(score[v], bias[v])) : 0;
  }
  float* scores = p.scores + token * p.experts;
  place.template store<kVector>(score, scores);
  if (p.top_groups > 0) keep_best_groups(place, p.top_groups, keys);

  uint32_t tag = 0;          // of the slot with this lane's number
  for (int32_t slot = 0; slot < p.top_k; ++slot) {
    const uint32_t taken = take_largest(place, keys);
    tag = lane == slot ? taken : tag;
  }
  const int32_t expert = place.expert_of(tag, p.spread.size);
  // Its score is read back: to find it among the registers of another lane would cost every slot a third more.
  hopper::syncwarp();
  float weight = lane < p.top_k ? scores[expert] : 0.0f;
  if (p.normalize) weight = hopper::div_rn(weight, hopper::add_rn(sum_of_lanes(weight), kEpsilon));
  if (lane >= p.top_k) return;
  p.topk_idx[token * p.top_k + lane] = expert;
  p.topk_weight[token * p.top_k + lane] = hopper::mul_rn(weight, p.scale);
  hopper::reduce<hopper::Reduce::add, hopper::Order::relaxed, hopper::Scope::gpu>(p.counts + expert, uint64_t{1});
}

struct RouteBackwardParams {
  const float *dweight, *dscores, *scores;
  const int64_t* topk_idx;
  int64_t dweight_strides[2], dscores_strides[2], scores_strides[2], idx_strides[2];
  int64_t tokens;
  int32_t experts, top_k;
  float scale;
  bool normalize;
  float* dlogits;
};

HOPPER_DEVICE float sigmoid_backward(float grad, float s) {
  return hopper::mul_rn(hopper::mul_rn(grad, hopper::sub_rn(1.0f, s)), s);
}

// A lane for each slot finds what its expert's score gets from the weights. Then all lanes write the row as if nobody
// had been chosen, and the slots' lanes write their experts again.
template <bool kVector>
HOPPER_KERNEL_BLOCKS(kThreads, 8) route_backward_kernel(const RouteBackwardParams p) {
  const int64_t token = token_of_warp();
  const auto lane = static_cast<int32_t>(threadIdx.x % 32);

  hopper::grid_dependency_wait();
  if (token >= p.tokens) return;
  const float* scores = p.scores + token * p.scores_strides[0];
  const float* dscores = p.dscores + token * p.dscores_strides[0];
  float* dlogits = p.dlogits + token * p.experts;
  // Lanes without a slot, and slots without an expert, read what is there and count as zeros: no branch.
  const int32_t slot = lane < p.top_k ? lane : 0;
  const int64_t expert = p.topk_idx[token * p.idx_strides[0] + slot * p.idx_strides[1]];
  const bool chosen = lane < p.top_k && expert >= 0 && expert < p.experts;
  const int64_t at = chosen ? expert : 0;
  const float direct = dscores[at * p.dscores_strides[1]];
  float score = scores[at * p.scores_strides[1]];
  score = chosen ? score : 0.0f;
  float grad = hopper::mul_rn(p.dweight[token * p.dweight_strides[0] + slot * p.dweight_strides[1]], p.scale);
  grad = chosen ? grad : 0.0f;
  if (p.normalize) {
    const float total = hopper::add_rn(sum_of_lanes(score), kEpsilon);
    const float share = hopper::div_rn(score, total);
    grad = hopper::div_rn(hopper::sub_rn(grad, sum_of_lanes(hopper::mul_rn(grad, share))), total);
  }

  if constexpr (kVector) {
    for (int32_t e = 4 * lane; e < p.experts; e += 128) {
      const auto s = hopper::load_vector<float4>(scores + e), d = hopper::load_vector<float4>(dscores + e);
      hopper::store_vector(dlogits + e, float4{sigmoid_backward(d.x, s.x), sigmoid_backward(d.y, s.y),
                                               sigmoid_backward(d.z, s.z), sigmoid_backward(d.w, s.w)});
    }
  } else {
    for (int32_t e = lane; e < p.experts; e += 32)
      dlogits[e] = sigmoid_backward(dscores[e * p.dscores_strides[1]], scores[e * p.scores_strides[1]]);
  }
  hopper::grid_dependency_launch();
  hopper::syncwarp();   // the same addresses again, from other lanes
  if (chosen) dlogits[expert] = sigmoid_backward(hopper::add_rn(direct, grad), score);
}

}  // namespace moe_kernels
