// The ops of FP8 decoding (deepseek_ops/_gemm_decode_ops.py) and the functions of csrc/gemm that compute them.
#include "../gemm/fp8_decode.h"
#include "kernels.h"

namespace {

using T = const TensorView&;

}  // namespace

void bind_decode(bindings::Module& to) {
  using namespace bindings;
  to.add(kernel("fp8_gemm_decode", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, Dtype, int64_t split_k,
                                       int64_t num_sms, bool prefetch_weights, T d) {
    fp8_gemm_decode(s, a, scale_a, b, scale_b, d, {split_k, num_sms, prefetch_weights});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), scalar("out_dtype"), scalar("split_k"), scalar("num_sms"),
      scalar("prefetch_weights"), out("d")}));

  to.add(kernel("fp8_gemm_decode_", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, T out, int64_t split_k,
                                        int64_t num_sms, bool prefetch_weights) {
    fp8_gemm_decode(s, a, scale_a, b, scale_b, out, {split_k, num_sms, prefetch_weights});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), in_out("out"), scalar("split_k"), scalar("num_sms"),
      scalar("prefetch_weights")}));

  to.add(kernel("fp8_gemm_masked_decode", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, T masked_m, Dtype,
                                              int64_t num_sms, T d) {
    fp8_gemm_masked_decode(s, a, scale_a, b, scale_b, masked_m, d, true, {1, num_sms});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), in("masked_m"), scalar("out_dtype"), scalar("num_sms"), out("d")}));

  to.add(kernel("fp8_gemm_masked_decode_", +[](hopper::Stream s, T a, T scale_a, T b, T scale_b, T masked_m, T out,
                                               int64_t num_sms) {
    fp8_gemm_masked_decode(s, a, scale_a, b, scale_b, masked_m, out, false, {1, num_sms});
  }, {in("a"), in("scale_a"), in("b"), in("scale_b"), in("masked_m"), in_out("out"), scalar("num_sms")}));
}
