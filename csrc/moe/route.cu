// Host side of the router.
#include "route.cuh"

#include "checks.h"

namespace moe {
namespace {

using namespace moe_kernels;

template <int kValues>
void run(const hopper::LaunchConfig& config, const RouteParams& params, bool vector) {
  vector ? hopper::launch(config, route_kernel<kValues, true>, params)
         : hopper::launch(config, route_kernel<kValues, false>, params);
}

// The lanes of a group, and how many values each of them holds.
Spread spread_of(int64_t groups, int64_t experts) {
  int32_t bits = 5;
  while ((32 >> bits) < groups) --bits;
  return {static_cast<int32_t>(groups), static_cast<int32_t>(experts / groups), bits};
}

}  // namespace

void route(const RouteArguments& a, hopper::Stream stream) {
  check_range("logits", a.experts, 1, kMaxExperts);
  check_range("top_k", a.top_k, 1, a.experts < kMaxTopK ? a.experts : kMaxTopK);
  check_range("num_groups", a.num_groups, 1, a.experts);
  require(a.experts % a.num_groups == 0, "num_groups", "must divide the number of experts", a.num_groups);
  check_range("top_groups", a.top_groups, 1, a.num_groups);
  require(a.top_k <= a.top_groups * (a.experts / a.num_groups), "top_k", "must not exceed the experts of top_groups groups",
          a.top_k);
  const bool grouped = a.top_groups < a.num_groups;
  if (grouped) check_range("num_groups", a.num_groups, 1, kMaxGroups);
  require(a.tokens >= 0, "logits", "must not have a negative number of rows", a.tokens);
  check_table("logits", a.logits, a.tokens, a.experts, sizeof(float));
  check_table("bias", Table<const float>{a.bias, 0, a.bias_stride}, 1, a.experts, sizeof(float));
  check_output("topk_idx", a.topk_idx, a.tokens * a.top_k, sizeof(int64_t));
  check_output("topk_weight", a.topk_weight, a.tokens * a.top_k, sizeof(float));
  check_output("scores", a.scores, a.tokens * a.experts, sizeof(float));
  check_output("counts", a.counts, a.experts, sizeof(int64_t));

  RouteParams p{};
  p.logits = a.logits.data;
  p.row_stride = a.logits.row_stride;
  p.column_stride = a.logits.column_stride;
  p.bias = a.bias;
  p.bias_stride = a.bias_stride;
  p.tokens = a.tokens;
  p.spread = spread_of(grouped ? a.num_groups : 1, a.experts);
  p.experts = static_cast<int32_t>(a.experts);
  p.top_k = static_cast<int32_t>(a.top_k);
  p.top_groups = grouped ? static_cast<int32_t>(a.top_groups) : 0;
  p.scale = static_cast<float>(a.scale);
  p.normalize = a.normalize;
  p.topk_idx = a.topk_idx;
  p.topk_weight = a.topk_weight;
  p.scores = a.scores;
  p.counts = reinterpret_cast<uint64_t*>(a.counts);

  const uint32_t blocks = warp_blocks("logits", a.tokens, kThreads);
  const auto clear = launch_config("route, clear counts", static_cast<uint32_t>(ceil_div(2 * a.experts, kThreads)),
                                   kThreads, a.programmatic, stream);
  hopper::launch(clear, clear_kernel, reinterpret_cast<uint32_t*>(a.counts), 2 * a.experts);
  if (a.tokens == 0) return;
  const auto config = launch_config("route", blocks, kThreads, a.programmatic, stream);
  const bool vector = p.spread.size % 4 == 0 && whole_vectors(a.logits, a.tokens, a.experts, sizeof(float)) &&
                      whole_vectors(a.bias, 0, a.bias_stride, 1, a.experts, sizeof(float)) && is_aligned(a.scores, 16);
  const int64_t values = round_up(ceil_div(p.spread.size, int64_t{1} << p.spread.lane_bits), 4);
  // A lone lane may hold a whole group: 512 experts in 17 groups or more.
  if (values <= 4) run<4>(config, p, vector);
  else if (values <= 8) run<8>(config, p, vector);
  else if (values <= 16) run<16>(config, p, vector);
  else run<32>(config, p, vector);
}

void route_backward(const RouteBackwardArguments& a, hopper::Stream stream) {
  check_range("scores", a.experts, 1, std::numeric_limits<int32_t>::max() / 2);
  check_range("topk_idx", a.top_k, 1, kMaxTopK);
  require(a.tokens >= 0, "scores", "must not have a negative number of rows", a.tokens);
  check_table("dweight", a.dweight, a.tokens, a.top_k, sizeof(float));
  check_table("dscores", a.dscores, a.tokens, a.experts, sizeof(float));
  check_table("scores", a.scores, a.tokens, a.experts, sizeof(float));
  check_table("topk_idx", a.topk_idx, a.tokens, a.top_k, sizeof(int64_t));
  check_output("dlogits", a.dlogits, a.tokens * a.experts, sizeof(float));
  if (a.tokens == 0) return;

  RouteBackwardParams p{};
  p.dweight = a.dweight.data;
  p.dscores = a.dscores.data;
  p.scores = a.scores.data;
  p.topk_idx = a.topk_idx.data;
  p.dweight_strides[0] = a.dweight.row_stride, p.dweight_strides[1] = a.dweight.column_stride;
  p.dscores_strides[0] = a.dscores.row_stride, p.dscores_strides[1] = a.dscores.column_stride;
  p.scores_strides[0] = a.scores.row_stride, p.scores_strides[1] = a.scores.column_stride;
  p.idx_strides[0] = a.topk_idx.row_stride, p.idx_strides[1] = a.topk_idx.column_stride;
  p.tokens = a.tokens;
  p.experts = static_cast<int32_t>(a.experts);
  p.top_k = static_cast<int32_t>(a.top_k);
  p.scale = static_cast<float>(a.scale);
  p.normalize = a.normalize;
  p.dlogits = a.dlogits;
  const auto config = launch_config("route_backward", warp_blocks("scores", a.tokens, kThreads), kThreads,
                                    a.programmatic, stream);
  const bool vector = whole_vectors(a.dscores, a.tokens, a.experts, sizeof(float)) &&
                      whole_vectors(a.scores, a.tokens, a.experts, sizeof(float)) && is_aligned(a.dlogits, 16);
  vector ? hopper::launch(config, route_backward_kernel<true>, p) : hopper::launch(config, route_backward_kernel<false>, p);
}

}  // namespace moe
