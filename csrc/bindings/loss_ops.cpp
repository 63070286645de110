// The ops of deepseek_ops/loss.py and csrc/loss that computes them. Workspace comes after the outputs
// (deepseek_ops/_native_ops.py): logits and their gradient, fp32 sums of dh, and three numbers for each token.
#include "../loss/cross_entropy.h"

#include "kernels.h"

namespace {

using T = const TensorView&;

struct Workspace {
  T logits, dlogits, dh_sum, largest, sum, at_label;
};

LossMatrix matrix(T x) {
  if (x.dtype != Dtype::bf16)
    fail(x.name, "must be bfloat16, which kernels multiply (deepseek_ops.backend(\"reference\") takes float32 and float64)",
         name_of(x.dtype));
  check_rank(x, 2);
  return {x.as<const hopper::bf16>(), x.shape[0], x.shape[1], x.stride[0], x.stride[1]};
}

hopper::bf16* gradient(T d, const LossMatrix& of, bool needed) {
  check_dtype(d, {Dtype::bf16});
  if (!needed) return nullptr;
  check_shape(d, {of.rows, of.columns});
  check_contiguous(d);
  return d.as<hopper::bf16>();
}

CrossEntropyArguments arguments(T h, T weight, T labels, const Workspace& w) {
  CrossEntropyArguments x;
  x.h = matrix(h);
  x.weight = matrix(weight);
  check_shape(weight, {-1, x.h.columns});
  require(x.weight.rows >= 1, "weight", "must have at least one row (class)", shape_text(weight));
  const int64_t tokens = x.h.rows;
  check_dtype(labels, {Dtype::i64});
  check_shape(labels, {tokens});
  x.labels = labels.as<const int64_t>();
  x.labels_stride = labels.stride[0];
  for (const TensorView* t : {&w.logits, &w.dlogits, &w.dh_sum, &w.largest, &w.sum, &w.at_label}) check_contiguous(*t);
  check_dtype(w.logits, {Dtype::f32});
  check_shape(w.logits, {tokens, -1});
  x.logits = w.logits.as<float>();
  x.stride = w.logits.shape[1];
  x.chunk = x.stride;
  x.largest = w.largest.as<float>();
  x.sum = w.sum.as<double>();
  x.at_label = w.at_label.as<float>();
  return x;
}

void run(hopper::Stream s, CrossEntropyArguments x, const Workspace& w) {
  if (x.dh || x.dweight) {
    check_dtype(w.dlogits, {Dtype::bf16});
    check_shape(w.dlogits, {x.h.rows, x.stride});
    x.dlogits = w.dlogits.as<hopper::bf16>();
  }
  if (x.dh) {
    check_dtype(w.dh_sum, {Dtype::f32});
    check_shape(w.dh_sum, {x.h.rows, x.h.columns});
    x.dh_sum = w.dh_sum.as<float>();
  }
  linear_cross_entropy(x, s);
}

float* floats(T x, int64_t count) {
  check_dtype(x, {Dtype::f32});
  require(x.numel() == count, x.name, "must hold one number for each token", x.numel());
  return x.as<float>();
}

}  // namespace

void bind_loss(bindings::Module& to) {
  using namespace bindings;
  using hopper::Stream;

  to.add(kernel("linear_cross_entropy",
                +[](Stream s, T h, T weight, T labels, int64_t, bool need_dh, bool need_dweight, T loss, T dh, T dweight,
                    T logits, T dlogits, T dh_sum, T largest, T sum, T at_label, T token_loss) {
    const Workspace w{logits, dlogits, dh_sum, largest, sum, at_label};
    CrossEntropyArguments x = arguments(h, weight, labels, w);
    x.token_loss = floats(token_loss, x.h.rows);
    x.loss = floats(loss, 1);
    x.dh = gradient(dh, x.h, need_dh);
    x.dweight = gradient(dweight, x.weight, need_dweight);
    run(s, x, w);
  }, {in("h"), in("weight"), in("labels"), scalar("chunk"), scalar("need_dh"), scalar("need_dweight"), out("loss"),
      out("dh"), out("dweight"), out("logits"), out("dlogits"), out("dh_sum"), out("largest"), out("sum"),
      out("at_label"), out("token_loss")}));

  to.add(kernel("linear_cross_entropy_tokens",
                +[](Stream s, T h, T weight, T labels, int64_t, T loss, T logits, T dlogits, T dh_sum, T largest, T sum,
                    T at_label) {
    const Workspace w{logits, dlogits, dh_sum, largest, sum, at_label};
    CrossEntropyArguments x = arguments(h, weight, labels, w);
    x.token_loss = floats(loss, x.h.rows);
    run(s, x, w);
  }, {in("h"), in("weight"), in("labels"), scalar("chunk"), out("loss"), out("logits"), out("dlogits"), out("dh_sum"),
      out("largest"), out("sum"), out("at_label")}));

  to.add(kernel("linear_cross_entropy_tokens_backward",
                +[](Stream s, T dloss, T h, T weight, T labels, int64_t, bool need_dh, bool need_dweight, T dh, T dweight,
                    T logits, T dlogits, T dh_sum, T largest, T sum, T at_label, T token_loss) {
    const Workspace w{logits, dlogits, dh_sum, largest, sum, at_label};
    CrossEntropyArguments x = arguments(h, weight, labels, w);
    check_dtype(dloss, {Dtype::f32});
    check_shape(dloss, {x.h.rows});
    x.dloss = dloss.as<const float>();
    x.dloss_stride = dloss.stride[0];
    x.token_loss = floats(token_loss, x.h.rows);
    x.dh = gradient(dh, x.h, need_dh);
    x.dweight = gradient(dweight, x.weight, need_dweight);
    run(s, x, w);
  }, {in("dloss"), in("h"), in("weight"), in("labels"), scalar("chunk"), scalar("need_dh"), scalar("need_dweight"),
      out("dh"), out("dweight"), out("logits"), out("dlogits"), out("dh_sum"), out("largest"), out("sum"),
      out("at_label"), out("token_loss")}));
}
