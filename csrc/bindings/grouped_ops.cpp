// Products of grouped rows and of padded batches (deepseek_ops/_gemm_ops.py): csrc/gemm/fp8_gemm_grouped, _masked.
#include "../gemm/fp8_decode.h"
#include "../gemm/fp8_gemm.h"
#include "gemm_arguments.h"

namespace {

using namespace gemm_arguments;

// What both ops have in common; strides, alignment and the knobs are checked by the launchers. `batch`: 1 where A and D
// are one matrix of a batch per group, 0 where all groups share them.
Fp8GroupedGemmArguments arguments(T a, T scale_a, T b, T scale_b, T index, T d, int batch,
                                  const std::string& accumulation, Knobs knobs) {
  check_accumulation(accumulation);
  check_dtype(a, {Dtype::e4m3});
  check_rank(a, 2 + batch);
  const int64_t m = a.shape[batch], k = a.shape[batch + 1];
  check_dtype(b, {Dtype::e4m3});
  check_shape(b, {batch ? a.shape[0] : -1, -1, k});
  const int64_t groups = b.shape[0], n = b.shape[1];
  check_dtype(scale_a, {Dtype::f32});
  check_dtype(scale_b, {Dtype::f32});
  check_shape(scale_b, {groups, blocks(n), blocks(k)});
  check_dtype(index, {Dtype::i32});
  check_shape(index, {groups + 1 - batch});
  check_dtype(d, {Dtype::bf16, Dtype::f32});
  if (batch) {
    check_shape(scale_a, {groups, blocks(k), round_up(m, 4)});
    check_shape(d, {groups, m, n});
  } else {
    check_shape(scale_a, {blocks(k), round_up(m, 4)});
    check_shape(d, {m, n});
  }
  for (const TensorView* t : {&a, &scale_a, &b, &scale_b, &d, &index}) check_unit_stride(*t);

  Fp8GroupedGemmArguments x;
  x.a = a.data;
  x.b = b.data;
  x.m = m;
  x.n = n;
  x.k = k;
  x.groups = narrow("groups", groups);
  x.a_stride = a.stride[batch];
  x.b_stride = b.stride[1];
  x.b_group_stride = b.stride[0];
  x.scale_a = scale_a.as<const float>();
  x.scale_b = scale_b.as<const float>();
  x.scale_a_stride = scale_a.stride[batch];
  x.scale_b_stride = scale_b.stride[1];
  x.scale_b_group_stride = scale_b.stride[0];
  x.d = d.data;
  x.d_stride = d.stride[batch];
  x.d_type = d.dtype == Dtype::bf16 ? OutputType::bf16 : OutputType::fp32;
  if (batch) {
    x.counts = index.as<const int32_t>();
    x.a_group_stride = a.stride[0];
    x.scale_a_group_stride = scale_a.stride[0];
    x.d_group_stride = d.stride[0];
  } else {
    x.offsets = index.as<const int32_t>();
  }
  x.num_sms = narrow("num_sms", knobs.num_sms);
  x.tile = tile_of(knobs);
  return x;
}

void grouped(hopper::Stream stream, T a, T scale_a, T b, T scale_b, T offsets, T d, bool fresh,
             const std::string& accumulation, Knobs knobs) {
  Fp8GroupedGemmArguments x = arguments(a, scale_a, b, scale_b, offsets, d, 0, accumulation, knobs);
  x.clear_rest = fresh;
  fp8_gemm_grouped(x, stream);
}

void masked(hopper::Stream stream, T a, T scale_a, T b, T scale_b, T masked_m, T d, bool fresh,
            const std::string& accumulation, Knobs knobs) {
  Fp8GroupedGemmArguments x = arguments(a, scale_a, b, scale_b, masked_m, d, 1, accumulation, knobs);
  x.clear_rest = fresh;
  // Few rows: the kernel that reads the weights and hardly anything else. The bits are the same.
  if (!x.tile && x.m <= kDecodeRows && x.groups <= kDecodeGroups)
    return fp8_gemm_masked_decode(stream, a, scale_a, b, scale_b, masked_m, d, fresh, {1, knobs.num_sms});
  fp8_gemm_masked(x, stream);
}

}  // namespace

void bind_grouped(bindings::Module& to) {
  using namespace bindings;
  to.add(kernel("fp8_gemm_grouped", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, T offsets, Dtype,
                                        const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                        int64_t tile_columns, T d) {
    grouped(s, a, scale_a, b, scale_b, offsets, d, true, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), in("offsets"), scalar("out_dtype"), scalar("accumulation"),
      scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns"), out("d")}));

  to.add(kernel("fp8_gemm_grouped_", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, T offsets, T out,
                                         const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                         int64_t tile_columns) {
    grouped(s, a, scale_a, b, scale_b, offsets, out, false, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), in("offsets"), in_out("out"), scalar("accumulation"),
      scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns")}));

  to.add(kernel("fp8_gemm_masked", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, T masked_m, Dtype,
                                       const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                       int64_t tile_columns, T d) {
    masked(s, a, scale_a, b, scale_b, masked_m, d, true, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), in("masked_m"), scalar("out_dtype"), scalar("accumulation"),
      scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns"), out("d")}));

  to.add(kernel("fp8_gemm_masked_", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, T masked_m, T out,
                                        const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                        int64_t tile_columns) {
    masked(s, a, scale_a, b, scale_b, masked_m, out, false, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), in("masked_m"), in_out("out"), scalar("accumulation"),
      scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns")}));
}
