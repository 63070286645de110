// The ops of bf16 GEMM (deepseek_ops/_gemm_ops.py) and csrc/gemm/bf16_gemm that computes them.
#include "../gemm/bf16_gemm.h"
#include "gemm_arguments.h"

namespace {

using namespace gemm_arguments;

void check_operand(T x, int rank) {
  if (x.dtype != Dtype::bf16)
    fail(x.name, "must be bfloat16, which kernels multiply (deepseek_ops.backend(\"reference\") takes float32 and float64)",
         name_of(x.dtype));
  check_rank(x, rank);
}

// The last two dimensions as rows and K (or K and rows), a dimension before them as matrices.
Bf16Operand operand(T x, bool k_first) {
  const int last = x.rank - 1, row = k_first ? last : last - 1, k = k_first ? last - 1 : last;
  Bf16Operand y{x.data, x.shape[row], x.stride[row], x.stride[k]};
  if (x.rank == 3) y.matrices = x.shape[0], y.matrix_stride = x.stride[0];
  return y;
}

// D [+]= the product; strides, alignment and the knobs are checked by bf16_gemm itself.
void run(hopper::Stream stream, Bf16GemmArguments x, T d, Knobs knobs) {
  check_dtype(d, {Dtype::bf16, Dtype::f32});
  if (d.rank == 2) check_shape(d, {x.a.rows, x.b.rows});
  else check_shape(d, {x.groups, x.a.rows, x.b.rows});
  check_unit_stride(d);
  x.d = d.data;
  x.d_type = d.dtype;
  x.d_stride = d.stride[d.rank - 2];
  if (d.rank == 3) x.d_matrix_stride = d.stride[0];
  x.num_sms = narrow("num_sms", knobs.num_sms);
  x.tile = tile_of(knobs);
  bf16_gemm(x, stream);
}

// Operands [rows, K] (gemm) or [K, rows] (wgrad).
Bf16GemmArguments dense(T a, T b, bool k_first) {
  check_operand(a, 2);
  check_operand(b, 2);
  const int64_t k = a.shape[k_first ? 0 : 1];
  k_first ? check_shape(b, {k, -1}) : check_shape(b, {-1, k});
  return {.a = operand(a, k_first), .b = operand(b, k_first), .k = k};
}

void set_index(Bf16GemmArguments& x, Grouping grouping, T index, int64_t entries, int64_t groups) {
  check_dtype(index, {Dtype::i32});
  check_shape(index, {entries});
  check_contiguous(index);
  x.grouping = grouping;
  x.index = index.as<const int32_t>();
  x.groups = groups;
}

Bf16GemmArguments rows_by_offsets(T a, T b, T offsets) {
  check_operand(a, 2);
  check_operand(b, 3);
  check_shape(b, {-1, -1, a.shape[1]});
  Bf16GemmArguments x{.a = operand(a, false), .b = operand(b, false), .k = a.shape[1]};
  set_index(x, Grouping::rows_by_offsets, offsets, b.shape[0] + 1, b.shape[0]);
  return x;
}

// Batches [G, rows, K] of which the first masked_m[g] rows exist, or [G, K, rows] with so many of K.
Bf16GemmArguments by_mask(T a, T b, T masked_m, bool k_first) {
  check_operand(a, 3);
  check_operand(b, 3);
  const int64_t groups = a.shape[0], k = a.shape[k_first ? 1 : 2];
  k_first ? check_shape(b, {groups, k, -1}) : check_shape(b, {groups, -1, k});
  Bf16GemmArguments x{.a = operand(a, k_first), .b = operand(b, k_first), .k = k};
  set_index(x, k_first ? Grouping::k_by_mask : Grouping::rows_by_mask, masked_m, groups, groups);
  return x;
}

Bf16GemmArguments k_by_offsets(T a, T b, T offsets) {
  Bf16GemmArguments x = dense(a, b, true);
  check_rank(offsets, 1);
  require(offsets.shape[0] >= 1, "offsets", "must hold at least one entry (G + 1)", shape_text(offsets));
  set_index(x, Grouping::k_by_offsets, offsets, offsets.shape[0], offsets.shape[0] - 1);
  return x;
}

Bf16GemmArguments clearing(Bf16GemmArguments x) {
  x.clear_rest = true;
  return x;
}
Bf16GemmArguments accumulating(Bf16GemmArguments x, bool accumulate) {
  x.accumulate = accumulate;
  return x;
}

}  // namespace

