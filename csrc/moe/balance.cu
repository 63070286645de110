// Host side of the balance loss and of the bias rule.
#include "balance.cuh"

#include "checks.h"

namespace moe {

using namespace moe_kernels;

void balance_loss(const BalanceArguments& a, hopper::Stream stream) {
  check_range("scores", a.experts, 1, kMaxExperts);
  check_range("topk_idx", a.top_k, 1, a.experts);
  require(a.tokens >= 0, "scores", "must not have a negative number of rows", a.tokens);
  require(a.sequences >= 0, "cu_seqlens", "must have at least one element", a.sequences + 1);
  check_table("scores", a.scores, a.tokens, a.experts, sizeof(float));
  check_table("topk_idx", a.topk_idx, a.tokens, a.top_k, sizeof(int64_t));
  check_table("cu_seqlens", Table<const int32_t>{a.cu_seqlens, 0, a.cu_stride}, 1, a.sequences + 1, sizeof(int32_t));
  check_output("loss", a.loss, 1, sizeof(float));
  check_output("dscores", a.dscores, a.tokens * a.experts, sizeof(float));
  const int64_t words = a.sequences * a.experts + 1;
  check_output("counts", a.counts, words, sizeof(uint32_t));
  check_output("token_loss", a.token_loss, a.tokens, sizeof(float));
  const int64_t clear_blocks = ceil_div(words, kThreads);
  require(clear_blocks <= kMaxBlocks, "cu_seqlens", "must have fewer sequences: their counts need a grid of less than 2^31 blocks",
          a.sequences);

  BalanceParams p{};
  p.scores = a.scores.data;
  p.row_stride = a.scores.row_stride;
  p.column_stride = a.scores.column_stride;
  p.topk_idx = a.topk_idx.data;
  p.idx_strides[0] = a.topk_idx.row_stride, p.idx_strides[1] = a.topk_idx.column_stride;
  p.cu_seqlens = a.cu_seqlens;
  p.cu_stride = a.cu_stride;
  p.sequences = a.sequences;
  p.tokens = a.tokens;
  p.spread = {1, static_cast<int32_t>(a.experts), 5};
  p.experts = static_cast<int32_t>(a.experts);
  p.top_k = static_cast<int32_t>(a.top_k);
  p.biased = a.biased;
  p.alpha = static_cast<float>(a.alpha);
  p.counts = a.counts;
  p.token_loss = a.token_loss;
  p.dscores = a.dscores;

  const auto config = [&](const char* name, uint32_t blocks, int threads, size_t smem = 0) {
    return launch_config(name, blocks, threads, a.programmatic, stream, smem);
  };
  if (a.tokens > 0) {
    const uint32_t blocks = warp_blocks("scores", a.tokens, kThreads);
    const bool vector = whole_vectors(a.scores, a.tokens, a.experts, sizeof(float)) && is_aligned(a.dscores, 16);
    hopper::launch(config("balance_loss, clear", static_cast<uint32_t>(clear_blocks), kThreads), clear_kernel, a.counts, words);
    hopper::launch(config("balance_loss, count", blocks, kThreads),
                   vector ? balance_count_kernel<true> : balance_count_kernel<false>, p);
    hopper::launch(config("balance_loss, tokens", blocks, kThreads),
                   vector ? balance_tokens_kernel<true> : balance_tokens_kernel<false>, p);
  }
  hopper::launch(config("balance_loss, total", 1, kBlockThreads, kBlockThreads / 32 * sizeof(double)), balance_total_kernel,
                 static_cast<const float*>(a.token_loss), a.tokens, a.loss);
}

void update_bias(const UpdateBiasArguments& a, hopper::Stream stream) {
  check_range("bias", a.experts, 0, std::numeric_limits<int32_t>::max() / 2);
  check_table("bias", Table<float>{a.bias, 0, a.bias_stride}, 1, a.experts, sizeof(float));
  check_table("counts", Table<const int64_t>{a.counts, 0, a.counts_stride}, 1, a.experts, sizeof(int64_t));
  if (a.experts == 0) return;
  hopper::launch(launch_config("update_bias_", 1, kBlockThreads, a.programmatic, stream, kBlockThreads / 32 * sizeof(uint64_t)),
                 update_bias_kernel, a.bias, a.bias_stride, a.counts, a.counts_stride, static_cast<int32_t>(a.experts),
                 static_cast<float>(a.speed));
}

}  // namespace moe
