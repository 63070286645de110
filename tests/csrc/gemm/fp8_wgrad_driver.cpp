// A C face of fp8_wgrad for tests without bindings: runs it on the emulator and returns the report, "" when all is well.
#include <string>

#include "../../../csrc/gemm/fp8_wgrad.h"
#include "../emulated_call.h"

extern "C" {

struct WgradCall {
  const void *a, *b;
  const float *scale_a, *scale_b;
  const int32_t* offsets;   // null: one matrix
  void* d;
  int64_t m, n, tokens, groups, a_stride, b_stride, scale_a_stride, scale_b_stride, d_stride, d_group_stride;
  int32_t fp32, accumulate, num_sms, tile_rows, tile_columns, multicast;   // tile_rows 0: the chooser decides
  uint64_t seed;
  int32_t asynchrony, schedule, check;
  const char *drop_kind, *drop_site;   // a mutation, see Options; may be null
};

static Fp8WgradArguments arguments_of(const WgradCall* call) {
  Fp8WgradArguments x;
  x.a = call->a, x.b = call->b, x.scale_a = call->scale_a, x.scale_b = call->scale_b, x.d = call->d;
  x.offsets = call->offsets, x.groups = call->groups;
  x.m = call->m, x.n = call->n, x.tokens = call->tokens;
  x.a_stride = call->a_stride, x.b_stride = call->b_stride;
  x.d_stride = call->d_stride, x.d_group_stride = call->d_group_stride;
  x.scale_a_stride = call->scale_a_stride, x.scale_b_stride = call->scale_b_stride;
  x.d_type = call->fp32 ? OutputType::fp32 : OutputType::bf16;
  x.accumulate = call->accumulate != 0;
  x.num_sms = call->num_sms;
  if (call->tile_rows) {
    x.tile = TileShape{call->tile_rows, call->tile_columns};
    x.multicast = static_cast<Multicast>(call->multicast);
  }
  return x;
}

const char* fp8_wgrad_on_emulator(const WgradCall* call) {
  set_options(*call);
  const Fp8WgradArguments x = arguments_of(call);
  // What the kernel may touch, to the byte: anything else is a report.
  const int64_t slices = (x.tokens + 127) / 128, size = call->fp32 ? 4 : 2;
  const auto allow = [](const char* name, const void* p, int64_t rows, int64_t row, int64_t stride, bool writable) {
    if (p && rows > 0 && row > 0) emulator::register_buffer(p, (rows - 1) * stride + row, name, writable);
  };
  emulator::clear_buffers();
  allow("a", x.a, x.m, x.tokens, x.a_stride, false);
  allow("b", x.b, x.n, x.tokens, x.b_stride, false);
  allow("scale_a", x.scale_a, slices, x.m * 4, x.scale_a_stride * 4, false);
  allow("scale_b", x.scale_b, slices, x.n * 4, x.scale_b_stride * 4, false);
  allow("offsets", x.offsets, 1, (x.groups + 1) * 4, 0, false);
  allow("d", x.d, x.groups, ((x.m - 1) * x.d_stride + x.n) * size, x.d_group_stride * size, true);
  return report_of([&] {
    fp8_wgrad(x, hopper::Stream{});
  });
}

// "128x192/a" of the call on a machine of that many multiprocessors.
const char* fp8_wgrad_choice_on(const WgradCall* call, int32_t sms) {
  static std::string text;
  emulator::options().sm_count = sms;
  const TileChoice choice = fp8_wgrad_choice(arguments_of(call));
  static constexpr const char* kPairs[] = {"", "/a", "/b"};
  text = std::to_string(choice.shape.rows) + "x" + std::to_string(choice.shape.columns) +
         kPairs[static_cast<int>(choice.multicast)];
  emulator::options().sm_count = emulator::Options{}.sm_count;
  return text.c_str();
}

}  // extern "C"
