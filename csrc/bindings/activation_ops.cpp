// SwiGLU's ops (deepseek_ops/activation.py) and the functions of csrc/activation that compute them.
#include "../activation/activation.h"
#include "kernels.h"
#include "rows.h"

namespace {

using namespace bindings;
using T = const TensorView&;
using hopper::Stream;

activation::RowWeight weight_of(const OptionalTensor& weight, T gate_up) {
  if (!weight) return {};
  check_dtype(*weight, {Dtype::f32});
  bool fits = weight->rank == gate_up.rank - 1;
  for (int i = 0; fits && i < weight->rank; ++i) fits = weight->shape[i] == gate_up.shape[i];
  if (!fits) fail(weight->name, "must have one element for each row of gate_up", shape_text(*weight));
  if (weight->rank != 1) check_contiguous(*weight);
  return {weight->as<const float>(), weight->rank == 1 && weight->shape[0] > 1 ? weight->stride[0] : 1};
}

// Of t and gate_up: as many rows, and half the columns or all.
void check_half(T t, T gate_up, Dtype dtype, int64_t columns) {
  TensorView like = gate_up;
  like.shape[like.rank - 1] = columns;
  check_like(t, like, dtype);
}

void forward(Stream stream, T gate_up, const OptionalTensor& weight, T y) {
  check_dtype(gate_up, {Dtype::bf16, Dtype::f32});
  activation::SwigluArguments a;
  a.gate_up = rows_of(gate_up);
  a.weight = weight_of(weight, gate_up);
  check_half(y, gate_up, gate_up.dtype, a.gate_up.columns / 2);
  check_contiguous(y);
  a.y = y.data;
  swiglu(a, stream);
}

void forward_quantize(Stream stream, T gate_up, const OptionalTensor& weight, bool pow2, T q, T scale) {
  check_dtype(gate_up, {Dtype::bf16, Dtype::f32});
  check_rank(gate_up, 2);
  activation::SwigluArguments a;
  a.gate_up = rows_of(gate_up);
  a.weight = weight_of(weight, gate_up);
  check_row_codes(q, scale, a.gate_up.rows, a.gate_up.columns / 2);
  a.q = q.data;
  a.scale = scale.as<float>();
  a.pow2 = pow2;
  swiglu(a, stream);
}

void backward(Stream stream, T dy, T gate_up, const OptionalTensor& weight, T dgate_up, T dweight) {
  check_dtype(gate_up, {Dtype::bf16, Dtype::f32});
  activation::SwigluBackwardArguments a;
  a.gate_up = rows_of(gate_up);
  check_half(dy, gate_up, gate_up.dtype, a.gate_up.columns / 2);
  a.dy = rows_of(dy);
  a.weight = weight_of(weight, gate_up);
  check_like(dgate_up, gate_up, gate_up.dtype);
  check_contiguous(dgate_up);
  a.dgate_up = dgate_up.data;
  check_dtype(dweight, {Dtype::f32, gate_up.dtype});   // empty without a weight
  check_contiguous(dweight);
  if (weight) {
    check_like(dweight, *weight, Dtype::f32);
    a.dweight = dweight.as<float>();
  }
  swiglu_backward(a, stream);
}

struct Casts {
  T q, scale, q_t, scale_t, act_t, act_scale_t, dweight;
};

void backward_quantize(Stream stream, T dy, T gate_up, const OptionalTensor& gate_up_scale, const OptionalTensor& weight,
                       const OptionalTensor& offsets, bool pow2, const Casts& out, const OptionalTensor& padded_offsets,
                       T workspace) {
  check_dtype(dy, {Dtype::bf16});
  check_dtype(gate_up, {Dtype::bf16, Dtype::e4m3});
  check_rank(gate_up, 2);
  activation::SwigluBackwardQuantizeArguments a;
  a.gate_up = rows_of(gate_up);
  const int64_t rows = a.gate_up.rows, columns = a.gate_up.columns, inner = columns / 2;
  check_half(dy, gate_up, Dtype::bf16, inner);
  a.dy = rows_of(dy);
  if (gate_up_scale) {
    check_dtype(*gate_up_scale, {Dtype::f32});
    check_shape(*gate_up_scale, {ceil_div(columns, 128), round_up(rows, 4)});
    check_unit_stride(*gate_up_scale);
    a.gate_up_scale = gate_up_scale->as<const float>();
    a.gate_up_scale_stride = gate_up_scale->shape[0] > 1 ? gate_up_scale->stride[0] : gate_up_scale->shape[1];
  }
  a.weight = weight_of(weight, gate_up);
  if (offsets) {
    check_rank(*offsets, 1);
    require(offsets->shape[0] >= 1, "offsets", "must have one element more than groups", offsets->shape[0]);
    check_dense(*offsets, Dtype::i32, {-1});
    check_dense(*padded_offsets, Dtype::i32, {offsets->shape[0]});
    a.offsets = offsets->as<const int32_t>();
    a.padded_offsets = padded_offsets->as<int32_t>();
    a.groups = offsets->shape[0] - 1;
  }
  check_row_codes(out.q, out.scale, rows, columns);
  check_dense(out.q_t, Dtype::e4m3, {columns, -1});
  a.padded_rows = out.q_t.shape[1];
  check_row_codes(out.q_t, out.scale_t, columns, a.padded_rows);
  check_row_codes(out.act_t, out.act_scale_t, inner, a.padded_rows);
  a.q = out.q.data;
  a.scale = out.scale.as<float>();
  a.q_t = out.q_t.data;
  a.scale_t = out.scale_t.as<float>();
  a.act_t = out.act_t.data;
  a.act_scale_t = out.act_scale_t.as<float>();
  if (weight) {
    check_dense(out.dweight, Dtype::f32, {rows});
    check_dense(workspace, Dtype::f64, {inner / 128, rows});
    a.dweight = out.dweight.as<float>();
    a.workspace = workspace.as<double>();
  }
  a.pow2 = pow2;
  swiglu_backward_quantize(a, stream);
}

}  // namespace

