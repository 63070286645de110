// The quantisers on tensors, one function for each op of deepseek_ops/quantize.py, its outputs as arguments: what the
// Python module binds. Shapes, types and devices are checked here, everything about memory by the launchers.
#include "bind_quantize.h"

#include "../common/checks.h"
#include "quantize.h"

namespace quantize {
namespace {

Matrix matrix_of(const TensorView& x) {
  const int r = x.rank - 2, c = x.rank - 1;
  const Type type = x.dtype == Dtype::e4m3 ? Type::e4m3 : x.dtype == Dtype::bf16 ? Type::bf16 : Type::fp32;
  return {x.data, type, x.shape[r], x.shape[c], x.stride[r], x.stride[c]};
}

void check_result(const TensorView& out, Dtype dtype, std::initializer_list<int64_t> shape, const TensorView& first) {
  check_dtype(out, {dtype});
  check_shape(out, shape);
  check_contiguous(out);
  check_same_device(out, first);
}

// GEMM-ready scales of [rows, length].
void check_row_scale(const TensorView& scale, int64_t rows, int64_t length, const TensorView& first) {
  check_result(scale, Dtype::f32, {ceil_div(length, 128), round_up(rows, 4)}, first);
}

// Codes and block scales of [batch,] rows x columns.
void check_blocks(const TensorView& q, const TensorView& scale, const TensorView& like, bool transposed) {
  const int64_t r = like.shape[like.rank - (transposed ? 1 : 2)], c = like.shape[like.rank - (transposed ? 2 : 1)];
  if (like.rank == 2) {
    check_result(q, Dtype::e4m3, {r, c}, like);
    check_result(scale, Dtype::f32, {ceil_div(r, 128), ceil_div(c, 128)}, like);
  } else {
    check_result(q, Dtype::e4m3, {like.shape[0], r, c}, like);
    check_result(scale, Dtype::f32, {like.shape[0], ceil_div(r, 128), ceil_div(c, 128)}, like);
  }
}

void check_two_or_three(const TensorView& x) {
  if (x.rank != 2 && x.rank != 3) fail(x.name, "must have 2 or 3 dimensions", shape_text(x));
}

ColumnsArguments columns_of(const TensorView& x, const Matrix& matrix, const OptionalTensor& offsets, const TensorView& q_t,
                            const TensorView& scale_t, const OptionalTensor& padded_offsets) {
  check_rank(q_t, 2);
  ColumnsArguments a;
  a.x = matrix;
  a.padded_rows = q_t.shape[1];
  check_result(q_t, Dtype::e4m3, {matrix.columns, -1}, x);
  check_row_scale(scale_t, matrix.columns, a.padded_rows, x);
  if (offsets) {
    check_rank(*offsets, 1);
    const int64_t count = offsets->shape[0];
    require(count >= 1, offsets->name, "must have one element more than groups", count);
    check_result(*offsets, Dtype::i32, {count}, x);
    require(padded_offsets.has_value(), "padded_offsets", "must be given with offsets", "None");
    check_result(*padded_offsets, Dtype::i32, {count}, x);
    a.offsets = offsets->as<const int32_t>();
    a.padded_offsets = padded_offsets->as<int32_t>();
    a.groups = count - 1;
  }
  a.q_t = q_t.data;
  a.scale_t = scale_t.as<float>();
  return a;
}

ColumnsArguments columns_of(const TensorView& x, const OptionalTensor& offsets, const TensorView& q_t,
                            const TensorView& scale_t, const OptionalTensor& padded_offsets) {
  check_rank(x, 2);
  return columns_of(x, matrix_of(x), offsets, q_t, scale_t, padded_offsets);
}

// GEMM-ready scales of the caller: rows of any stride.
void check_given_scale(const TensorView& scale, int64_t rows, int64_t length, const TensorView& first) {
  check_dtype(scale, {Dtype::f32});
  check_shape(scale, {ceil_div(length, 128), round_up(rows, 4)});
  check_unit_stride(scale);
  check_same_device(scale, first);
}

Type value_type(const TensorView& out, bool with_fp64) {
  if (with_fp64) check_dtype(out, {Dtype::bf16, Dtype::f32, Dtype::f64});
  else check_dtype(out, {Dtype::bf16, Dtype::f32});
  check_contiguous(out);
  return out.dtype == Dtype::bf16 ? Type::bf16 : out.dtype == Dtype::f32 ? Type::fp32 : Type::fp64;
}

// [tokens, packed bytes of `hidden`].
void check_packed(const TensorView& packed, int64_t hidden) {
  require(hidden >= 0, "hidden", "must not be negative", hidden);
  check_dtype(packed, {Dtype::u8});
  check_shape(packed, {-1, packed_bytes(hidden)});
  check_contiguous(packed);
  check_aligned(packed, 4);
}

bool whole_rows(const std::string& granularity) {
  require(granularity == "tile" || granularity == "row", "granularity", "must be tile or row", granularity);
  return granularity == "row";
}

}  // namespace

void bind_1x128(const TensorView& x, const TensorView& q, const TensorView& scale, bool pow2, bool official_clamp,
                hopper::Stream stream) {
  check_dtype(x, {Dtype::bf16, Dtype::f32});
  check_rank(x, 2);
  check_result(q, Dtype::e4m3, {x.shape[0], x.shape[1]}, x);
  check_row_scale(scale, x.shape[0], x.shape[1], x);
  RowsArguments a;
  a.x = matrix_of(x);
  a.q = q.data;
  a.scale = scale.as<float>();
  a.pow2 = pow2;
  a.official_clamp = official_clamp;
  quantize_1x128(a, stream);
}

void bind_128x1(const TensorView& x, const OptionalTensor& offsets, const TensorView& q_t, const TensorView& scale_t,
                const OptionalTensor& padded_offsets, bool pow2, hopper::Stream stream) {
  check_dtype(x, {Dtype::bf16, Dtype::f32});
  ColumnsArguments a = columns_of(x, offsets, q_t, scale_t, padded_offsets);
  a.pow2 = pow2;
  quantize_128x1(a, stream);
}

void bind_1x128_128x1(const TensorView& x, const OptionalTensor& offsets, const TensorView& q, const TensorView& scale,
                      const TensorView& q_t, const TensorView& scale_t, const OptionalTensor& padded_offsets, bool pow2,
                      hopper::Stream stream) {
  check_dtype(x, {Dtype::bf16, Dtype::f32});
  ColumnsArguments a = columns_of(x, offsets, q_t, scale_t, padded_offsets);
  check_result(q, Dtype::e4m3, {x.shape[0], x.shape[1]}, x);
  check_row_scale(scale, x.shape[0], x.shape[1], x);
  if (x.numel() > 0) a.q = q.data, a.scale = scale.as<float>();
  a.pow2 = pow2;
  quantize_128x1(a, stream);
}

void bind_requantize_128x1(const TensorView& q, const TensorView& scale, const OptionalTensor& offsets,
                           const TensorView& q_t, const TensorView& scale_t, const OptionalTensor& padded_offsets,
                           hopper::Stream stream) {
  check_dtype(q, {Dtype::e4m3});
  ColumnsArguments a = columns_of(q, offsets, q_t, scale_t, padded_offsets);
  check_given_scale(scale, q.shape[0], q.shape[1], q);
  a.x_scale = scale.as<const float>();
  a.x_scale_stride = scale.stride[0];
  a.pow2 = true;
  quantize_128x1(a, stream);
}

void bind_128x128(const TensorView& w, const TensorView& q, const TensorView& scale, const OptionalTensor& q_t,
                  const OptionalTensor& scale_t, bool pow2, hopper::Stream stream) {
  check_dtype(w, {Dtype::bf16, Dtype::f32});
  check_two_or_three(w);
  check_blocks(q, scale, w, false);
  BlocksArguments a;
  a.w = matrix_of(w);
  if (w.rank == 3) a.batch = w.shape[0], a.batch_stride = w.stride[0];
  a.q = q.data;
  a.scale = scale.as<float>();
  if (q_t && scale_t) {
    check_blocks(*q_t, *scale_t, w, true);
    a.q_t = q_t->data;
    a.scale_t = scale_t->as<float>();
  }
  a.pow2 = pow2;
  quantize_128x128(a, stream);
}

void bind_transpose_128x128(const TensorView& q, const TensorView& scale, const TensorView& q_t,
                            const TensorView& scale_t, hopper::Stream stream) {
  check_dtype(q, {Dtype::e4m3});
  check_two_or_three(q);
  check_blocks(q_t, scale_t, q, true);
  check_dtype(scale, {Dtype::f32});
  check_rank(scale, q.rank);
  check_same_device(scale, q);
  const int r = q.rank - 2, c = q.rank - 1;
  const bool fits = (q.rank == 2 || scale.shape[0] == q.shape[0]) && scale.shape[r] == ceil_div(q.shape[r], 128) &&
                    scale.shape[c] == ceil_div(q.shape[c], 128);
  require(fits, scale.name, "must have one element for each 128 x 128 block of q", shape_text(scale));
  TransposeArguments a;
  a.q = matrix_of(q);
  if (q.rank == 3) a.batch = q.shape[0], a.batch_stride = q.stride[0], a.scale_strides[0] = scale.stride[0];
  a.scale = scale.as<const float>();
  a.scale_strides[1] = scale.stride[r];
  a.scale_strides[2] = scale.stride[c];
  a.q_t = q_t.data;
  a.scale_t = scale_t.as<float>();
  transpose_128x128(a, stream);
}

void bind_pack_e5m6(const TensorView& x, const TensorView& packed, const TensorView& scale, const std::string& granularity,
                    hopper::Stream stream) {
  check_dtype(x, {Dtype::bf16, Dtype::f32});
  check_rank(x, 2);
  PackArguments a;
  a.x = matrix_of(x);
  a.whole_rows = whole_rows(granularity);
  check_result(packed, Dtype::u8, {x.shape[0], packed_bytes(x.shape[1])}, x);
  if (a.whole_rows) check_result(scale, Dtype::f32, {x.shape[0]}, x);
  else check_row_scale(scale, x.shape[0], x.shape[1], x);
  a.packed = packed.data;
  a.scale = scale.as<float>();
  pack_e5m6(a, stream);
}

void bind_unpack_e5m6(const TensorView& packed, const TensorView& scale, int64_t hidden, const std::string& granularity,
                      const TensorView& out, hopper::Stream stream) {
  check_packed(packed, hidden);
  UnpackArguments a;
  a.packed = packed.data;
  a.rows = packed.shape[0];
  a.columns = hidden;
  if (whole_rows(granularity)) {
    check_dtype(scale, {Dtype::f32});
    check_shape(scale, {a.rows});
    a.scale_row_stride = scale.stride[0];
  } else {
    check_given_scale(scale, a.rows, hidden, packed);
    a.scale_tile_stride = scale.stride[0];
  }
  a.scale = scale.as<const float>();
  check_shape(out, {a.rows, hidden});
  a.out = out.data;
  a.out_type = value_type(out, false);
  unpack_e5m6(a, stream);
}

void bind_requantize_e5m6_128x1(const TensorView& packed, const TensorView& scale, int64_t hidden, const OptionalTensor& offsets,
                                const TensorView& q_t, const TensorView& scale_t, const OptionalTensor& padded_offsets,
                                hopper::Stream stream) {
  check_packed(packed, hidden);
  const Matrix x{packed.data, Type::e5m6, packed.shape[0], hidden, packed.shape[1], 1};
  ColumnsArguments a = columns_of(packed, x, offsets, q_t, scale_t, padded_offsets);
  check_given_scale(scale, x.rows, hidden, packed);
  a.x_scale = scale.as<const float>();
  a.x_scale_stride = scale.stride[0];
  a.pow2 = true;
  quantize_128x1(a, stream);
}

void bind_dequantize_1x128(const TensorView& q, const TensorView& scale, const TensorView& out, hopper::Stream stream) {
  check_dtype(q, {Dtype::e4m3});
  check_rank(q, 2);
  check_contiguous(q);
  check_given_scale(scale, q.shape[0], q.shape[1], q);
  check_shape(out, {q.shape[0], q.shape[1]});
  DequantizeArguments a;
  a.q = q.data;
  a.scale = scale.as<const float>();
  a.rows = q.shape[0], a.columns = q.shape[1];
  a.scale_stride = scale.stride[0];
  a.out = out.data;
  a.out_type = value_type(out, true);
  dequantize_1x128(a, stream);
}

void bind_dequantize_128x1(const TensorView& q_t, const TensorView& scale, int64_t tokens, const TensorView& out,
                           hopper::Stream stream) {
  check_dtype(q_t, {Dtype::e4m3});
  check_rank(q_t, 2);
  check_contiguous(q_t);
  check_given_scale(scale, q_t.shape[0], q_t.shape[1], q_t);
  check_shape(out, {tokens, q_t.shape[0]});
  DequantizeArguments a;
  a.q = q_t.data;
  a.scale = scale.as<const float>();
  a.rows = tokens, a.columns = q_t.shape[0];
  a.scale_stride = scale.stride[0];
  a.out = out.data;
  a.out_type = value_type(out, true);
  dequantize_128x1(a, q_t.shape[1], stream);
}

void bind_dequantize_128x128(const TensorView& q, const TensorView& scale, const TensorView& out, hopper::Stream stream) {
  check_dtype(q, {Dtype::e4m3});
  check_two_or_three(q);
  check_contiguous(q);
  const int r = q.rank - 2;
  DequantizeArguments a;
  a.batch = q.rank == 3 ? q.shape[0] : 1;
  a.rows = q.shape[r], a.columns = q.shape[r + 1];
  if (q.rank == 3) {
    check_result(scale, Dtype::f32, {a.batch, ceil_div(a.rows, 128), ceil_div(a.columns, 128)}, q);
    check_shape(out, {a.batch, a.rows, a.columns});
  } else {
    check_result(scale, Dtype::f32, {ceil_div(a.rows, 128), ceil_div(a.columns, 128)}, q);
    check_shape(out, {a.rows, a.columns});
  }
  a.q = q.data;
  a.scale = scale.as<const float>();
  a.out = out.data;
  a.out_type = value_type(out, true);
  dequantize_128x128(a, stream);
}

}  // namespace quantize
