// A C face of the MoE kernels for tests without bindings: one operation on the emulator; the report, "" when all is well.

#include "../../../csrc/moe/moe.h"
#include "../emulated_call.h"

extern "C" {

struct MoeCall {
  int32_t operation;   // 0 route and its gradient, 1 balance loss and bias, 2 permute with scales, 3 unpermute and its gradient
  int64_t tokens, experts, top_k, columns;
  const float *logits, *bias;
  const int64_t* topk_idx;
  const int32_t* cu_seqlens;
  int64_t sequences;
  const void* rows;          // e4m3 [tokens, columns] (2), bf16 [tokens * top_k, columns] (3)
  const float* scale;        // of the rows (2), weights (3)
  const int64_t* source;
  void* out[6];              // in the order of the operation's arguments; large enough, and equal in every run
  int64_t out_bytes;         // of each
  uint64_t seed;
  int32_t asynchrony, schedule;
  const char *drop_kind, *drop_site;
};

const char* moe_on_emulator(const MoeCall* call) {
  const MoeCall& c = *call;
  set_options(c);
  emulator::clear_buffers();
  const int64_t rows = c.tokens * c.top_k, tiles = (c.columns + 127) / 128, padded = (c.tokens + 3) / 4 * 4;
  const auto given = [](const void* p, int64_t bytes, const char* name) { emulator::register_buffer(p, bytes, name, false); };
  given(c.logits, 4 * c.tokens * c.experts, "logits");
  given(c.bias, 4 * c.experts, "bias");
  given(c.topk_idx, 8 * rows, "topk_idx");
  given(c.cu_seqlens, 4 * (c.sequences + 1), "cu_seqlens");
  given(c.rows, c.operation == 2 ? c.tokens * c.columns : 2 * rows * c.columns, "rows");
  given(c.scale, 4 * (c.operation == 2 ? tiles * padded : rows), "scale");
  given(c.source, 8 * rows, "source");
  for (void* out : c.out) emulator::register_buffer(out, c.out_bytes, "out", true);
  const auto floats = [&](int i) { return static_cast<float*>(c.out[i]); };
  const auto longs = [&](int i) { return static_cast<int64_t*>(c.out[i]); };
  const auto ints = [&](int i) { return static_cast<int32_t*>(c.out[i]); };
  const hopper::Stream stream{};
  return report_of_chain([&] {
    if (c.operation == 0) {
      moe::RouteArguments a;
      a.logits = {c.logits, c.experts, 1}, a.bias = c.bias;
      a.tokens = c.tokens, a.experts = c.experts, a.top_k = c.top_k, a.num_groups = 4, a.top_groups = 2, a.scale = 2.5;
      a.topk_idx = longs(0), a.topk_weight = floats(1), a.scores = floats(2), a.counts = longs(3);
      moe::route(a, stream);
      moe::RouteBackwardArguments b;
      b.dweight = {c.scale, c.top_k, 1}, b.dscores = {c.logits, c.experts, 1}, b.scores = {floats(2), c.experts, 1};
      b.topk_idx = {longs(0), c.top_k, 1};
      b.tokens = c.tokens, b.experts = c.experts, b.top_k = c.top_k, b.scale = 2.5;
      b.dlogits = floats(4);
      moe::route_backward(b, stream);
    } else if (c.operation == 1) {
      moe::BalanceArguments a;
      a.scores = {c.logits, c.experts, 1}, a.topk_idx = {c.topk_idx, c.top_k, 1}, a.cu_seqlens = c.cu_seqlens;
      a.tokens = c.tokens, a.experts = c.experts, a.top_k = c.top_k, a.sequences = c.sequences, a.alpha = 0.3;
      a.biased = false;
      a.loss = floats(0), a.dscores = floats(1), a.counts = static_cast<uint32_t*>(c.out[2]), a.token_loss = floats(3);
      moe::balance_loss(a, stream);
      moe::UpdateBiasArguments b;
      b.bias = floats(4), b.counts = c.topk_idx, b.experts = rows, b.speed = 0.5;
      moe::update_bias(b, stream);
    } else if (c.operation == 2) {
      moe::PermuteArguments a;
      a.x = {c.rows, c.columns, 1}, a.element_bytes = 1, a.topk_idx = {c.topk_idx, c.top_k, 1};
      a.tokens = c.tokens, a.columns = c.columns, a.top_k = c.top_k, a.experts = c.experts;
      a.scale = c.scale, a.scale_stride = padded;
      a.x_perm = c.out[0], a.scale_perm = floats(1), a.offsets = ints(2), a.source = longs(3), a.row_of_slot = ints(4);
      a.blocks = 2, a.warps = 2;
      moe::permute(a, stream);
    } else {
      moe::UnpermuteArguments a;
      a.y = {c.rows, c.columns, 1}, a.source = c.source, a.weights = {c.scale, c.top_k, 1};
      a.tokens = c.tokens, a.columns = c.columns, a.top_k = c.top_k;
      a.out = c.out[0], a.row_of_slot = ints(1);
      moe::unpermute(a, stream);
      moe::UnpermuteBackwardArguments b;
      b.dout = {c.out[0], c.columns, 1}, b.y = a.y, b.source = c.source, b.weights = a.weights;
      b.tokens = c.tokens, b.columns = c.columns, b.top_k = c.top_k;
      b.dy = c.out[2], b.dweights = floats(3), b.row_of_slot = ints(4);
      moe::unpermute_backward(b, stream);
    }
  });
}

}  // extern "C"
