// The MoE plumbing's ops (deepseek_ops/moe.py) and the functions of csrc/moe that compute them. Shapes, types and
// devices are checked here, everything about memory and limits by the launchers.
#include "../moe/moe.h"
#include "kernels.h"

namespace {

using T = const TensorView&;
using hopper::Stream;

template <class E>
moe::Table<E> table(T x) { return {static_cast<E*>(x.data), x.stride[0], x.stride[1]}; }

void check_input(T x, std::initializer_list<Dtype> dtypes, std::initializer_list<int64_t> shape, T first) {
  check_dtype(x, dtypes);
  check_shape(x, shape);
  check_same_device(x, first);
}

void check_result(T x, Dtype dtype, std::initializer_list<int64_t> shape, T first) {
  check_input(x, {dtype}, shape, first);
  check_contiguous(x);
}

// The kernels know no fp64; gradients are checked in it on the reference.
void check_scores(T x) {
  check_rank(x, 2);
  check_dtype(x, {Dtype::f32});
}

moe::Type type_of(T rows) { return rows.dtype == Dtype::bf16 ? moe::Type::bf16 : moe::Type::fp32; }

void route(Stream stream, T logits, T bias, int64_t top_k, int64_t num_groups, int64_t top_groups, double scale,
           bool normalize, T topk_idx, T topk_weight, T scores, T counts) {
  check_scores(logits);
  const int64_t tokens = logits.shape[0], experts = logits.shape[1];
  check_input(bias, {Dtype::f32}, {experts}, logits);
  check_result(topk_idx, Dtype::i64, {tokens, top_k}, logits);
  check_result(topk_weight, Dtype::f32, {tokens, top_k}, logits);
  check_result(scores, Dtype::f32, {tokens, experts}, logits);
  check_result(counts, Dtype::i64, {experts}, logits);
  moe::RouteArguments a;
  a.logits = table<const float>(logits);
  a.bias = bias.as<const float>();
  a.bias_stride = bias.stride[0];
  a.tokens = tokens, a.experts = experts, a.top_k = top_k;
  a.num_groups = num_groups, a.top_groups = top_groups;
  a.scale = scale;
  a.normalize = normalize;
  a.topk_idx = topk_idx.as<int64_t>();
  a.topk_weight = topk_weight.as<float>();
  a.scores = scores.as<float>();
  a.counts = counts.as<int64_t>();
  moe::route(a, stream);
}

void route_backward(Stream stream, T dweight, T dscores, T scores, T topk_idx, double scale, bool normalize, T dlogits) {
  check_scores(scores);
  const int64_t tokens = scores.shape[0], experts = scores.shape[1];
  check_input(dscores, {Dtype::f32}, {tokens, experts}, scores);
  check_input(topk_idx, {Dtype::i64}, {tokens, -1}, scores);
  check_input(dweight, {Dtype::f32}, {tokens, topk_idx.shape[1]}, scores);
  check_result(dlogits, Dtype::f32, {tokens, experts}, scores);
  moe::RouteBackwardArguments a;
  a.dweight = table<const float>(dweight);
  a.dscores = table<const float>(dscores);
  a.scores = table<const float>(scores);
  a.topk_idx = table<const int64_t>(topk_idx);
  a.tokens = tokens, a.experts = experts, a.top_k = topk_idx.shape[1];
  a.scale = scale;
  a.normalize = normalize;
  a.dlogits = dlogits.as<float>();
  moe::route_backward(a, stream);
}

void balance_loss(Stream stream, T scores, T topk_idx, T cu_seqlens, double alpha, const std::string& selection, T loss,
                  T dscores, T counts, T token_loss) {
  check_scores(scores);
  const int64_t tokens = scores.shape[0], experts = scores.shape[1];
  check_input(topk_idx, {Dtype::i64}, {tokens, -1}, scores);
  check_input(cu_seqlens, {Dtype::i32}, {-1}, scores);
  require(cu_seqlens.shape[0] >= 1, cu_seqlens.name, "must have at least one element", shape_text(cu_seqlens));
  require(selection == "biased" || selection == "unbiased", "selection", "must be biased or unbiased", selection);
  const int64_t sequences = cu_seqlens.shape[0] - 1;
  check_result(loss, Dtype::f32, {}, scores);
  check_result(dscores, Dtype::f32, {tokens, experts}, scores);
  check_result(counts, Dtype::i32, {sequences * experts + 1}, scores);
  check_result(token_loss, Dtype::f32, {tokens}, scores);
  moe::BalanceArguments a;
  a.scores = table<const float>(scores);
  a.topk_idx = table<const int64_t>(topk_idx);
  a.cu_seqlens = cu_seqlens.as<const int32_t>();
  a.cu_stride = cu_seqlens.stride[0];
  a.tokens = tokens, a.experts = experts, a.top_k = topk_idx.shape[1], a.sequences = sequences;
  a.alpha = alpha;
  a.biased = selection == "biased";
  a.loss = loss.as<float>();
  a.dscores = dscores.as<float>();
  a.counts = counts.as<uint32_t>();
  a.token_loss = token_loss.as<float>();
  moe::balance_loss(a, stream);
}

void update_bias(Stream stream, T bias, T counts, double speed) {
  check_dtype(bias, {Dtype::f32});
  check_rank(bias, 1);
  check_input(counts, {Dtype::i64}, {bias.shape[0]}, bias);
  moe::UpdateBiasArguments a;
  a.bias = bias.as<float>();
  a.counts = counts.as<const int64_t>();
  a.experts = bias.shape[0];
  a.bias_stride = bias.stride[0], a.counts_stride = counts.stride[0];
  a.speed = speed;
  moe::update_bias(a, stream);
}

moe::PermuteArguments permutation(T x, T topk_idx, int64_t experts, T x_perm, T offsets, T source, T row_of_slot) {
  check_rank(x, 2);
  check_input(topk_idx, {Dtype::i64}, {x.shape[0], -1}, x);
  const int64_t tokens = x.shape[0], top_k = topk_idx.shape[1], rows = tokens * top_k;
  check_result(x_perm, x.dtype, {rows, x.shape[1]}, x);
  check_result(offsets, Dtype::i32, {experts + 1}, x);
  check_result(source, Dtype::i64, {rows}, x);
  check_result(row_of_slot, Dtype::i32, {rows}, x);
  moe::PermuteArguments a;
  a.x = table<const void>(x);
  a.element_bytes = size_of(x.dtype);
  a.topk_idx = table<const int64_t>(topk_idx);
  a.tokens = tokens, a.columns = x.shape[1], a.top_k = top_k, a.experts = experts;
  a.x_perm = x_perm.data;
  a.offsets = offsets.as<int32_t>();
  a.source = source.as<int64_t>();
  a.row_of_slot = row_of_slot.as<int32_t>();
  return a;
}

void permute(Stream stream, T x, T topk_idx, int64_t experts, T x_perm, T offsets, T source, T row_of_slot) {
  check_dtype(x, {Dtype::bf16, Dtype::f32, Dtype::f64});
  moe::permute(permutation(x, topk_idx, experts, x_perm, offsets, source, row_of_slot), stream);
}

void permute_quantized(Stream stream, T q, T scale, T topk_idx, int64_t experts, T q_perm, T scale_perm, T offsets,
                       T source, T row_of_slot) {
  check_dtype(q, {Dtype::e4m3});
  moe::PermuteArguments a = permutation(q, topk_idx, experts, q_perm, offsets, source, row_of_slot);
  const int64_t tiles = ceil_div(a.columns, 128);
  check_input(scale, {Dtype::f32}, {tiles, round_up(a.tokens, 4)}, q);
  check_unit_stride(scale);
  check_result(scale_perm, Dtype::f32, {tiles, round_up(a.tokens * a.top_k, 4)}, q);
  a.scale = scale.as<const float>();
  a.scale_stride = scale.stride[0];
  a.scale_perm = scale_perm.as<float>();
  moe::permute(a, stream);
}

void unpermute(Stream stream, T y, T source, int64_t num_tokens, int64_t top_k, const OptionalTensor& weights, T out,
               T row_of_slot) {
  check_rank(y, 2);
  check_dtype(y, {Dtype::bf16, Dtype::f32});
  const int64_t rows = y.shape[0];
  require(num_tokens >= 0 && top_k >= 1 && (num_tokens == 0 ? rows == 0 : rows % num_tokens == 0 && rows / num_tokens == top_k),
          "y", "must have num_tokens * top_k rows", shape_text(y));
  check_input(source, {Dtype::i64}, {rows}, y);
  check_result(out, y.dtype, {num_tokens, y.shape[1]}, y);
  check_result(row_of_slot, Dtype::i32, {rows}, y);
  moe::UnpermuteArguments a;
  a.y = table<const void>(y);
  a.type = type_of(y);
  a.source = source.as<const int64_t>();
  a.source_stride = source.stride[0];
  if (weights) {
    check_input(*weights, {Dtype::f32}, {num_tokens, top_k}, y);
    a.weights = table<const float>(*weights);
  }
  a.tokens = num_tokens, a.columns = y.shape[1], a.top_k = top_k;
  a.out = out.data;
  a.row_of_slot = row_of_slot.as<int32_t>();
  moe::unpermute(a, stream);
}

void unpermute_backward(Stream stream, T dout, const OptionalTensor& y, T source, int64_t top_k,
                        const OptionalTensor& weights, T dy, T dweights, T row_of_slot) {
  check_rank(dout, 2);
  check_dtype(dout, {Dtype::bf16, Dtype::f32});
  const int64_t tokens = dout.shape[0], columns = dout.shape[1], rows = tokens * top_k;
  check_input(source, {Dtype::i64}, {rows}, dout);
  check_result(dy, dout.dtype, {rows, columns}, dout);
  check_result(row_of_slot, Dtype::i32, {rows}, dout);
  moe::UnpermuteBackwardArguments a;
  a.dout = table<const void>(dout);
  a.type = type_of(dout);
  a.source = source.as<const int64_t>();
  a.source_stride = source.stride[0];
  if (weights) {
    require(y.has_value(), "y", "must be given with weights", "None");
    check_input(*y, {dout.dtype}, {rows, columns}, dout);
    check_input(*weights, {Dtype::f32}, {tokens, top_k}, dout);
    check_result(dweights, Dtype::f32, {tokens, top_k}, dout);
    a.y = table<const void>(*y);
    a.weights = table<const float>(*weights);
    a.dweights = dweights.as<float>();
  }
  a.tokens = tokens, a.columns = columns, a.top_k = top_k;
  a.dy = dy.data;
  a.row_of_slot = row_of_slot.as<int32_t>();
  moe::unpermute_backward(a, stream);
}

}  // namespace

