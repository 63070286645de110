// SwiGLU backward and the casts behind it, from one read. One block a tile of 128 tokens by 128 columns of I:
//
//   gate, up, dy -> shared memory, each thread for itself (e4m3 gate_up: decoded to bf16) | dgate, dup and the activation in
//   their places, terms of dweight -> workspace | for each of the three: to registers | rows (not of the activation) |
//   columns, through a transposed tile that takes its place
//
// Rows and columns are those of quantize_1x128_128x1. A second kernel adds up what the
// tiles of a row leave in the workspace.
#pragma once

#include "../quantize/column_output.cuh"
#include "../quantize/groups.cuh"
#include "../quantize/own_patches.cuh"
#include "../quantize/row_output.cuh"
#include "steps.cuh"

namespace activation_kernels {

using quantize_kernels::Groups;   // of tokens

struct SwigluCastParams {
  Source dy, gate_up;
  const float* gate_up_scale;    // of e4m3: [2 column_tiles, gate_up_scale_stride]
  int64_t gate_up_scale_stride;
  int64_t tokens, inner;
  uint32_t column_tiles;         // of I
  Weights weight;
  Groups groups;
  RowOutput rows;                // of dgate_up
  ColumnOutput columns, activation;
  double* workspace;             // [column_tiles, tokens]; null without a weight
  ScaleRule rule;
};

// Each thread's own patches. A part's place is free once its columns are under way: the transposed tile lies there.
union SwigluPart {
  uint4 patches[OwnPatches<bf16>::bytes(1, kThreads) / 16];
  TransposedTile codes;
};

struct SwigluCastShared {
  SwigluPart parts[3];           // gate, up, dy; then dgate, dup, the activation
  ColumnScratch scratch;

  HOPPER_DEVICE OwnPatches<bf16> own(int part) { return {parts[part].patches}; }
};

// e4m3 with 1 x 128 scales, each lane the columns that it has of bf16: 8-byte loads.
struct CodedHalf {
  uint2 codes[kRows][2];

  HOPPER_DEVICE void load(const Source& source, const Window& window, Place at) {
    const uint8_t* line = static_cast<const uint8_t*>(source.data) + (window.row + at.group * kRows) * source.row_stride +
                          window.column + at.lane * 8;
    HOPPER_UNROLL
    for (int r = 0; r < kRows; ++r, line += source.row_stride) {
      const bool exists = at.group * kRows + r < window.rows;
      codes[r][0] = exists ? hopper::load_stream(reinterpret_cast<const uint2*>(line)) : uint2{0, 0};
      codes[r][1] = exists ? hopper::load_stream(reinterpret_cast<const uint2*>(line + 64)) : uint2{0, 0};
    }
  }

  // Products, rounded to fp32 and then to bf16, as dequantize_1x128 gives them.
  HOPPER_DEVICE void decode(const float (&scale)[kRows], Patch<bf16>& patch) const {
    HOPPER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const uint32_t words[4] = {codes[r][0].x, codes[r][0].y, codes[r][1].x, codes[r][1].y};
      HOPPER_UNROLL
      for (int w = 0; w < 4; ++w) {
        const float4 v = hopper::e4m3x4_to_float4(words[w]);
        patch.set(r, 4 * w, mul_rn(v.x, scale[r]), mul_rn(v.y, scale[r]));
        patch.set(r, 4 * w + 2, mul_rn(v.z, scale[r]), mul_rn(v.w, scale[r]));
      }
    }
  }
};

HOPPER_DEVICE void load_scales(const float* scales, const Window& window, Place at, float (&rows)[kRows]) {
  const int row = at.group * kRows + at.lane % kRows;
  spread_rows(row < window.rows ? scales[window.row + row] : 1.0f, rows);
}

