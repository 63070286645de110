// A C face of fp8_gemm for tests without bindings: runs it on the emulator and returns the report, "" when all is well.
#include <exception>
#include <string>

#include "../../../csrc/emulator/options.h"
#include "../../../csrc/gemm/fp8_gemm.h"

extern "C" {

struct Call {
  const void *a, *b;
  const float *scale_a, *scale_b;
  void* d;
  int64_t m, n, k, a_stride, b_stride, scale_a_stride, scale_b_stride, d_stride;
  int32_t fp32, accumulate, num_sms, tile_rows, tile_columns, multicast;   // tile_rows 0: the chooser decides
  uint64_t seed;
  int32_t asynchrony, schedule, check;
  const char* drop;   // a mutation, see Options::drop_kind; may be null
};

const char* fp8_gemm_on_emulator(const Call* call) {
  static std::string message;
  emulator::Options options;
  options.seed = call->seed;
  options.asynchrony = static_cast<emulator::Asynchrony>(call->asynchrony);
  options.schedule = static_cast<emulator::Schedule>(call->schedule);
  options.check = call->check != 0;
  if (call->drop) options.drop_kind = call->drop;
  emulator::options() = options;
  Fp8GemmArguments x;
  x.a = call->a, x.b = call->b, x.scale_a = call->scale_a, x.scale_b = call->scale_b, x.d = call->d;
  x.m = call->m, x.n = call->n, x.k = call->k;
  x.a_stride = call->a_stride, x.b_stride = call->b_stride, x.d_stride = call->d_stride;
  x.scale_a_stride = call->scale_a_stride, x.scale_b_stride = call->scale_b_stride;
  x.d_type = call->fp32 ? OutputType::fp32 : OutputType::bf16;
  x.accumulate = call->accumulate != 0;
  x.num_sms = call->num_sms;
  if (call->tile_rows) {
    x.choose = false;
    x.tile = {call->tile_rows, call->tile_columns};
    x.multicast = static_cast<Multicast>(call->multicast);
  }
  try {
    fp8_gemm(x, hopper::Stream{});
    return "";
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // extern "C"
