// Host side of the permutation.
#include "permute.cuh"

#include <algorithm>

#include "checks.h"
#include "move.h"

namespace moe {

using namespace moe_kernels;

static_assert(plan_smem_bytes(1, kMaxBins + 1) <= kPlanSmem, "the counters of one warp and the prefixes fit");
static_assert(plan_smem_bytes(kPlanWarps, 513) <= kPlanSmem, "512 experts leave room for all warps");

void move_rows(const char* name, const MoveArguments& a, hopper::Stream stream) {
  if (a.tokens == 0 || a.columns == 0) return;
  MoveParams p{a.x.data, a.x.row_stride, a.x.column_stride, a.columns, a.row_of_slot, static_cast<int32_t>(a.top_k), a.out};
  const auto config = launch_config(name, static_cast<uint32_t>(a.tokens), kMoveThreads, a.programmatic, stream);
  if (whole_vectors(a.x, a.tokens, a.columns, a.element_bytes) && is_aligned(a.out, 16)) {
    const int64_t elements = 16 / a.element_bytes;
    p.row_stride /= elements, p.columns /= elements, p.column_stride = 1;
    hopper::launch(config, move_rows_kernel<uint4>, p);
  } else if (a.element_bytes == 1) hopper::launch(config, move_rows_kernel<uint8_t>, p);
  else if (a.element_bytes == 2) hopper::launch(config, move_rows_kernel<uint16_t>, p);
  else if (a.element_bytes == 4) hopper::launch(config, move_rows_kernel<uint32_t>, p);
  else hopper::launch(config, move_rows_kernel<uint64_t>, p);
}

namespace {

// Warps that take at least four steps each before another is worth its prefix; then blocks.
void launch_plan(const PermuteArguments& a, hopper::Stream stream) {
  const int64_t rows = a.tokens * a.top_k, bins = a.experts + 1;
  const int64_t fitting = kPlanSmem / (4 * bins) - 3;
  const int64_t most = std::min<int64_t>(kPlanWarps, fitting);
  const int64_t warps = a.warps ? a.warps : std::clamp<int64_t>(ceil_div(rows, 128), 1, most);
  int64_t blocks = a.blocks ? a.blocks : 1;
  while (!a.blocks && blocks < kPlanBlocks && rows > blocks * warps * 128) blocks *= 2;
  check_range("warps", warps, 1, most);
  check_range("blocks", blocks, 1, kPlanBlocks);

  PlanParams p{};
  p.topk_idx = a.topk_idx.data;
  p.idx_strides[0] = a.topk_idx.row_stride, p.idx_strides[1] = a.topk_idx.column_stride;
  p.rows = static_cast<uint32_t>(rows);
  p.top_k = static_cast<uint32_t>(a.top_k);
  p.experts = static_cast<uint32_t>(a.experts);
  for (p.bin_bits = 1; (1 << p.bin_bits) < bins;) ++p.bin_bits;
  p.offsets = a.offsets;
  p.source = a.source;
  p.row_of_slot = a.row_of_slot;
  auto config = launch_config("permute, plan", static_cast<uint32_t>(blocks), static_cast<int>(32 * warps), a.programmatic,
                              stream, static_cast<size_t>(plan_smem_bytes(warps, bins)));
  config.cluster = static_cast<uint32_t>(blocks);
  hopper::launch(config, plan_kernel, p);
}

}  // namespace

void permute(const PermuteArguments& a, hopper::Stream stream) {
  check_rows(a.tokens, a.top_k);
  check_range("num_experts", a.experts, 1, kMaxBins);
  require(a.columns >= 0, "x", "must not have a negative number of columns", a.columns);
  require(a.element_bytes == 1 || a.element_bytes == 2 || a.element_bytes == 4 || a.element_bytes == 8, "x",
          "must have elements of 1, 2, 4 or 8 bytes", a.element_bytes);
  const int64_t rows = a.tokens * a.top_k, tiles = ceil_div(a.columns, 128), padded_rows = round_up(rows, 4);
  const auto element = static_cast<uintptr_t>(a.element_bytes);
  check_table("x", a.x, a.tokens, a.columns, element);
  check_table("topk_idx", a.topk_idx, a.tokens, a.top_k, sizeof(int64_t));
  check_output("x_perm", a.x_perm, a.columns == 0 ? 0 : rows, element);
  check_output("offsets", a.offsets, a.experts + 1, sizeof(int32_t));
  check_output("source", a.source, rows, sizeof(int64_t));
  check_output("row_of_slot", a.row_of_slot, rows, sizeof(int32_t));
  if (a.scale || a.scale_perm) {
    check_output("scale", a.scale, rows * tiles, sizeof(float));
    check_output("scale_perm", a.scale_perm, rows * tiles, sizeof(float));
    require(a.scale_stride >= a.tokens || tiles <= 1, "scale", "must have a row for each tile of 128 columns", a.scale_stride);
    require(tiles <= 65535 * int64_t{kScaleTiles}, "x", "must have fewer tiles of 128 columns", tiles);
  }

  launch_plan(a, stream);
  move_rows("permute", {a.x, a.element_bytes, a.tokens, a.columns, a.top_k, a.row_of_slot, a.x_perm, a.programmatic}, stream);
  if (!a.scale || rows == 0 || tiles == 0) return;
  const MoveScalesParams p{a.scale, a.scale_stride, rows, padded_rows, tiles, a.source, static_cast<uint32_t>(a.top_k),
                           a.scale_perm};
  auto config = launch_config("permute, scales", static_cast<uint32_t>(ceil_div(padded_rows, kScaleThreads)), kScaleThreads,
                              a.programmatic, stream);
  config.grid.y = static_cast<unsigned>(ceil_div(tiles, kScaleTiles));
  hopper::launch(config, move_scales_kernel, p);
}

}  // namespace moe
