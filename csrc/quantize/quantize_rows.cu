// Host side of quantize_1x128.
#include "quantize_rows.cuh"

#include "checks.h"

namespace quantize {
namespace {

using namespace quantize_kernels;

template <class T>
void run(const hopper::LaunchConfig& config, const RowParams& params, bool vector) {
  vector ? hopper::launch(config, quantize_rows_kernel<T, true>, params)
         : hopper::launch(config, quantize_rows_kernel<T, false>, params);
}

}  // namespace

void quantize_1x128(const RowsArguments& a, hopper::Stream stream) {
  const Matrix& x = a.x;
  check_input("x", x);
  require(x.type != Type::e4m3, "x", "must be bf16 or fp32", "e4m3");
  if (x.rows == 0 || x.columns == 0) return;
  check_output("q", a.q, 1);
  check_output("scale", a.scale, sizeof(float));
  check_apart("q", a.q, x.rows * x.columns, x);

  RowParams p{};
  p.x = {x.data, x.row_stride, x.column_stride};
  p.rows = x.rows;
  p.columns = x.columns;
  p.column_tiles = static_cast<uint32_t>(ceil_div(x.columns, kTile));
  p.out = {static_cast<uint8_t*>(a.q), x.columns, a.scale, round_up(x.rows, 4)};
  p.rule = {a.pow2, a.official_clamp};
  const uint32_t blocks = checked_tiles("x", ceil_div(x.rows, kRowsOfBlock), ceil_div(x.columns, kTile));
  const auto config = launch_config("quantize_1x128", blocks, kRowThreads, a.programmatic, stream);
  const bool vector = vectorised(x, a.q);
  x.type == Type::bf16 ? run<bf16>(config, p, vector) : run<float>(config, p, vector);
}

}  // namespace quantize
