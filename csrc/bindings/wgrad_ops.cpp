// The ops fp8_wgrad and fp8_wgrad_grouped (deepseek_ops/_gemm_ops.py) on csrc/gemm/fp8_wgrad.
#include "../gemm/fp8_wgrad.h"
#include "gemm_arguments.h"

namespace {

using namespace gemm_arguments;

// d [m, n], or [groups, m, n] with offsets. Strides, alignment and the knobs are checked by fp8_wgrad itself.
void wgrad(hopper::Stream stream, T a_t, T scale_a, T b_t, T scale_b, const TensorView* offsets, T d, bool accumulate,
           const std::string& accumulation, Knobs knobs) {
  check_accumulation(accumulation);
  check_dtype(a_t, {Dtype::e4m3});
  check_rank(a_t, 2);
  const int64_t m = a_t.shape[0], tokens = a_t.shape[1], slices = ceil_div(tokens, 128);
  check_dtype(b_t, {Dtype::e4m3});
  check_shape(b_t, {-1, tokens});
  const int64_t n = b_t.shape[0];
  check_dtype(scale_a, {Dtype::f32});
  check_shape(scale_a, {slices, round_up(m, 4)});
  check_dtype(scale_b, {Dtype::f32});
  check_shape(scale_b, {slices, round_up(n, 4)});
  check_dtype(d, {Dtype::bf16, Dtype::f32});

  Fp8WgradArguments x;
  if (offsets) {
    check_dtype(*offsets, {Dtype::i32});
    check_rank(*offsets, 1);
    require(offsets->shape[0] >= 1, offsets->name, "must have one element more than groups", offsets->shape[0]);
    check_contiguous(*offsets);
    x.offsets = offsets->as<const int32_t>();
    x.groups = offsets->shape[0] - 1;
    check_shape(d, {x.groups, m, n});
    x.d_group_stride = d.stride[0];
  } else {
    check_shape(d, {m, n});
  }
  for (const TensorView* t : {&a_t, &scale_a, &b_t, &scale_b, &d}) check_unit_stride(*t);

  x.a = a_t.data;
  x.b = b_t.data;
  x.m = m;
  x.n = n;
  x.tokens = tokens;
  x.a_stride = a_t.stride[0];
  x.b_stride = b_t.stride[0];
  x.scale_a = scale_a.as<const float>();
  x.scale_b = scale_b.as<const float>();
  x.scale_a_stride = scale_a.stride[0];
  x.scale_b_stride = scale_b.stride[0];
  x.d = d.data;
  x.d_stride = d.stride[d.rank - 2];
  x.d_type = d.dtype == Dtype::bf16 ? OutputType::bf16 : OutputType::fp32;
  x.accumulate = accumulate;
  x.num_sms = narrow("num_sms", knobs.num_sms);
  x.tile = tile_of(knobs);
  fp8_wgrad(x, stream);
}

}  // namespace

void bind_wgrad(bindings::Module& to) {
  using namespace bindings;
  to.add(kernel("fp8_wgrad", +[](hopper::Stream s, T a_t, T scale_a, T b_t, T scale_b, Dtype,
                                 const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                 int64_t tile_columns, T d) {
    wgrad(s, a_t, scale_a, b_t, scale_b, nullptr, d, false, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a_t"), in("scale_a"), in("b_t"), in("scale_b"), scalar("out_dtype"), scalar("accumulation"),
      scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns"), out("d")}));

  to.add(kernel("fp8_wgrad_", +[](hopper::Stream s, T a_t, T scale_a, T b_t, T scale_b, T out, bool accumulate,
                                  const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                  int64_t tile_columns) {
    wgrad(s, a_t, scale_a, b_t, scale_b, nullptr, out, accumulate, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a_t"), in("scale_a"), in("b_t"), in("scale_b"), in_out("out"), scalar("accumulate"), scalar("accumulation"),
      scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns")}));

  to.add(kernel("fp8_wgrad_grouped", +[](hopper::Stream s, T a_t, T scale_a, T b_t, T scale_b, T offsets, Dtype,
                                         const std::string& accumulation, int64_t num_sms, int64_t tile_rows,
                                         int64_t tile_columns, T d) {
    wgrad(s, a_t, scale_a, b_t, scale_b, &offsets, d, false, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a_t"), in("scale_a"), in("b_t"), in("scale_b"), in("offsets"), scalar("out_dtype"), scalar("accumulation"),
      scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns"), out("d")}));

  to.add(kernel("fp8_wgrad_grouped_", +[](hopper::Stream s, T a_t, T scale_a, T b_t, T scale_b, T offsets, T out,
                                          bool accumulate, const std::string& accumulation, int64_t num_sms,
                                          int64_t tile_rows, int64_t tile_columns) {
    wgrad(s, a_t, scale_a, b_t, scale_b, &offsets, out, accumulate, accumulation, {num_sms, tile_rows, tile_columns});
  }, {in("a_t"), in("scale_a"), in("b_t"), in("scale_b"), in("offsets"), in_out("out"), scalar("accumulate"),
      scalar("accumulation"), scalar("num_sms"), scalar("tile_rows"), scalar("tile_columns")}));
}
