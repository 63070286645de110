// Host side of the fused linear cross entropy: limits, and the order of products and kernels.
#include "cross_entropy.h"

#include <algorithm>

#include "../common/checks.h"
#include "../gemm/bf16_gemm.h"
#include "cross_entropy.cuh"

namespace {

using namespace loss_kernels;
using hopper::Stream;

constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 512;   // rows of a product, and blocks of a grid

Bf16Operand rows_of(const LossMatrix& x, int64_t first, int64_t rows) {
  return {x.data + first * x.row_stride, rows, x.row_stride, x.column_stride};
}
Bf16Operand columns_of(const LossMatrix& x, int64_t first_row) {
  return {x.data + first_row * x.row_stride, x.columns, x.column_stride, x.row_stride};
}

struct Run {
  const CrossEntropyArguments& x;
  Stream stream;

  int64_t tokens() const { return x.h.rows; }
  int64_t classes(int64_t first) const { return std::min(x.chunk, x.weight.rows - first); }

  hopper::LaunchConfig config(const char* name, int64_t blocks, size_t shared) const {
    hopper::LaunchConfig c{};
    c.grid = dim3(static_cast<uint32_t>(blocks));
    c.block = dim3(kThreads);
    c.smem_bytes = shared;
    c.programmatic = x.programmatic;
    c.stream = stream;
    c.name = name;
    return c;
  }
  void multiply(Bf16GemmArguments g) const {
    g.programmatic = x.programmatic;
    bf16_gemm(g, stream);
  }
  Chunk chunk(int64_t first) const {
    return {x.logits, x.stride, static_cast<int32_t>(classes(first)), static_cast<int32_t>(first), x.labels,
            x.labels_stride};
  }
  RowState state() const { return {x.largest, x.sum, x.at_label}; }

  void logits(int64_t first) const {
    multiply({.a = rows_of(x.h, 0, tokens()), .b = rows_of(x.weight, first, classes(first)), .k = x.h.columns,
              .d = x.logits, .d_type = Dtype::f32, .d_stride = x.stride});
  }
  void scan(int64_t first, bool last) const {
    if (tokens() == 0) return;
    hopper::launch(config("cross_entropy_scan", tokens(), sizeof(Shared)), cross_entropy_scan_kernel,
                   ScanParams{chunk(first), state(), first == 0, last ? x.token_loss : nullptr});
  }
  void gradients(int64_t first, bool accumulate) const {
    if (tokens() > 0)
      hopper::launch(config("cross_entropy_gradient", tokens(), 0), cross_entropy_gradient_kernel,
                     GradientParams{chunk(first), state(), x.dloss, x.dloss_stride, x.dlogits});
    const int64_t width = x.h.columns, count = classes(first);
    if (x.dh)
      multiply({.a = {x.dlogits, tokens(), x.stride, 1}, .b = columns_of(x.weight, first), .k = count,
                .d = x.dh_sum, .d_type = Dtype::f32, .d_stride = width, .accumulate = accumulate});
    if (x.dweight)
      multiply({.a = {x.dlogits, count, 1, x.stride}, .b = columns_of(x.h, 0), .k = tokens(),
                .d = x.dweight + first * width, .d_type = Dtype::bf16, .d_stride = width});
  }
};

void check(const CrossEntropyArguments& x) {
  require(x.h.rows <= kMaxTokens, "h", "must have at most 2^31-512 rows", x.h.rows);
  require(x.weight.rows <= kMaxTokens, "weight", "must have at most 2^31-512 rows", x.weight.rows);
  require(x.chunk > 0 && (x.chunk % 8 == 0 || x.chunk >= x.weight.rows), "chunk",
          "must be a multiple of 8 classes, or all of them", x.chunk);
  require(x.stride % 8 == 0 && x.stride >= std::min(x.chunk, x.weight.rows), "stride",
          "must be a multiple of 8 and at least a chunk", x.stride);
  const bool empty = x.h.rows == 0;
  for (const auto& [name, p] : {std::pair<const char*, const void*>{"logits", x.logits},
                                {"dlogits", x.dh || x.dweight ? static_cast<const void*>(x.dlogits) : x.logits},
                                {"dh_sum", x.dh ? x.dh_sum : x.logits}, {"dh", x.dh ? x.dh : nullptr}})
    require(is_aligned(p, 16), name, "must start at a multiple of 16 bytes", p);
  for (const auto& [name, p] : {std::pair<const char*, const void*>{"logits", x.logits}, {"largest", x.largest},
                                {"sum", x.sum}, {"at_label", x.at_label}, {"labels", x.labels},
                                {"token_loss", x.token_loss}})
    require(empty || p != nullptr, name, "must not be null unless there are no tokens", p);
}

}  // namespace

void linear_cross_entropy(const CrossEntropyArguments& x, Stream stream) {
  check(x);
  const Run run{x, stream};
  const int64_t classes = x.weight.rows, last = (ceil_div(classes, x.chunk) - 1) * x.chunk;
  for (int64_t first = 0; first <= last; first += x.chunk) {
    run.logits(first);
    run.scan(first, first == last);
  }
  if (x.loss)
    hopper::launch(run.config("loss_sum", 1, sizeof(Shared)), loss_sum_kernel,
                   SumParams{x.token_loss, x.h.rows, x.loss});
  if (!x.dh && !x.dweight) return;
  // From the last chunk back, whose logits are still there: one product less, and of a single chunk none twice.
  for (int64_t first = last; first >= 0; first -= x.chunk) {
    if (first != last) run.logits(first);
    run.gradients(first, first != last);
  }
  const int64_t elements = x.h.rows * x.h.columns;
  if (x.dh && elements > 0)
    hopper::launch(run.config("round_to_bf16", ceil_div(elements, kThreads * kGroup), 0), round_to_bf16_kernel,
                   RoundParams{x.dh_sum, x.dh, elements});
}
