// Host side of quantize_128x128 and transpose_128x128.
#include "quantize_blocks.cuh"

#include "checks.h"

namespace quantize {
namespace {

using namespace quantize_kernels;

template <class T, bool kTransposed>
void run(const hopper::LaunchConfig& config, const BlockParams& params, bool vector) {
  vector ? hopper::launch(config, quantize_blocks_kernel<T, kTransposed, true>, params)
         : hopper::launch(config, quantize_blocks_kernel<T, kTransposed, false>, params);
}

void check_batch(const char* name, int64_t batch, int64_t batch_stride) {
  require(batch >= 0, name, "must not have a negative number of matrices", batch);
  require(batch_stride >= 0, name, "must not have a negative stride between matrices", batch_stride);
}

BlockParams params_of(const Matrix& x, int64_t batch_stride, void* q_t, float* scale_t) {
  BlockParams p{};
  p.x = {x.data, x.row_stride, x.column_stride};
  p.batch_stride = batch_stride;
  p.rows = x.rows;
  p.columns = x.columns;
  p.row_tiles = static_cast<uint32_t>(ceil_div(x.rows, kTile));
  p.column_tiles = static_cast<uint32_t>(ceil_div(x.columns, kTile));
  p.q_t = static_cast<uint8_t*>(q_t);
  p.scale_t = scale_t;
  p.aligned_t = is_aligned(q_t, 16) && x.rows % 16 == 0;
  return p;
}

uint32_t blocks_of(const char* name, const Matrix& x, int64_t batch) {
  const int64_t row_tiles = ceil_div(x.rows, kTile);
  require(batch <= kMaxTiles / row_tiles, name, "must have fewer than 2^31 tiles, one block each", batch);
  return checked_tiles(name, batch * row_tiles, ceil_div(x.columns, kTile));
}

}  // namespace

void quantize_128x128(const BlocksArguments& a, hopper::Stream stream) {
  const Matrix& w = a.w;
  check_batch("w", a.batch, a.batch_stride);
  if (a.batch == 0) return;
  check_input("w", w);
  require(w.type != Type::e4m3, "w", "must be bf16 or fp32", "e4m3");
  require((a.q_t == nullptr) == (a.scale_t == nullptr), "scale_t", "must be null exactly when q_t is", a.scale_t);
  if (w.rows == 0 || w.columns == 0) return;
  check_output("q", a.q, 1);
  check_output("scale", a.scale, sizeof(float));
  check_apart("q", a.q, a.batch * w.rows * w.columns, w, a.batch, a.batch_stride);
  if (a.q_t != nullptr) check_apart("q_t", a.q_t, a.batch * w.rows * w.columns, w, a.batch, a.batch_stride);

  BlockParams p = params_of(w, a.batch_stride, a.q_t, a.scale_t);
  p.q = static_cast<uint8_t*>(a.q);
  p.scale = a.scale;
  p.rule.pow2 = a.pow2;
  const auto config = launch_config("quantize_128x128", blocks_of("w", w, a.batch), kThreads, a.programmatic, stream,
                                    sizeof(BlockShared));
  const bool vector = vectorised(w, a.q, a.batch, a.batch_stride), transposed = a.q_t != nullptr;
  if (w.type == Type::bf16) {
    transposed ? run<bf16, true>(config, p, vector) : run<bf16, false>(config, p, vector);
  } else {
    transposed ? run<float, true>(config, p, vector) : run<float, false>(config, p, vector);
  }
}

void transpose_128x128(const TransposeArguments& a, hopper::Stream stream) {
  const Matrix& q = a.q;
  check_batch("q", a.batch, a.batch_stride);
  if (a.batch == 0) return;
  check_input("q", q);
  require(q.type == Type::e4m3, "q", "must be e4m3", q.type == Type::bf16 ? "bf16" : "fp32");
  if (q.rows == 0 || q.columns == 0) return;
  require(a.scale != nullptr, "scale", "must not be null unless it is empty", "a null pointer");
  check_output("q_t", a.q_t, 1);
  check_output("scale_t", a.scale_t, sizeof(float));
  check_apart("q_t", a.q_t, a.batch * q.rows * q.columns, q, a.batch, a.batch_stride);

  BlockParams p = params_of(q, a.batch_stride, a.q_t, a.scale_t);
  p.input_scale = a.scale;
  for (int i = 0; i < 3; ++i) p.input_scale_strides[i] = a.scale_strides[i];
  const auto config = launch_config("transpose_128x128", blocks_of("q", q, a.batch), kThreads, a.programmatic, stream,
                                    sizeof(BlockShared));
  vectorised(q, nullptr, a.batch, a.batch_stride) ? hopper::launch(config, transpose_blocks_kernel<true>, p)
                                                  : hopper::launch(config, transpose_blocks_kernel<false>, p);
}

}  // namespace quantize
