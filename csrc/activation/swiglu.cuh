// SwiGLU forward: every warp takes 16 rows by 128 columns of gate and of up and is done; no shared memory, no barrier.
#pragma once

#include "../quantize/row_output.cuh"
#include "steps.cuh"

namespace activation_kernels {

constexpr int kSwigluThreads = 128;
constexpr int kRowsOfBlock = kSwigluThreads / 8 * kRows;   // 64

struct SwigluParams {
  Source gate_up;
  int64_t rows, inner;
  uint32_t column_tiles;
  Weights weight;
  void* y;                       // without kQuantize
  RowOutput out;                 // with it
  ScaleRule rule;
};

// In flight on an SM: 4 blocks of 32 KB for bf16, 2 of 64 KB for fp32.
template <class T, bool kQuantize, bool kVector>
HOPPER_KERNEL_BLOCKS(kSwigluThreads, sizeof(T) == 2 ? 4 : 2) swiglu_kernel(const SwigluParams p) {
  const int64_t row = int64_t{blockIdx.x / p.column_tiles} * kRowsOfBlock;
  const int64_t column = int64_t{blockIdx.x % p.column_tiles} * kTile;
  const Window window{row, column, static_cast<int>(p.rows - row < kRowsOfBlock ? p.rows - row : kRowsOfBlock),
                      static_cast<int>(p.inner - column < kTile ? p.inner - column : kTile)};
  const Place at;

  hopper::grid_dependency_wait();
  Patch<T> gate, up;
  float weight[kRows];
  gate.template load<kVector>(p.gate_up, window, at);
  up.template load<kVector>(p.gate_up, shifted(window, p.inner), at);
  spread_rows(load_weight(p.weight, window, at), weight);
  hopper::grid_dependency_launch();

  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HOPPER_UNROLL
    for (int i = 0; i < kColumns; i += 2) {
      gate.set(r, i, swiglu_of(gate.value(r, i), up.value(r, i), weight[r]),
               swiglu_of(gate.value(r, i + 1), up.value(r, i + 1), weight[r]));
    }
  }
  if constexpr (kQuantize) {
    if (row == 0) pad_row_scales(p.out, p.rows, column);
    quantize_patch_rows<T, kVector>(gate, p.out, window, p.rule, at);
  } else {
    gate.template store<kVector>(p.y, p.inner, window, at);
  }
}

}  // namespace activation_kernels
