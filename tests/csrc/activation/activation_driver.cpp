// A C face of SwiGLU for tests without bindings: one call on the emulator; the report, "" when all is well.

#include "../../../csrc/activation/activation.h"
#include "../emulated_call.h"

extern "C" {

struct ActivationCall {
  const void *gate_up, *dy;     // bf16 [rows, 2 I], [rows, I]
  const float* weight;
  const int32_t* offsets;       // [groups + 1]; casts only
  void* out[9];                 // forward: codes, scales; backward: dgate_up, dweight; casts: q, scale, q_t, scale_t, act_t,
                                // act_scale_t, dweight, padded_offsets, workspace
  int64_t rows, inner, groups, padded_rows;
  int32_t operation;            // 0: codes; 1: backward; 2: backward with casts, grouped
  uint64_t seed;
  int32_t asynchrony, schedule, check;
  const char *drop_kind, *drop_site;
};

const char* activation_on_emulator(const ActivationCall* call) {
  set_options(*call);
  const int64_t r = call->rows, c = call->inner, p = call->padded_rows, padded = (r + 3) / 4 * 4;
  const activation::Matrix gate_up{call->gate_up, activation::Type::bf16, r, 2 * c, 2 * c, 1};
  const activation::Matrix dy{call->dy, activation::Type::bf16, r, c, c, 1};
  const auto f = [&](int i) { return static_cast<float*>(call->out[i]); };
  const auto writable = [&](int i, int64_t bytes, const char* name) {
    emulator::register_buffer(call->out[i], bytes, name, true);
  };
  emulator::clear_buffers();
  emulator::register_buffer(call->gate_up, r * c * 4, "gate_up", false);
  emulator::register_buffer(call->dy, r * c * 2, "dy", false);
  emulator::register_buffer(call->weight, r * 4, "weight", false);
  return report_of_chain([&] {
    for (int repeat = 0; repeat < 2; ++repeat) {
      if (call->operation == 0) {
        writable(0, r * c, "q");
        writable(1, (c + 127) / 128 * padded * 4, "scale");
        activation::SwigluArguments a;
        a.gate_up = gate_up, a.weight = {call->weight, 1};
        a.q = call->out[0], a.scale = f(1);
        activation::swiglu(a, hopper::Stream{});
      } else if (call->operation == 1) {
        writable(0, r * c * 4, "dgate_up");
        writable(1, r * 4, "dweight");
        activation::SwigluBackwardArguments a;
        a.dy = dy, a.gate_up = gate_up, a.weight = {call->weight, 1};
        a.dgate_up = call->out[0], a.dweight = f(1);
        activation::swiglu_backward(a, hopper::Stream{});
      } else {
        emulator::register_buffer(call->offsets, (call->groups + 1) * 4, "offsets", false);
        writable(0, r * c * 2, "q");
        writable(1, 2 * c / 128 * padded * 4, "scale");
        writable(2, 2 * c * p, "q_t");
        writable(3, p / 128 * 2 * c * 4, "scale_t");
        writable(4, c * p, "act_t");
        writable(5, p / 128 * c * 4, "act_scale_t");
        writable(6, r * 4, "dweight");
        writable(7, (call->groups + 1) * 4, "padded_offsets");
        writable(8, c / 128 * r * 8, "workspace");
        activation::SwigluBackwardQuantizeArguments a;
        a.dy = dy, a.gate_up = gate_up, a.weight = {call->weight, 1};
        a.offsets = call->offsets, a.groups = call->groups, a.padded_rows = p;
        a.q = call->out[0], a.scale = f(1), a.q_t = call->out[2], a.scale_t = f(3), a.act_t = call->out[4];
        a.act_scale_t = f(5), a.dweight = f(6);
        a.padded_offsets = static_cast<int32_t*>(call->out[7]), a.workspace = static_cast<double*>(call->out[8]);
        activation::swiglu_backward_quantize(a, hopper::Stream{});
      }
    }
  });
}

}  // extern "C"