void bind_moe(bindings::Module& to) {
  using namespace bindings;
  to.add(kernel("route", route, {in("logits"), in("bias"), scalar("top_k"), scalar("num_groups"), scalar("top_groups"),
                                 scalar("scale"), scalar("normalize"), out("topk_idx"), out("topk_weight"), out("scores"),
                                 out("counts")}));
  to.add(kernel("route_backward", route_backward, {in("dweight"), in("dscores"), in("scores"), in("topk_idx"),
                                                   scalar("scale"), scalar("normalize"), out("dlogits")}));
  to.add(kernel("balance_loss", balance_loss, {in("scores"), in("topk_idx"), in("cu_seqlens"), scalar("alpha"),
                                               scalar("selection"), out("loss"), out("dscores"), out("counts"),
                                               out("token_loss")}));
  to.add(kernel("update_bias_", update_bias, {in_out("bias"), in("counts"), scalar("speed")}));
  to.add(kernel("permute", permute, {in("x"), in("topk_idx"), scalar("num_experts"), out("x_perm"), out("offsets"),
                                     out("source"), out("row_of_slot")}));
  to.add(kernel("permute_quantized", permute_quantized,
                {in("q"), in("scale"), in("topk_idx"), scalar("num_experts"), out("q_perm"), out("scale_perm"),
                 out("offsets"), out("source"), out("row_of_slot")}));
  to.add(kernel("unpermute", unpermute, {in("y"), in("source"), scalar("num_tokens"), scalar("top_k"), in("weights"),
                                         out("out"), out("row_of_slot")}));
  to.add(kernel("unpermute_backward", unpermute_backward,
                {in("dout"), in("y"), in("source"), scalar("top_k"), in("weights"), out("dy"), out("dweights"),
                 out("row_of_slot")}));
}