// All of a tile to shared memory, each thread for itself. In bf16 all loads are under way at once.
template <class G>
HOPPER_DEVICE void load_inputs(const SwigluCastParams& p, const Window& window, Place at, SwigluCastShared& shared) {
  const Window up_window = shifted(window, p.inner);
  shared.own(2).start_copy(0, p.dy, window, at);
  if constexpr (sizeof(G) == 2) {
    shared.own(0).start_copy(0, p.gate_up, window, at);
    shared.own(1).start_copy(0, p.gate_up, up_window, at);
    hopper::cp_async_commit();
  } else {
    hopper::cp_async_commit();
    CodedHalf coded[2];
    float scale[2][kRows];
    coded[0].load(p.gate_up, window, at);
    coded[1].load(p.gate_up, up_window, at);
    const float* scales = p.gate_up_scale + window.column / kTile * p.gate_up_scale_stride;
    load_scales(scales, window, at, scale[0]);
    load_scales(scales + p.column_tiles * p.gate_up_scale_stride, window, at, scale[1]);
    HOPPER_UNROLL
    for (int half = 0; half < 2; ++half) {
      Patch<bf16> patch;
      coded[half].decode(scale[half], patch);
      shared.own(half).put(0, patch);
    }
  }
  hopper::cp_async_wait<0>();
}

template <class G>
HOPPER_KERNEL_BLOCKS(kThreads, 2) swiglu_backward_quantize_kernel(const SwigluCastParams p) {
  auto& shared = *reinterpret_cast<SwigluCastShared*>(hopper::dynamic_smem());
  const int64_t tile = blockIdx.x / p.column_tiles, column = int64_t{blockIdx.x % p.column_tiles} * kTile;
  const Place at;

  hopper::grid_dependency_wait();
  const Span span = span_of_tile(p.groups, p.tokens, tile);
  const Window window = window_of(span, p.tokens, p.inner, column);
  load_inputs<G>(p, window, at, shared);
  const float weight = load_weight(p.weight, window, at);
  hopper::grid_dependency_launch();

  const double dweight = replace_by_gradients<bf16>(shared.own(0).first_slot(0), shared.own(1).first_slot(0),
                                                    shared.own(2).first_slot(0), weight, at.lane);
  const int row = at.group * kRows + at.lane;
  if (p.workspace != nullptr && at.lane < kRows && row < window.rows) {
    p.workspace[column / kTile * p.tokens + window.row + row] = dweight;
  }

  const bool with_columns = tile < p.columns.token_tiles;   // false: tokens of no group that found no padding tile
  if (tile == 0) {
    pad_row_scales(p.rows, p.tokens, column);
    pad_row_scales(p.rows, p.tokens, column + p.inner);
  }
  const int parts = with_columns ? 3 : 2;
  for (int part = 0; part < parts; ++part) {
    const Window here = shifted(window, part == 1 ? p.inner : 0);
    Patch<bf16> patch;
    shared.own(part).take(0, patch);
    if (part < 2) quantize_patch_rows<bf16, true>(patch, p.rows, here, p.rule, at);
    if (!with_columns) continue;
    if (!span.in_group) patch.clear();
    const ColumnOutput out{part < 2 ? p.columns.q_t : p.activation.q_t, p.columns.token_tiles,
                           part < 2 ? p.columns.scale_t : p.activation.scale_t,
                           part < 2 ? p.columns.scale_t_stride : p.activation.scale_t_stride};
    quantize_patch_columns(patch, out, here, tile, p.rule, shared.parts[part].codes, shared.scratch,
                           at);
  }
}

constexpr int kSumThreads = 256;

// dweight[row] = the sum of the row's tiles, in order.
HOPPER_KERNEL(kSumThreads) sum_row_weight_gradient_kernel(const double* workspace, float* dweight, int64_t tokens,
                                                          uint32_t column_tiles) {
  const int64_t row = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  hopper::grid_dependency_wait();
  double sum = 0;
  if (row < tokens) {
    for (uint32_t tile = 0; tile < column_tiles; ++tile) sum += workspace[tile * tokens + row];
  }
  hopper::grid_dependency_launch();
  if (row < tokens) dweight[row] = static_cast<float>(sum);
}

}  // namespace activation_kernels
