// A C face of the grouped FP8 GEMMs for tests without bindings: runs them on the emulator and returns the report, "" when
// all is well.

#include "../../../csrc/gemm/fp8_gemm.h"
#include "../emulated_call.h"

extern "C" {

enum Kind : int32_t { dense, grouped, masked };

struct GroupedCall {
  const void *a, *b;
  const float *scale_a, *scale_b;
  const int32_t* index;   // offsets or counts
  void* d;
  int64_t m, n, k, a_stride, b_stride, scale_a_stride, scale_b_stride, d_stride;
  int64_t a_group_stride, b_group_stride, scale_a_group_stride, scale_b_group_stride, d_group_stride;
  int32_t kind, groups, fp32, accumulate, clear_rest, num_sms, tile_rows, tile_columns, multicast;   // 0, -1: chosen
};

struct Run {
  uint64_t seed;
  int32_t asynchrony, schedule, check;
  const char *drop_kind, *drop_site;   // a mutation, see Options; may be null
};

}  // extern "C"

namespace {

Fp8GroupedGemmArguments arguments(const GroupedCall& call) {
  Fp8GroupedGemmArguments x;
  x.a = call.a, x.b = call.b, x.scale_a = call.scale_a, x.scale_b = call.scale_b, x.d = call.d;
  x.m = call.m, x.n = call.n, x.k = call.k, x.groups = call.groups;
  x.a_stride = call.a_stride, x.b_stride = call.b_stride, x.d_stride = call.d_stride;
  x.scale_a_stride = call.scale_a_stride, x.scale_b_stride = call.scale_b_stride;
  x.a_group_stride = call.a_group_stride, x.b_group_stride = call.b_group_stride, x.d_group_stride = call.d_group_stride;
  x.scale_a_group_stride = call.scale_a_group_stride, x.scale_b_group_stride = call.scale_b_group_stride;
  (call.kind == masked ? x.counts : x.offsets) = call.index;
  x.d_type = call.fp32 ? OutputType::fp32 : OutputType::bf16;
  x.accumulate = call.accumulate != 0;
  x.clear_rest = call.clear_rest != 0;
  x.num_sms = call.num_sms;
  if (call.tile_rows) x.tile = TileShape{call.tile_rows, call.tile_columns};
  if (call.multicast >= 0) x.multicast = static_cast<Multicast>(call.multicast);
  return x;
}

// What the kernel may touch, to the byte where rows are dense: anything else is a report.
void allow(const Fp8GroupedGemmArguments& x, int32_t kind, bool a_is_new) {
  const int64_t k_blocks = (x.k + 127) / 128, n_blocks = (x.n + 127) / 128, size = x.d_type == OutputType::fp32 ? 4 : 2;
  const int64_t many = kind == dense ? 1 : x.groups, batch = kind == masked ? x.groups : 1;
  const auto one = [](const char* name, const void* p, int64_t matrices, int64_t group_stride, int64_t rows,
                      int64_t stride, int64_t row, int64_t element, bool writable) {
    if (p && matrices > 0 && rows > 0 && row > 0)
      emulator::register_buffer(p, ((matrices - 1) * group_stride + (rows - 1) * stride + row) * element, name, writable);
  };
  if (a_is_new) one("a", x.a, batch, x.a_group_stride, x.m, x.a_stride, x.k, 1, false);
  one("b", x.b, many, x.b_group_stride, x.n, x.b_stride, x.k, 1, false);
  one("scale_a", x.scale_a, batch, x.scale_a_group_stride, k_blocks, x.scale_a_stride, x.m, 4, false);
  one("scale_b", x.scale_b, many, x.scale_b_group_stride, n_blocks, x.scale_b_stride, k_blocks, 4, false);
  one("d", x.d, batch, x.d_group_stride, x.m, x.d_stride, x.n, size, true);
  if (kind == masked) one("counts", x.counts, 1, 0, 1, 0, x.groups, 4, false);
  if (kind == grouped) one("offsets", x.offsets, 1, 0, 1, 0, x.groups + 1, 4, false);
}

}  // namespace

extern "C" {

// The calls one after the other on one stream; from the second on, A may be what the call before it wrote.
const char* fp8_gemms_on_emulator(const GroupedCall* calls, int32_t count, const Run* run) {
  set_options(*run);
  // A table of groups that nobody waited for leads anywhere: stop before D does.
  if (run->drop_kind && *run->drop_kind) emulator::options().max_reports = 1;
  emulator::clear_buffers();
  const auto all = [&] {
    for (int32_t i = 0; i < count; ++i) {
      const Fp8GroupedGemmArguments x = arguments(calls[i]);
      allow(x, calls[i].kind, i == 0 || calls[i].a != calls[i - 1].d);
      if (calls[i].kind == dense) fp8_gemm(x, hopper::Stream{});
      if (calls[i].kind == grouped) fp8_gemm_grouped(x, hopper::Stream{});
      if (calls[i].kind == masked) fp8_gemm_masked(x, hopper::Stream{});
    }
  };
  return count > 1 ? report_of_chain(all) : report_of(all);
}

}  // extern "C"
