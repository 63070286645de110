// Host side of swiglu_backward_quantize: grouped or not, gate_up in bf16 or cached in e4m3.
#include "swiglu_backward_quantize.cuh"

#include "checks.h"

namespace activation {
namespace {

using namespace activation_kernels;

constexpr size_t kSharedOfSm = 228 << 10, kReserved = 1 << 10;
static_assert(2 * (sizeof(SwigluCastShared) + kReserved) <= kSharedOfSm, "two blocks hide each other's barriers");

void check_rows(const char* name, const Matrix& m, int64_t bytes) {
  const int64_t stride = m.row_stride * quantize::size_of(m.type);
  require(m.column_stride == 1, name, "must have stride 1 along its columns", m.column_stride);
  require(is_aligned(m.data, bytes), name, bytes == 16 ? "must start at a multiple of 16 bytes" : "must start at a multiple of 8 bytes",
          m.data);
  require(m.rows <= 1 || stride % bytes == 0, name,
          bytes == 16 ? "must have rows at multiples of 16 bytes" : "must have rows at multiples of 8 bytes", stride);
}

void check(const SwigluBackwardQuantizeArguments& a) {
  const Matrix& x = a.gate_up;
  check_gate_up(x);
  check_dy(a.dy, x);
  require(a.dy.type == Type::bf16, "dy", "must be bf16", "another type");
  require(x.type != Type::fp32, "gate_up", "must be bf16 or e4m3", "fp32");
  require(x.columns % (2 * kTile) == 0, "gate_up", "must have 2 I columns, I a multiple of 128", x.columns);
  check_weight(a.weight);
  const bool grouped = a.offsets != nullptr;
  require(a.padded_rows >= 0 && a.padded_rows % kTile == 0, "padded_rows", "must be a multiple of 128", a.padded_rows);
  require(grouped || a.padded_rows == round_up(x.rows, kTile), "padded_rows",
          "must be the rows of gate_up padded to 128 when there are no groups", a.padded_rows);
  require(!grouped || a.padded_offsets != nullptr, "padded_offsets", "must not be null when there are offsets",
          "a null pointer");
  require(a.groups >= 0 && a.groups < (int64_t{1} << 31) - 256, "groups", "must be in 0..2^31-257", a.groups);
  if (x.rows == 0) return;
  require((a.weight.data == nullptr) == (a.dweight == nullptr), "dweight", "must be null exactly when weight is", a.dweight);
  if (x.columns == 0) return;
  check_rows("dy", a.dy, 16);
  check_rows("gate_up", x, x.type == Type::e4m3 ? 8 : 16);
  require((x.type == Type::e4m3) == (a.gate_up_scale != nullptr), "gate_up_scale",
          "must be given exactly when gate_up is e4m3", a.gate_up_scale);
  require(x.type != Type::e4m3 || a.gate_up_scale_stride >= x.rows, "gate_up_scale_stride",
          "must be at least the rows of gate_up", a.gate_up_scale_stride);
  if (a.dweight) quantize::check_output("workspace", a.workspace, sizeof(double));
  quantize::check_output("q", a.q, 16);
  quantize::check_output("scale", a.scale, sizeof(float));
  for (const Matrix* m : {&a.dy, &x}) quantize::check_apart("q", a.q, x.rows * x.columns, *m);
  if (a.padded_rows == 0) return;
  quantize::check_output("q_t", a.q_t, 16);
  quantize::check_output("scale_t", a.scale_t, sizeof(float));
  quantize::check_output("act_t", a.act_t, 16);
  quantize::check_output("act_scale_t", a.act_scale_t, sizeof(float));
}

}  // namespace

void swiglu_backward_quantize(const SwigluBackwardQuantizeArguments& a, hopper::Stream stream) {
  check(a);
  const Matrix& x = a.gate_up;
  const int64_t inner = x.columns / 2, token_tiles = a.padded_rows / kTile;
  const bool grouped = a.offsets != nullptr;
  bool programmatic = a.programmatic;
  if (grouped) {
    const auto config = launch_config("pad_offsets", 1, 32, programmatic, stream);
    hopper::launch(config, pad_offsets_kernel, a.offsets, a.padded_offsets, static_cast<int32_t>(a.groups));
    programmatic = true;
  }
  if (x.rows == 0) return;

  SwigluCastParams p{};
  p.dy = {a.dy.data, a.dy.row_stride, 1};
  p.gate_up = {x.data, x.row_stride, 1};
  p.gate_up_scale = a.gate_up_scale;
  p.gate_up_scale_stride = a.gate_up_scale_stride;
  p.tokens = x.rows;
  p.inner = inner;
  p.column_tiles = static_cast<uint32_t>(inner / kTile);
  p.weight = {a.weight.data, a.weight.stride};
  p.groups = {a.offsets, a.padded_offsets, static_cast<int32_t>(a.groups)};
  p.rows = {static_cast<uint8_t*>(a.q), x.columns, a.scale, round_up(x.rows, 4)};
  p.columns = {static_cast<uint8_t*>(a.q_t), token_tiles, a.scale_t, x.columns};
  p.activation = {static_cast<uint8_t*>(a.act_t), token_tiles, a.act_scale_t, inner};
  p.workspace = a.dweight ? a.workspace : nullptr;
  p.rule.pow2 = a.pow2;

  if (inner > 0) {   // rows of no group: see quantize_128x1
    const int64_t more = grouped ? 2 + (a.groups == 0 ? x.rows / kTile : 0) : 0;
    const uint32_t blocks = quantize::checked_tiles("gate_up", token_tiles + more, p.column_tiles);
    const auto config = launch_config("swiglu_backward_quantize", blocks, kThreads, programmatic, stream,
                                      sizeof(SwigluCastShared));
    x.type == Type::bf16 ? hopper::launch(config, swiglu_backward_quantize_kernel<bf16>, p)
                         : hopper::launch(config, swiglu_backward_quantize_kernel<e4m3>, p);
    programmatic = true;
  }
  if (a.dweight) {
    const uint32_t blocks = quantize::checked_tiles("gate_up", ceil_div(x.rows, kSumThreads), 1);
    const auto config = launch_config("sum_row_weight_gradient", blocks, kSumThreads, programmatic, stream);
    hopper::launch(config, sum_row_weight_gradient_kernel, a.workspace, a.dweight, x.rows, p.column_tiles);
  }
}

}  // namespace activation
