// RMSNorm's ops (deepseek_ops/norm.py) and the functions of csrc/norm that compute them.
#include "../norm/norm.h"
#include "kernels.h"
#include "rows.h"

namespace {

using namespace bindings;
using T = const TensorView&;
using hopper::Stream;

norms::Weight weight_of(T weight, int64_t columns) {
  check_dtype(weight, {Dtype::bf16, Dtype::f32});
  check_shape(weight, {columns});
  return {weight.data, weight.dtype == Dtype::bf16 ? quantize::Type::bf16 : quantize::Type::fp32,
          columns > 1 ? weight.stride[0] : 1};
}

void check_rstd(T rstd, T x) {
  check_dtype(rstd, {Dtype::f32});
  bool fits = rstd.rank == x.rank - 1;
  for (int i = 0; fits && i < rstd.rank; ++i) fits = rstd.shape[i] == x.shape[i];
  if (!fits) fail(rstd.name, "must have one element for each row of x", shape_text(rstd));
  check_contiguous(rstd);
}

norms::RmsNormArguments arguments_of(T x, const OptionalTensor& residual, T weight, double eps, T rstd) {
  check_dtype(x, {Dtype::bf16, Dtype::f32});
  norms::RmsNormArguments a;
  a.x = rows_of(x);
  if (residual) {
    check_like(*residual, x, x.dtype);
    a.residual = rows_of(*residual);
  }
  a.weight = weight_of(weight, a.x.columns);
  a.eps = eps;
  check_rstd(rstd, x);
  a.rstd = rstd.as<float>();
  return a;
}

void dense_like(T t, T x) {
  check_like(t, x, x.dtype);
  check_contiguous(t);
}

void norm(Stream stream, T x, const OptionalTensor& residual, T weight, double eps, T y, const OptionalTensor& sum,
          T rstd) {
  norms::RmsNormArguments a = arguments_of(x, residual, weight, eps, rstd);
  dense_like(y, x);
  a.y = y.data;
  if (sum) {
    dense_like(*sum, x);
    a.new_residual = sum->data;
  }
  rms_norm(a, stream);
}

void norm_quantize(Stream stream, T x, const OptionalTensor& residual, T weight, double eps, bool pow2, T q, T scale,
                   T rstd, const OptionalTensor& sum) {
  check_rank(x, 2);
  norms::RmsNormArguments a = arguments_of(x, residual, weight, eps, rstd);
  check_row_codes(q, scale, a.x.rows, a.x.columns);
  a.q = q.data;
  a.scale = scale.as<float>();
  a.pow2 = pow2;
  if (sum) {
    dense_like(*sum, x);
    a.new_residual = sum->data;
  }
  rms_norm(a, stream);
}

void norm_backward(Stream stream, T dy, T x, T weight, T rstd, const OptionalTensor& dresidual, T dx, T dweight,
                   T workspace) {
  check_dtype(x, {Dtype::bf16, Dtype::f32});
  check_like(dy, x, x.dtype);
  norms::RmsNormBackwardArguments a;
  a.dy = rows_of(dy);
  a.x = rows_of(x);
  a.weight = weight_of(weight, a.x.columns);
  check_rstd(rstd, x);
  a.rstd = rstd.as<const float>();
  if (dresidual) {
    check_like(*dresidual, x, x.dtype);
    a.dresidual = rows_of(*dresidual);
  }
  dense_like(dx, x);
  a.dx = dx.data;
  check_dense(dweight, weight.dtype, {a.x.columns});
  a.dweight = dweight.data;
  check_dense(workspace, Dtype::f64, {-1, round_up(a.x.columns, 512)});
  a.workspace = workspace.as<double>();
  a.parts = workspace.shape[0];
  rms_norm_backward(a, stream);
}

}  // namespace

void bind_norm(bindings::Module& to) {
  to.add(kernel("rms_norm", +[](Stream s, T x, T weight, double eps, T y, T rstd) {
    norm(s, x, std::nullopt, weight, eps, y, std::nullopt, rstd);
  }, {in("x"), in("weight"), scalar("eps"), out("y"), out("rstd")}));

  to.add(kernel("rms_norm_residual", +[](Stream s, T x, T residual, T weight, double eps, T y, T sum, T rstd) {
    norm(s, x, residual, weight, eps, y, sum, rstd);
  }, {in("x"), in("residual"), in("weight"), scalar("eps"), out("y"), out("new_residual"), out("rstd")}));

  to.add(kernel("rms_norm_quantize", +[](Stream s, T x, T weight, double eps, bool pow2, T q, T scale, T rstd) {
    norm_quantize(s, x, std::nullopt, weight, eps, pow2, q, scale, rstd, std::nullopt);
  }, {in("x"), in("weight"), scalar("eps"), scalar("pow2"), out("q"), out("scale"), out("rstd")}));

  to.add(kernel("rms_norm_residual_quantize",
                +[](Stream s, T x, T residual, T weight, double eps, bool pow2, T q, T scale, T rstd, T sum) {
    norm_quantize(s, x, residual, weight, eps, pow2, q, scale, rstd, sum);
  }, {in("x"), in("residual"), in("weight"), scalar("eps"), scalar("pow2"), out("q"), out("scale"), out("rstd"),
      out("new_residual")}));

  to.add(kernel("rms_norm_backward",
                +[](Stream s, T dy, T x, T weight, T rstd, OptionalTensor dresidual, T dx, T dweight, T workspace) {
    norm_backward(s, dy, x, weight, rstd, dresidual, dx, dweight, workspace);
  }, {in("dy"), in("x"), in("weight"), in("rstd"), in("dresidual"), out("dx"), out("dweight"), out("workspace")}));
}
