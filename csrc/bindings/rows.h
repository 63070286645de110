// Tensors [..., columns] as matrices, for ops that work row by row.
#pragma once

#include "../common/checks.h"
#include "../quantize/quantize.h"

namespace bindings {

// The leading dimensions must lie as one would: deepseek_ops/_native_ops.py copies tensors that do not.
inline quantize::Matrix rows_of(const TensorView& x) {
  if (x.rank < 1) fail(x.name, "must have at least 1 dimension", shape_text(x));
  const int last = x.rank - 1;
  const quantize::Type type = x.dtype == Dtype::e4m3   ? quantize::Type::e4m3
                              : x.dtype == Dtype::bf16 ? quantize::Type::bf16
                                                       : quantize::Type::fp32;
  quantize::Matrix m{x.data, type, 1, x.shape[last], x.shape[last], x.stride[last]};
  bool first = true;
  for (int i = last - 1; i >= 0; --i) {
    const int64_t rows = m.rows;
    m.rows *= x.shape[i];
    if (x.shape[i] == 1 || m.rows == 0) continue;
    if (first) m.row_stride = x.stride[i];
    else if (x.numel() > 0 && x.stride[i] != rows * m.row_stride)
      fail(x.name, "must lie like one matrix of rows (use .contiguous())", stride_text(x));
    first = false;
  }
  return m;
}

inline void check_like(const TensorView& t, const TensorView& like, Dtype dtype) {
  check_dtype(t, {dtype});
  bool same = t.rank == like.rank;
  for (int i = 0; same && i < t.rank; ++i) same = t.shape[i] == like.shape[i];
  if (!same) fail(t.name, "must have shape " + text_of(like.shape, like.rank) + " as " + like.name, shape_text(t));
}

inline void check_dense(const TensorView& t, Dtype dtype, std::initializer_list<int64_t> shape) {
  check_dtype(t, {dtype});
  check_shape(t, shape);
  check_contiguous(t);
}

// 1 x 128 codes and GEMM-ready scales of [rows, columns].
inline void check_row_codes(const TensorView& q, const TensorView& scale, int64_t rows, int64_t columns) {
  check_dense(q, Dtype::e4m3, {rows, columns});
  check_dense(scale, Dtype::f32, {ceil_div(columns, 128), round_up(rows, 4)});
}

}  // namespace bindings