void bind_activation(bindings::Module& to) {
  to.add(kernel("swiglu", +[](Stream s, T gate_up, OptionalTensor weight, T y) { forward(s, gate_up, weight, y); },
                {in("gate_up"), in("weight"), out("y")}));

  to.add(kernel("swiglu_quantize", +[](Stream s, T gate_up, OptionalTensor weight, bool pow2, T q, T scale) {
    forward_quantize(s, gate_up, weight, pow2, q, scale);
  }, {in("gate_up"), in("weight"), scalar("pow2"), out("q"), out("scale")}));

  to.add(kernel("swiglu_backward", +[](Stream s, T dy, T gate_up, OptionalTensor weight, T dgate_up, T dweight) {
    backward(s, dy, gate_up, weight, dgate_up, dweight);
  }, {in("dy"), in("gate_up"), in("weight"), out("dgate_up"), out("dweight")}));

  to.add(kernel("swiglu_backward_quantize",
                +[](Stream s, T dy, T gate_up, OptionalTensor gate_up_scale, OptionalTensor weight, bool pow2, T q, T scale,
                    T q_t, T scale_t, T act_t, T act_scale_t, T dweight, T workspace) {
    backward_quantize(s, dy, gate_up, gate_up_scale, weight, std::nullopt, pow2,
                      {q, scale, q_t, scale_t, act_t, act_scale_t, dweight}, std::nullopt, workspace);
  }, {in("dy"), in("gate_up"), in("gate_up_scale"), in("weight"), scalar("pow2"), out("q"), out("scale"), out("q_t"),
      out("scale_t"), out("act_t"), out("act_scale_t"), out("dweight"), out("workspace")}));

  to.add(kernel("swiglu_backward_quantize_grouped",
                +[](Stream s, T dy, T gate_up, OptionalTensor gate_up_scale, OptionalTensor weight, T offsets, bool pow2,
                    T q, T scale, T q_t, T scale_t, T act_t, T act_scale_t, T dweight, T padded_offsets, T workspace) {
    backward_quantize(s, dy, gate_up, gate_up_scale, weight, offsets, pow2,
                      {q, scale, q_t, scale_t, act_t, act_scale_t, dweight}, padded_offsets, workspace);
  }, {in("dy"), in("gate_up"), in("gate_up_scale"), in("weight"), in("offsets"), scalar("pow2"), out("q"), out("scale"),
      out("q_t"), out("scale_t"), out("act_t"), out("act_scale_t"), out("dweight"), out("padded_offsets"),
      out("workspace")}));
}
