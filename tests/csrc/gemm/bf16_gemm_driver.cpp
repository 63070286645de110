// A C face of bf16_gemm for tests without bindings: runs it on the emulator and returns the report, "" when all is well.

#include "../../../csrc/gemm/bf16_gemm.h"
#include "../emulated_call.h"

extern "C" {

struct Call {
  const void *a, *b;
  void* d;
  const int32_t* index;
  int64_t m, n, k, groups;
  int64_t a_row, a_k, a_matrix, b_row, b_k, b_matrix, d_row, d_matrix;   // strides in elements
  int32_t a_matrices, b_matrices, d_matrices, index_size;
  int32_t fp32, accumulate, clear, grouping, num_sms, tile_rows, tile_columns, multicast;   // tile_rows 0: the chooser
  uint64_t seed;
  int32_t asynchrony, schedule, check;
  const char *drop_kind, *drop_site;   // a mutation, see Options; may be null
};

namespace {

void allow(const char* name, const void* p, int64_t matrices, int64_t matrix, int64_t rows, int64_t row, int64_t columns,
           int64_t column, int64_t size, bool writable) {
  if (!p || matrices <= 0 || rows <= 0 || columns <= 0) return;
  const int64_t elements = (matrices - 1) * matrix + (rows - 1) * row + (columns - 1) * column + 1;
  emulator::register_buffer(p, elements * size, name, writable);
}

}  // namespace

const char* bf16_gemm_on_emulator(const Call* call) {
  set_options(*call);
  Bf16GemmArguments x;
  x.a = {call->a, call->m, call->a_row, call->a_k, call->a_matrices, call->a_matrix};
  x.b = {call->b, call->n, call->b_row, call->b_k, call->b_matrices, call->b_matrix};
  x.k = call->k;
  x.d = call->d;
  x.d_type = call->fp32 ? Dtype::f32 : Dtype::bf16;
  x.d_stride = call->d_row, x.d_matrix_stride = call->d_matrix;
  x.accumulate = call->accumulate != 0, x.clear_rest = call->clear != 0;
  x.grouping = static_cast<Grouping>(call->grouping);
  x.index = call->index, x.groups = call->groups;
  x.num_sms = call->num_sms;
  if (call->tile_rows) {
    x.tile = TileShape{call->tile_rows, call->tile_columns};
    x.multicast = static_cast<Multicast>(call->multicast);
  }
  // What the kernel may touch, to the byte: anything else is a report.
  emulator::clear_buffers();
  allow("a", x.a.data, x.a.matrices, x.a.matrix_stride, x.a.rows, x.a.row_stride, x.k, x.a.k_stride, 2, false);
  allow("b", x.b.data, x.b.matrices, x.b.matrix_stride, x.b.rows, x.b.row_stride, x.k, x.b.k_stride, 2, false);
  allow("d", x.d, call->d_matrices, x.d_matrix_stride, x.a.rows, x.d_stride, x.b.rows, 1, call->fp32 ? 4 : 2, true);
  if (x.index) emulator::register_buffer(x.index, call->index_size * 4, "index", false);
  return report_of([&] {
    bf16_gemm(x, hopper::Stream{});
  });
}

}  // extern "C"
