// The optimizer's ops (deepseek_ops/optimizer.py) and the functions of csrc/optimizer that compute them.
#include <vector>

#include "../optimizer/optimizer.h"
#include "kernels.h"

namespace {

using T = const TensorView&;
using bindings::Reals;
using hopper::Stream;
using optimizer::Type;

Type type_of(T t) { return t.dtype == Dtype::bf16 ? Type::bf16 : t.dtype == Dtype::f32 ? Type::fp32 : Type::fp64; }

// Element i of a list that goes with params[i].
T matching(const char* name, const Tensors& list, size_t i, T param, std::initializer_list<Dtype> dtypes) {
  require(i < list.size(), name, "must have as many tensors as params", list.size());
  T t = list[i];
  check_dtype(t, dtypes);
  bool same = t.rank == param.rank;
  for (int axis = 0; same && axis < t.rank; ++axis) same = t.shape[axis] == param.shape[axis];
  require(same, t.name, "must have the shape of its parameter", shape_text(t));
  check_contiguous(t);
  return t;
}

// Copies of a weight; those without have empty vectors in their place.
struct Copies {
  const Tensors &q, &scale, &q_t, &scale_t;
};

T checked_copy(const char* name, const Tensors& list, size_t i, Dtype dtype, std::initializer_list<int64_t> shape) {
  require(i < list.size(), name, "must have as many tensors as params", list.size());
  check_dtype(list[i], {dtype});
  check_shape(list[i], shape);
  check_contiguous(list[i]);
  return list[i];
}

void set_copies(optimizer::AdamwTensor& tensor, const Copies& copies, size_t i, T param) {
  const auto absent = [i](const Tensors& list) { return i < list.size() && list[i].rank == 1 && list[i].shape[0] == 0; };
  if (absent(copies.q)) return;
  require(param.rank == 2 || param.rank == 3, param.name, "must have 2 or 3 dimensions to be quantised", shape_text(param));
  const bool stack = param.rank == 3;
  const int64_t batch = stack ? param.shape[0] : 1, rows = param.shape[stack], columns = param.shape[stack + 1];
  const auto copy = [&](const char* name, const Tensors& list, Dtype dtype, int64_t first, int64_t second) {
    return stack ? checked_copy(name, list, i, dtype, {batch, first, second})
                 : checked_copy(name, list, i, dtype, {first, second});
  };
  const int64_t row_tiles = ceil_div(rows, 128), column_tiles = ceil_div(columns, 128);
  tensor.quantized = true;
  tensor.batch = batch, tensor.rows = rows, tensor.columns = columns;
  tensor.q = copy("q", copies.q, Dtype::e4m3, rows, columns).data;
  tensor.scale = copy("scale", copies.scale, Dtype::f32, row_tiles, column_tiles).as<float>();
  if (absent(copies.q_t)) return;
  tensor.q_t = copy("q_t", copies.q_t, Dtype::e4m3, columns, rows).data;
  tensor.scale_t = copy("scale_t", copies.scale_t, Dtype::f32, column_tiles, row_tiles).as<float>();
}

struct Settings {
  double lr, beta1, beta2, eps;
  int64_t step;
  double grad_scale;
  bool stochastic_rounding;
  int64_t seed, first_index;
  bool pow2 = false;
};

void adamw(Stream stream, const Tensors& params, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq,
           const Tensors& out, const Reals& weight_decay, const OptionalTensor& grad_scale, const Settings& s,
           const Copies* copies = nullptr) {
  for (const Tensors* list : {&grads, &exp_avg, &exp_avg_sq})
    require(list->size() == params.size(), "params", "must have as many tensors as grads, exp_avg and exp_avg_sq", params.size());
  require(out.empty() || out.size() == params.size(), "out", "must have as many tensors as params, or none", out.size());
  require(weight_decay.size() == params.size(), "weight_decay", "must have as many numbers as params", weight_decay.size());
  std::vector<optimizer::AdamwTensor> tensors(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    T param = params[i];
    check_dtype(param, {Dtype::f32});
    check_contiguous(param);
    T grad = matching("grads", grads, i, param, {Dtype::f32, Dtype::bf16});
    T first = matching("exp_avg", exp_avg, i, param, {Dtype::f32, Dtype::bf16});
    T second = matching("exp_avg_sq", exp_avg_sq, i, param, {Dtype::f32, Dtype::bf16});
    hopper::bf16* copy = out.empty() ? nullptr : matching("out", out, i, param, {Dtype::bf16}).as<hopper::bf16>();
    tensors[i] = {param.as<float>(), grad.data, first.data, second.data, copy, type_of(grad), type_of(first),
                  type_of(second), param.numel(), weight_decay[i]};
    if (copies) set_copies(tensors[i], *copies, i, param);
  }
  optimizer::AdamwArguments a;
  a.tensors = tensors.data();
  a.tensor_count = tensors.size();
  a.lr = s.lr, a.beta1 = s.beta1, a.beta2 = s.beta2, a.eps = s.eps;
  a.step = s.step;
  a.grad_scale = s.grad_scale;
  if (grad_scale) {
    check_dtype(*grad_scale, {Dtype::f32});
    check_shape(*grad_scale, {});
    a.grad_scale_tensor = grad_scale->as<const float>();
  }
  a.stochastic_rounding = s.stochastic_rounding;
  a.seed = s.seed, a.first_index = s.first_index;
  a.pow2 = s.pow2;
  copies ? optimizer::adamw_quantize(a, stream) : optimizer::adamw(a, stream);
}

void clip_grad_norm(Stream stream, const Tensors& grads, double max_norm, T norm, T scale, T partials) {
  std::vector<optimizer::NormTensor> tensors;
  for (T grad : grads) {
    check_dtype(grad, {Dtype::f32, Dtype::bf16, Dtype::f64});
    check_contiguous(grad);
    tensors.push_back({grad.data, type_of(grad), grad.numel()});
  }
  for (const TensorView* t : {&norm, &scale}) {
    check_dtype(*t, {Dtype::f32});
    check_shape(*t, {});
  }
  check_dtype(partials, {Dtype::f64});
  check_shape(partials, {optimizer::kNormPartials});
  check_contiguous(partials);
  optimizer::NormArguments a;
  a.tensors = tensors.data();
  a.tensor_count = tensors.size();
  a.max_norm = max_norm;
  a.partials = partials.as<double>();
  a.norm = norm.as<float>();
  a.scale = scale.as<float>();
  optimizer::clip_grad_norm(a, stream);
}

}  // namespace

