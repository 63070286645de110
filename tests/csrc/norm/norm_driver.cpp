// A C face of RMSNorm for tests without bindings: one call on the emulator; the report, "" when all is well.

#include "../../../csrc/norm/norm.h"
#include "../emulated_call.h"

extern "C" {

struct NormCall {
  const void *x, *other, *dy;   // bf16 [rows, columns]
  const float *weight, *rstd;
  void* out[4];                 // forward: codes, scales, rstd, sum; backward: dx, dweight, workspace
  int64_t rows, columns, parts;
  int32_t operation;            // 0: residual, norm, codes; 1: backward with dresidual
  uint64_t seed;
  int32_t asynchrony, schedule, check;
  const char *drop_kind, *drop_site;
};

const char* norm_on_emulator(const NormCall* call) {
  set_options(*call);
  const int64_t r = call->rows, c = call->columns;
  const auto matrix = [&](const void* data) { return norms::Matrix{data, norms::Type::bf16, r, c, c, 1}; };
  emulator::clear_buffers();
  emulator::register_buffer(call->x, r * c * 2, "x", false);
  emulator::register_buffer(call->other, r * c * 2, "other", false);
  emulator::register_buffer(call->weight, c * 4, "weight", false);
  return report_of_chain([&] {
    for (int repeat = 0; repeat < 2; ++repeat) {
      if (call->operation == 0) {
        emulator::register_buffer(call->out[0], r * c, "q", true);
        emulator::register_buffer(call->out[1], (c + 127) / 128 * ((r + 3) / 4 * 4) * 4, "scale", true);
        emulator::register_buffer(call->out[2], r * 4, "rstd", true);
        emulator::register_buffer(call->out[3], r * c * 2, "new_residual", true);
        norms::RmsNormArguments a;
        a.x = matrix(call->x), a.residual = matrix(call->other);
        a.weight = {call->weight, norms::Type::fp32, 1};
        a.q = call->out[0], a.scale = static_cast<float*>(call->out[1]), a.rstd = static_cast<float*>(call->out[2]);
        a.new_residual = call->out[3];
        norms::rms_norm(a, hopper::Stream{});
      } else {
        const int64_t width = (c + 511) / 512 * 512;
        emulator::register_buffer(call->dy, r * c * 2, "dy", false);
        emulator::register_buffer(call->rstd, r * 4, "rstd", false);
        emulator::register_buffer(call->out[0], r * c * 2, "dx", true);
        emulator::register_buffer(call->out[1], c * 4, "dweight", true);
        emulator::register_buffer(call->out[2], call->parts * width * 8, "workspace", true);
        norms::RmsNormBackwardArguments a;
        a.dy = matrix(call->dy), a.x = matrix(call->x), a.dresidual = matrix(call->other);
        a.weight = {call->weight, norms::Type::fp32, 1};
        a.rstd = call->rstd;
        a.dx = call->out[0], a.dweight = call->out[1], a.workspace = static_cast<double*>(call->out[2]);
        a.parts = call->parts;
        norms::rms_norm_backward(a, hopper::Stream{});
      }
    }
  });
}

}  // extern "C"
