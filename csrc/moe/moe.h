// The plumbing of a MoE layer on the host: arguments, limits, launches (report 2.1.2). What the functions compute, to
// the bit: deepseek_ops/moe.py, docs/numerics.md and deepseek_ops/reference/modelled/moe.py; how: README.md beside this.
//
// Every function launches on `stream`, allocates nothing, never synchronises, and throws before anything is launched
// with a sentence that names the argument, the rule it broke and its value. Strides count elements; outputs are dense.
// Indices, offsets and borders are device data that nobody has checked: whatever they hold, no access leaves a tensor.
#pragma once

#include <cstdint>

#include "../hopper/launch.h"

namespace moe {

constexpr int64_t kMaxExperts = 512;      // of a router: one warp holds a token's scores
constexpr int64_t kMaxTopK = 32;          // a lane for each chosen expert
constexpr int64_t kMaxGroups = 32;        // a lane or more for each group
constexpr int64_t kMaxBins = 4096;        // experts of a permutation: a warp's counters lie in shared memory
constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1;

enum class Type : uint8_t { bf16, fp32 };

template <class T>
struct Table {                            // [rows, columns], any strides
  T* data = nullptr;
  int64_t row_stride = 0, column_stride = 1;
};

struct RouteArguments {
  Table<const float> logits;              // [tokens, experts]
  const float* bias = nullptr;            // [experts]
  int64_t bias_stride = 1;
  int64_t tokens = 0, experts = 1, top_k = 1, num_groups = 1, top_groups = 1;
  double scale = 1;
  bool normalize = true;
  int64_t* topk_idx = nullptr;            // [tokens, top_k]
  float* topk_weight = nullptr;           // [tokens, top_k]
  float* scores = nullptr;                // [tokens, experts]
  int64_t* counts = nullptr;              // [experts]
  bool programmatic = true;               // may start before the previous kernel of the stream has ended (PDL)
};
void route(const RouteArguments& arguments, hopper::Stream stream);

struct RouteBackwardArguments {
  Table<const float> dweight, dscores, scores;   // [tokens, top_k], [tokens, experts] twice
  Table<const int64_t> topk_idx;
  int64_t tokens = 0, experts = 1, top_k = 1;
  double scale = 1;
  bool normalize = true;
  float* dlogits = nullptr;               // [tokens, experts]
  bool programmatic = true;
};
void route_backward(const RouteBackwardArguments& arguments, hopper::Stream stream);

struct BalanceArguments {
  Table<const float> scores;              // [tokens, experts]
  Table<const int64_t> topk_idx;          // [tokens, top_k]
  const int32_t* cu_seqlens = nullptr;    // [sequences + 1]
  int64_t cu_stride = 1;
  int64_t tokens = 0, experts = 1, top_k = 1, sequences = 0;
  double alpha = 0;
  bool biased = true;                     // count topk_idx; otherwise the best top_k of the scores themselves
  float* loss = nullptr;                  // a scalar
  float* dscores = nullptr;               // [tokens, experts]
  uint32_t* counts = nullptr;             // workspace: sequences * experts + 1
  float* token_loss = nullptr;            // workspace: tokens
  bool programmatic = true;
};
void balance_loss(const BalanceArguments& arguments, hopper::Stream stream);

struct UpdateBiasArguments {
  float* bias = nullptr;                  // [experts], in place
  const int64_t* counts = nullptr;        // [experts]
  int64_t experts = 0, bias_stride = 1, counts_stride = 1;
  double speed = 0;
  bool programmatic = true;
};
void update_bias(const UpdateBiasArguments& arguments, hopper::Stream stream);

// Rows of any element size; `scale` too: 1 x 128 scales in the GEMM-ready layout, for a permutation of quantised rows.
struct PermuteArguments {
  Table<const void> x;                    // [tokens, columns], strides in elements
  int64_t element_bytes = 2;              // 1, 2, 4 or 8
  Table<const int64_t> topk_idx;          // [tokens, top_k]
  int64_t tokens = 0, columns = 0, top_k = 1, experts = 1;
  const float* scale = nullptr;           // [ceil(columns / 128), scale_stride], or null
  int64_t scale_stride = 0;
  void* x_perm = nullptr;                 // [tokens * top_k, columns]
  float* scale_perm = nullptr;            // [ceil(columns / 128), rows padded to 4]
  int32_t* offsets = nullptr;             // [experts + 1]
  int64_t* source = nullptr;              // [tokens * top_k]
  int32_t* row_of_slot = nullptr;         // workspace: tokens * top_k
  int32_t blocks = 0, warps = 0;          // of the plan; 0: chosen by the number of rows. Results do not depend on them
  bool programmatic = true;
};
void permute(const PermuteArguments& arguments, hopper::Stream stream);

struct UnpermuteArguments {
  Table<const void> y;                    // [tokens * top_k, columns]
  Type type = Type::bf16;
  const int64_t* source = nullptr;        // [tokens * top_k]
  int64_t source_stride = 1;
  Table<const float> weights;             // [tokens, top_k]; null: ones
  int64_t tokens = 0, columns = 0, top_k = 1;
  void* out = nullptr;                    // [tokens, columns]
  int32_t* row_of_slot = nullptr;         // workspace: tokens * top_k
  bool programmatic = true;
};
void unpermute(const UnpermuteArguments& arguments, hopper::Stream stream);

struct UnpermuteBackwardArguments {
  Table<const void> dout;                 // [tokens, columns]
  Table<const void> y;                    // [tokens * top_k, columns]; null without weights
  Type type = Type::bf16;
  const int64_t* source = nullptr;
  int64_t source_stride = 1;
  Table<const float> weights;
  int64_t tokens = 0, columns = 0, top_k = 1;
  void* dy = nullptr;                     // [tokens * top_k, columns]
  float* dweights = nullptr;              // [tokens, top_k], with weights
  int32_t* row_of_slot = nullptr;         // workspace: tokens * top_k
  bool programmatic = true;
};
void unpermute_backward(const UnpermuteBackwardArguments& arguments, hopper::Stream stream);

}  // namespace moe
