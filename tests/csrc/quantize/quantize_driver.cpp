// A C face of the quantisers for tests without bindings: one call on the emulator; the report, "" when all is well.

#include "../../../csrc/quantize/quantize.h"
#include "../emulated_call.h"

extern "C" {

struct QuantizeCall {
  const void* x;
  void *q, *q_t;
  float *scale, *scale_t;
  int64_t rows, columns;
  int32_t operation;   // 0: rows, 1: columns and rows from one read, 2: blocks with the transposed copy
  uint64_t seed;
  int32_t asynchrony, schedule, check;
  const char *drop_kind, *drop_site;
};

const char* quantize_on_emulator(const QuantizeCall* call) {
  set_options(*call);
  const int64_t r = call->rows, c = call->columns, groups_r = (r + 127) / 128, groups_c = (c + 127) / 128;
  const quantize::Matrix x{call->x, quantize::Type::bf16, r, c, c, 1};
  const bool blocks = call->operation == 2;
  const auto padded = [](int64_t n) { return (n + 3) / 4 * 4; };
  emulator::clear_buffers();
  emulator::register_buffer(call->x, r * c * 2, "x", false);
  emulator::register_buffer(call->q, r * c, "q", true);
  emulator::register_buffer(call->scale, 4 * (blocks ? groups_r * groups_c : groups_c * padded(r)), "scale", true);
  if (call->operation) {
    emulator::register_buffer(call->q_t, c * (blocks ? r : groups_r * 128), "q_t", true);
    emulator::register_buffer(call->scale_t, 4 * (blocks ? groups_r * groups_c : groups_r * padded(c)), "scale_t", true);
  }
  return report_of([&] {
    if (call->operation == 0) {
      quantize::RowsArguments a;
      a.x = x, a.q = call->q, a.scale = call->scale;
      quantize::quantize_1x128(a, hopper::Stream{});
    } else if (call->operation == 1) {
      quantize::ColumnsArguments a;
      a.x = x, a.padded_rows = groups_r * 128;
      a.q = call->q, a.scale = call->scale, a.q_t = call->q_t, a.scale_t = call->scale_t;
      quantize::quantize_128x1(a, hopper::Stream{});
    } else {
      quantize::BlocksArguments a;
      a.w = x, a.q = call->q, a.scale = call->scale, a.q_t = call->q_t, a.scale_t = call->scale_t;
      quantize::quantize_128x128(a, hopper::Stream{});
    }
  });
}

}  // extern "C"
