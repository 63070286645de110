// The quantisers' ops (deepseek_ops/quantize.py) and the functions of csrc/quantize that compute them.
#include "../quantize/bind_quantize.h"
#include "kernels.h"

namespace {

using T = const TensorView&;
using hopper::Stream;

}  // namespace

void bind_quantize(bindings::Module& to) {
  using namespace bindings;
  using namespace quantize;
  to.add(kernel("quantize_1x128", +[](Stream s, T x, bool pow2, bool official_clamp, T q, T scale) {
    bind_1x128(x, q, scale, pow2, official_clamp, s);
  }, {in("x"), scalar("pow2"), scalar("official_clamp"), out("q"), out("scale")}));

  to.add(kernel("quantize_128x1", +[](Stream s, T x, bool pow2, T q_t, T scale) {
    bind_128x1(x, std::nullopt, q_t, scale, std::nullopt, pow2, s);
  }, {in("x"), scalar("pow2"), out("q_t"), out("scale")}));

  to.add(kernel("quantize_128x1_grouped", +[](Stream s, T x, T offsets, bool pow2, T q_t, T scale, T padded_offsets) {
    bind_128x1(x, offsets, q_t, scale, padded_offsets, pow2, s);
  }, {in("x"), in("offsets"), scalar("pow2"), out("q_t"), out("scale"), out("padded_offsets")}));

  to.add(kernel("quantize_1x128_128x1", +[](Stream s, T x, bool pow2, T q, T scale, T q_t, T scale_t) {
    bind_1x128_128x1(x, std::nullopt, q, scale, q_t, scale_t, std::nullopt, pow2, s);
  }, {in("x"), scalar("pow2"), out("q"), out("scale"), out("q_t"), out("scale_t")}));

  to.add(kernel("quantize_1x128_128x1_grouped",
                +[](Stream s, T x, T offsets, bool pow2, T q, T scale, T q_t, T scale_t, T padded_offsets) {
    bind_1x128_128x1(x, offsets, q, scale, q_t, scale_t, padded_offsets, pow2, s);
  }, {in("x"), in("offsets"), scalar("pow2"), out("q"), out("scale"), out("q_t"), out("scale_t"), out("padded_offsets")}));

  to.add(kernel("quantize_128x128", +[](Stream s, T w, bool pow2, T q, T scale) {
    bind_128x128(w, q, scale, std::nullopt, std::nullopt, pow2, s);
  }, {in("w"), scalar("pow2"), out("q"), out("scale")}));

  to.add(kernel("transpose_128x128", +[](Stream s, T q, T scale, T q_t, T scale_t) {
    bind_transpose_128x128(q, scale, q_t, scale_t, s);
  }, {in("q"), in("scale"), out("q_t"), out("scale_t")}));

  to.add(kernel("requantize_128x1", +[](Stream s, T q, T scale, T q_t, T scale_t) {
    bind_requantize_128x1(q, scale, std::nullopt, q_t, scale_t, std::nullopt, s);
  }, {in("q"), in("scale"), out("q_t"), out("scale_t")}));

  to.add(kernel("requantize_128x1_grouped", +[](Stream s, T q, T scale, T offsets, T q_t, T scale_t, T padded_offsets) {
    bind_requantize_128x1(q, scale, offsets, q_t, scale_t, padded_offsets, s);
  }, {in("q"), in("scale"), in("offsets"), out("q_t"), out("scale_t"), out("padded_offsets")}));

  to.add(kernel("pack_e5m6", +[](Stream s, T x, const std::string& granularity, T packed, T scale) {
    bind_pack_e5m6(x, packed, scale, granularity, s);
  }, {in("x"), scalar("granularity"), out("packed"), out("scale")}));

  to.add(kernel("unpack_e5m6", +[](Stream s, T packed, T scale, int64_t hidden, const std::string& granularity, Dtype, T x) {
    bind_unpack_e5m6(packed, scale, hidden, granularity, x, s);
  }, {in("packed"), in("scale"), scalar("hidden"), scalar("granularity"), scalar("dtype"), out("x")}));

  to.add(kernel("requantize_e5m6_128x1", +[](Stream s, T packed, T scale, int64_t hidden, T q_t, T scale_t) {
    bind_requantize_e5m6_128x1(packed, scale, hidden, std::nullopt, q_t, scale_t, std::nullopt, s);
  }, {in("packed"), in("scale"), scalar("hidden"), out("q_t"), out("scale_t")}));

  to.add(kernel("requantize_e5m6_128x1_grouped",
                +[](Stream s, T packed, T scale, int64_t hidden, T offsets, T q_t, T scale_t, T padded_offsets) {
    bind_requantize_e5m6_128x1(packed, scale, hidden, offsets, q_t, scale_t, padded_offsets, s);
  }, {in("packed"), in("scale"), scalar("hidden"), in("offsets"), out("q_t"), out("scale_t"), out("padded_offsets")}));

  to.add(kernel("dequantize_1x128", +[](Stream s, T q, T scale, Dtype, T x) { bind_dequantize_1x128(q, scale, x, s); },
                {in("q"), in("scale"), scalar("dtype"), out("x")}));

  to.add(kernel("dequantize_128x1", +[](Stream s, T q_t, T scale, int64_t tokens, Dtype, T x) {
    bind_dequantize_128x1(q_t, scale, tokens, x, s);
  }, {in("q_t"), in("scale"), scalar("tokens"), scalar("dtype"), out("x")}));

  to.add(kernel("dequantize_128x128", +[](Stream s, T q, T scale, Dtype, T w) { bind_dequantize_128x128(q, scale, w, s); },
                {in("q"), in("scale"), scalar("dtype"), out("w")}));
}
