// A C face of fp8_gemm for tests without bindings: runs it on the emulator and returns the report, "" when all is well.

#include "../../../csrc/gemm/fp8_gemm.h"
#include "../emulated_call.h"

extern "C" {

struct Call {
  const void *a, *b;
  const float *scale_a, *scale_b;
  void* d;
  int64_t m, n, k, a_stride, b_stride, scale_a_stride, scale_b_stride, d_stride;
  int32_t fp32, accumulate, num_sms, tile_rows, tile_columns, multicast;   // tile_rows 0: the chooser decides
  uint64_t seed;
  int32_t asynchrony, schedule, check;
  const char *drop_kind, *drop_site;   // a mutation, see Options; may be null
};

const char* fp8_gemm_on_emulator(const Call* call) {
  set_options(*call);
  Fp8GemmArguments x;
  x.a = call->a, x.b = call->b, x.scale_a = call->scale_a, x.scale_b = call->scale_b, x.d = call->d;
  x.m = call->m, x.n = call->n, x.k = call->k;
  x.a_stride = call->a_stride, x.b_stride = call->b_stride, x.d_stride = call->d_stride;
  x.scale_a_stride = call->scale_a_stride, x.scale_b_stride = call->scale_b_stride;
  x.d_type = call->fp32 ? OutputType::fp32 : OutputType::bf16;
  x.accumulate = call->accumulate != 0;
  x.num_sms = call->num_sms;
  if (call->tile_rows) {
    x.tile = TileShape{call->tile_rows, call->tile_columns};
    x.multicast = static_cast<Multicast>(call->multicast);
  }
  // What the kernel may touch, to the byte: anything else is a report.
  const int64_t k_blocks = (x.k + 127) / 128, n_blocks = (x.n + 127) / 128, size = call->fp32 ? 4 : 2;
  const auto allow = [](const char* name, const void* p, int64_t rows, int64_t row, int64_t stride, bool writable) {
    if (p && rows > 0 && row > 0) emulator::register_buffer(p, ((rows - 1) * stride + row), name, writable);
  };
  emulator::clear_buffers();
  allow("a", x.a, x.m, x.k, x.a_stride, false);
  allow("b", x.b, x.n, x.k, x.b_stride, false);
  allow("scale_a", x.scale_a, k_blocks, x.m * 4, x.scale_a_stride * 4, false);
  allow("scale_b", x.scale_b, n_blocks, k_blocks * 4, x.scale_b_stride * 4, false);
  allow("d", x.d, x.m, x.n * size, x.d_stride * size, true);
  return report_of([&] {
    fp8_gemm(x, hopper::Stream{});
  });
}

}  // extern "C"
