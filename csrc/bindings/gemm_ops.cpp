// The GEMM family's ops (deepseek_ops/_gemm_ops.py) and the functions of csrc/gemm that compute them.
#include "../gemm/fp8_gemm.h"
#include "gemm_arguments.h"

namespace {

using namespace gemm_arguments;

// D [+]= A B^T; strides, alignment and the knobs are checked by fp8_gemm itself.
void gemm(hopper::Stream stream, T a, T scale_a, T b, T scale_b, T d, bool accumulate, const std::string& accumulation,
          Knobs knobs) {
  check_accumulation(accumulation);
  check_dtype(a, {Dtype::e4m3});
  check_rank(a, 2);
  const int64_t m = a.shape[0], k = a.shape[1];
  check_dtype(b, {Dtype::e4m3});
  check_shape(b, {-1, k});
  const int64_t n = b.shape[0];
  check_dtype(scale_a, {Dtype::f32});
  check_shape(scale_a, {blocks(k), round_up(m, 4)});
  check_dtype(scale_b, {Dtype::f32});
  check_shape(scale_b, {blocks(n), blocks(k)});
  check_dtype(d, {Dtype::bf16, Dtype::f32});
  check_shape(d, {m, n});
  for (const TensorView* t : {&a, &scale_a, &b, &scale_b, &d}) check_unit_stride(*t);

  Fp8GemmArguments x;
  x.a = a.data;
  x.b = b.data;
  x.m = m;
  x.n = n;
  x.k = k;
  x.a_stride = a.stride[0];
  x.b_stride = b.stride[0];
  x.scale_a = scale_a.as<const float>();
  x.scale_b = scale_b.as<const float>();
  x.scale_a_stride = scale_a.stride[0];
  x.scale_b_stride = scale_b.stride[0];
  x.d = d.data;
  x.d_stride = d.stride[0];
  x.d_type = d.dtype == Dtype::bf16 ? OutputType::bf16 : OutputType::fp32;
  x.accumulate = accumulate;
  x.num_sms = narrow("num_sms", knobs.num_sms);
  x.tile = tile_of(knobs);
  fp8_gemm(x, stream);
}

}  // namespace

void bind_gemm(bindings::Module& to) {
  using namespace bindings;
  to.add(kernel("fp8_gemm", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, Dtype,
                                const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                int64_t tile_columns, T d) {
    gemm(s, a, scale_a, b, scale_b, d, false, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), scalar("out_dtype"), scalar("accumulation"), scalar("num_sms"),
      scalar("tile_rows"), scalar("tile_columns"), out("d")}));

  to.add(kernel("fp8_gemm_", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, T out, bool accumulate,
                                 const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                 int64_t tile_columns) {
    gemm(s, a, scale_a, b, scale_b, out, accumulate, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), in_out("out"), scalar("accumulate"), scalar("accumulation"),
      scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns")}));
}
