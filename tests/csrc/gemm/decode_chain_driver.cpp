// Two decoding steps back to back, each kernel launched as dependent on the one before: quantise x0, multiply, quantise x1
// into the same codes, multiply. With `writes_weights` the first kernel quantises the weights instead, which nobody may
// prefetch. Returns the emulator's report, "" when all is well.

#include "../../../csrc/gemm/fp8_decode.h"
#include "../../../csrc/quantize/quantize.h"
#include "../emulated_call.h"

extern "C" {

struct Chain {
  const void *x0, *x1;          // bf16 [m, k]
  void *a, *b;                  // e4m3 [m, k], [n, k]
  float *scale_a, *scale_b;
  float *d0, *d1;
  int64_t m, n, k, split_k;
  int32_t prefetch_weights, writes_weights;
  const void* w;                // bf16 [n, k], quantised row by row
  float* scale_w;               // where those scales go; the products use scale_b
  uint64_t seed;
  int32_t asynchrony, schedule;
  const char *drop_kind, *drop_site;
};

const char* decode_chain(const Chain* c) {
  set_options(*c);
  emulator::options().resident_clusters = 16;
  const int64_t m = c->m, n = c->n, k = c->k, k_blocks = (k + 127) / 128, n_blocks = (n + 127) / 128;
  const auto four = [](int64_t x) { return (x + 3) / 4 * 4; };
  emulator::clear_buffers();
  emulator::register_buffer(c->x0, m * k * 2, "x0", false);
  emulator::register_buffer(c->x1, m * k * 2, "x1", false);
  emulator::register_buffer(c->w, n * k * 2, "w", false);
  emulator::register_buffer(c->a, m * k, "a", true);
  emulator::register_buffer(c->b, n * k, "b", true);
  emulator::register_buffer(c->scale_a, k_blocks * four(m) * 4, "scale_a", true);
  emulator::register_buffer(c->scale_b, n_blocks * k_blocks * 4, "scale_b", false);
  emulator::register_buffer(c->scale_w, k_blocks * four(n) * 4, "scale_w", true);
  emulator::register_buffer(c->d0, m * n * 4, "d0", true);
  emulator::register_buffer(c->d1, m * n * 4, "d1", true);

  const auto matrix = [](const char* name, void* p, Dtype dtype, int64_t rows, int64_t columns) {
    TensorView x;
    x.name = name, x.data = p, x.dtype = dtype, x.rank = 2;
    x.shape[0] = rows, x.shape[1] = columns, x.stride[0] = columns, x.stride[1] = 1;
    return x;
  };
  const auto quantise = [&](const void* x, int64_t rows, void* q, float* scale) {
    quantize::RowsArguments a;
    a.x = {x, quantize::Type::bf16, rows, k, k, 1}, a.q = q, a.scale = scale;
    quantize::quantize_1x128(a, hopper::Stream{});
  };
  const auto multiply = [&](float* d) {
    fp8_gemm_decode(hopper::Stream{}, matrix("a", c->a, Dtype::e4m3, m, k),
                    matrix("scale_a", c->scale_a, Dtype::f32, k_blocks, four(m)),
                    matrix("b", c->b, Dtype::e4m3, n, k), matrix("scale_b", c->scale_b, Dtype::f32, n_blocks, k_blocks),
                    matrix("d", d, Dtype::f32, m, n), {c->split_k, 0, c->prefetch_weights != 0});
  };
  return report_of_chain([&] {
    quantise(c->x0, m, c->a, c->scale_a);
    if (c->writes_weights) quantise(c->w, n, c->b, c->scale_w);
    multiply(c->d0);
    quantise(c->x1, m, c->a, c->scale_a);
    multiply(c->d1);
  });
}

}  // extern "C"