void bind_bf16_gemm(bindings::Module& to) {
  using namespace bindings;
  using hopper::Stream;
  using Parameters = std::vector<Parameter>;
  const auto knobs = [](Parameters head, bool fresh) {
    for (const char* name : {"num_sms", "tile_rows", "tile_columns"}) head.push_back(scalar(name));
    if (fresh) head.push_back(out("d"));
    return head;
  };
  const auto fresh = [&](bool indexed, const char* index) {
    return indexed ? knobs({in("a"), in("b"), in(index), scalar("out_dtype")}, true)
                   : knobs({in("a"), in("b"), scalar("out_dtype")}, true);
  };

  to.add(kernel("gemm", +[](Stream s, T a, T b, Dtype, int64_t sms, int64_t rows, int64_t columns, T d) {
    run(s, dense(a, b, false), d, {sms, rows, columns});
  }, fresh(false, "")));
  to.add(kernel("gemm_", +[](Stream s, T a, T b, T d, bool accumulate, int64_t sms, int64_t rows, int64_t columns) {
    run(s, accumulating(dense(a, b, false), accumulate), d, {sms, rows, columns});
  }, knobs({in("a"), in("b"), in_out("out"), scalar("accumulate")}, false)));

  to.add(kernel("gemm_grouped",
                +[](Stream s, T a, T b, T offsets, Dtype, int64_t sms, int64_t rows, int64_t columns, T d) {
    run(s, clearing(rows_by_offsets(a, b, offsets)), d, {sms, rows, columns});
  }, fresh(true, "offsets")));
  to.add(kernel("gemm_grouped_", +[](Stream s, T a, T b, T offsets, T d, int64_t sms, int64_t rows, int64_t columns) {
    run(s, rows_by_offsets(a, b, offsets), d, {sms, rows, columns});
  }, knobs({in("a"), in("b"), in("offsets"), in_out("out")}, false)));

  to.add(kernel("gemm_masked",
                +[](Stream s, T a, T b, T masked_m, Dtype, int64_t sms, int64_t rows, int64_t columns, T d) {
    run(s, clearing(by_mask(a, b, masked_m, false)), d, {sms, rows, columns});
  }, fresh(true, "masked_m")));
  to.add(kernel("gemm_masked_", +[](Stream s, T a, T b, T masked_m, T d, int64_t sms, int64_t rows, int64_t columns) {
    run(s, by_mask(a, b, masked_m, false), d, {sms, rows, columns});
  }, knobs({in("a"), in("b"), in("masked_m"), in_out("out")}, false)));

  to.add(kernel("wgrad", +[](Stream s, T a, T b, Dtype, int64_t sms, int64_t rows, int64_t columns, T d) {
    run(s, dense(a, b, true), d, {sms, rows, columns});
  }, fresh(false, "")));
  to.add(kernel("wgrad_", +[](Stream s, T a, T b, T d, bool accumulate, int64_t sms, int64_t rows, int64_t columns) {
    run(s, accumulating(dense(a, b, true), accumulate), d, {sms, rows, columns});
  }, knobs({in("a"), in("b"), in_out("out"), scalar("accumulate")}, false)));

  to.add(kernel("wgrad_grouped",
                +[](Stream s, T a, T b, T offsets, Dtype, int64_t sms, int64_t rows, int64_t columns, T d) {
    run(s, k_by_offsets(a, b, offsets), d, {sms, rows, columns});
  }, fresh(true, "offsets")));
  to.add(kernel("wgrad_grouped_", +[](Stream s, T a, T b, T offsets, T d, bool accumulate, int64_t sms, int64_t rows,
                                      int64_t columns) {
    run(s, accumulating(k_by_offsets(a, b, offsets), accumulate), d, {sms, rows, columns});
  }, knobs({in("a"), in("b"), in("offsets"), in_out("out"), scalar("accumulate")}, false)));

  to.add(kernel("wgrad_masked",
                +[](Stream s, T a, T b, T masked_m, Dtype, int64_t sms, int64_t rows, int64_t columns, T d) {
    run(s, by_mask(a, b, masked_m, true), d, {sms, rows, columns});
  }, fresh(true, "masked_m")));
}