void bind_optimizer(bindings::Module& to) {
  using namespace bindings;
  to.add(kernel("adamw_", +[](Stream stream, const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                              const Tensors& exp_avg_sq, const Tensors& out, const Reals& weight_decay, double lr,
                              double beta1, double beta2, double eps, int64_t step, double grad_scale,
                              OptionalTensor grad_scale_tensor, bool stochastic_rounding, int64_t seed,
                              int64_t first_index) {
    adamw(stream, params, grads, exp_avg, exp_avg_sq, out, weight_decay, grad_scale_tensor,
          {lr, beta1, beta2, eps, step, grad_scale, stochastic_rounding, seed, first_index});
  }, {in_out("params"), in("grads"), in_out("exp_avg"), in_out("exp_avg_sq"), in_out("out"), scalar("weight_decay"),
      scalar("lr"), scalar("beta1"), scalar("beta2"), scalar("eps"), scalar("step"), scalar("grad_scale"),
      in("grad_scale_tensor"), scalar("stochastic_rounding"), scalar("seed"), scalar("first_index")}));

  to.add(kernel("adamw_quantize_", +[](Stream stream, const Tensors& params, const Tensors& grads, const Tensors& exp_avg,
                                       const Tensors& exp_avg_sq, const Tensors& out, const Tensors& q,
                                       const Tensors& scale, const Tensors& q_t, const Tensors& scale_t,
                                       const Reals& weight_decay, double lr, double beta1, double beta2, double eps,
                                       int64_t step, double grad_scale, OptionalTensor grad_scale_tensor,
                                       bool stochastic_rounding, int64_t seed, int64_t first_index, bool pow2) {
    const Copies copies{q, scale, q_t, scale_t};
    adamw(stream, params, grads, exp_avg, exp_avg_sq, out, weight_decay, grad_scale_tensor,
          {lr, beta1, beta2, eps, step, grad_scale, stochastic_rounding, seed, first_index, pow2}, &copies);
  }, {in_out("params"), in("grads"), in_out("exp_avg"), in_out("exp_avg_sq"), in_out("out"), in_out("q"), in_out("scale"),
      in_out("q_t"), in_out("scale_t"), scalar("weight_decay"), scalar("lr"), scalar("beta1"), scalar("beta2"),
      scalar("eps"), scalar("step"), scalar("grad_scale"), in("grad_scale_tensor"), scalar("stochastic_rounding"),
      scalar("seed"), scalar("first_index"), scalar("pow2")}));

  to.add(kernel("clip_grad_norm", +[](Stream stream, const Tensors& grads, double max_norm, T norm, T scale, T partials) {
    clip_grad_norm(stream, grads, max_norm, norm, scale, partials);
  }, {in("grads"), scalar("max_norm"), out("norm"), out("scale"), out("partials")}));
}
