// Host side of the way back.
#include "unpermute.cuh"

#include "checks.h"
#include "move.h"

namespace moe {
namespace {

using namespace moe_kernels;
using hopper::bf16;

constexpr int64_t kMaxSlots = 1024;       // whose dot products a block keeps in shared memory
static_assert(kMaxSlots * kUnpermuteWarps * sizeof(double) <= 48 << 10);

uintptr_t element(Type type) { return type == Type::bf16 ? 2 : 4; }

void invert(const int64_t* source, int64_t stride, int64_t rows, int32_t* row_of_slot, bool programmatic,
            hopper::Stream stream) {
  const auto blocks = static_cast<uint32_t>(ceil_div(rows, 256));
  hopper::launch(launch_config("unpermute, invert", blocks, 256, programmatic, stream), invert_kernel, source, stride, rows,
                 row_of_slot);
}

template <class T, bool kVector>
void run(const hopper::LaunchConfig& config, const UnpermuteParams& params) {
  params.weights ? hopper::launch(config, unpermute_kernel<T, kVector, true>, params)
                 : hopper::launch(config, unpermute_kernel<T, kVector, false>, params);
}

}  // namespace

void unpermute(const UnpermuteArguments& a, hopper::Stream stream) {
  check_rows(a.tokens, a.top_k);
  require(a.columns >= 0, "y", "must not have a negative number of columns", a.columns);
  const int64_t rows = a.tokens * a.top_k;
  check_table("y", a.y, rows, a.columns, element(a.type));
  check_table("source", Table<const int64_t>{a.source, a.source_stride, 1}, rows, 1, sizeof(int64_t));
  if (a.weights.data) check_table("weights", a.weights, a.tokens, a.top_k, sizeof(float));
  check_output("out", a.out, a.tokens * a.columns, element(a.type));
  check_output("row_of_slot", a.row_of_slot, rows, sizeof(int32_t));
  if (rows == 0 || a.columns == 0) return;
  invert(a.source, a.source_stride, rows, a.row_of_slot, a.programmatic, stream);

  UnpermuteParams p{};
  p.y = a.y.data;
  p.row_stride = a.y.row_stride;
  p.column_stride = a.y.column_stride;
  p.weights = a.weights.data;
  p.weights_strides[0] = a.weights.row_stride, p.weights_strides[1] = a.weights.column_stride;
  p.row_of_slot = a.row_of_slot;
  p.rows = rows;
  p.columns = a.columns;
  p.top_k = static_cast<int32_t>(a.top_k);
  p.out = a.out;
  const auto config = launch_config("unpermute", static_cast<uint32_t>(a.tokens), kUnpermuteThreads, a.programmatic, stream);
  const auto bytes = static_cast<int64_t>(element(a.type));
  const bool vector = whole_vectors(a.y, rows, a.columns, bytes) && is_aligned(a.out, 16);
  if (a.type == Type::bf16) vector ? run<bf16, true>(config, p) : run<bf16, false>(config, p);
  else vector ? run<float, true>(config, p) : run<float, false>(config, p);
}

void unpermute_backward(const UnpermuteBackwardArguments& a, hopper::Stream stream) {
  check_rows(a.tokens, a.top_k);
  require(a.columns >= 0, "dout", "must not have a negative number of columns", a.columns);
  const int64_t rows = a.tokens * a.top_k;
  check_table("dout", a.dout, a.tokens, a.columns, element(a.type));
  check_table("source", Table<const int64_t>{a.source, a.source_stride, 1}, rows, 1, sizeof(int64_t));
  check_output("dy", a.dy, rows * a.columns, element(a.type));
  check_output("row_of_slot", a.row_of_slot, rows, sizeof(int32_t));
  if (a.weights.data) {
    check_range("top_k", a.top_k, 1, kMaxSlots);
    check_table("y", a.y, rows, a.columns, element(a.type));
    check_table("weights", a.weights, a.tokens, a.top_k, sizeof(float));
    check_output("dweights", a.dweights, rows, sizeof(float));
  }
  if (rows == 0 || (a.columns == 0 && !a.weights.data)) return;
  invert(a.source, a.source_stride, rows, a.row_of_slot, a.programmatic, stream);
  const auto bytes = static_cast<int64_t>(element(a.type));
  if (!a.weights.data) {
    move_rows("unpermute_backward",
              {a.dout, bytes, a.tokens, a.columns, a.top_k, a.row_of_slot, a.dy, a.programmatic}, stream);
    return;
  }

  UnpermuteBackwardParams p{};
  p.dout = a.dout.data;
  p.y = a.y.data;
  p.dout_strides[0] = a.dout.row_stride, p.dout_strides[1] = a.dout.column_stride;
  p.y_strides[0] = a.y.row_stride, p.y_strides[1] = a.y.column_stride;
  p.weights = a.weights.data;
  p.weights_strides[0] = a.weights.row_stride, p.weights_strides[1] = a.weights.column_stride;
  p.row_of_slot = a.row_of_slot;
  p.rows = rows;
  p.columns = a.columns;
  p.top_k = static_cast<int32_t>(a.top_k);
  p.dy = a.dy;
  p.dweights = a.dweights;
  const auto smem = static_cast<size_t>(a.top_k) * kUnpermuteWarps * sizeof(double);
  const auto config = launch_config("unpermute_backward", static_cast<uint32_t>(a.tokens), kUnpermuteThreads,
                                    a.programmatic, stream, smem);
  const bool vector = whole_vectors(a.y, rows, a.columns, bytes) && whole_vectors(a.dout, a.tokens, a.columns, bytes) &&
                      is_aligned(a.dy, 16);
  if (a.type == Type::bf16)
    hopper::launch(config, vector ? unpermute_backward_kernel<bf16, true> : unpermute_backward_kernel<bf16, false>, p);
  else
    hopper::launch(config, vector ? unpermute_backward_kernel<float, true> : unpermute_backward_kernel<float, false>, p);
}

}  // namespace moe
