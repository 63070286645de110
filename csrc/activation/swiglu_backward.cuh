// SwiGLU backward: a team of up to 4 warps takes 4 whole rows, 2048 columns of I at a time, so that the gradient of a
// row's weight is summed without leaving the block. Nothing waits for that sum but its own store.
//
//   load gate, up, dy -> dgate, dup -> store | terms of dweight -> fp64 of the thread ... -> sum over the team -> store
#pragma once

#include "steps.cuh"

namespace activation_kernels {

constexpr int kBackwardThreads = 128;

struct SwigluBackwardParams {
  Source dy, gate_up;
  int64_t rows, inner;
  uint32_t tiles;                // of 128 columns of I
  Weights weight;
  void* dgate_up;
  float* dweight;
  uint32_t warps, teams, passes; // as in rms_norm
};

// In flight on an SM: 2 blocks of 48 KB for bf16, of 96 KB for fp32.
template <class T, bool kVector>
HOPPER_KERNEL_BLOCKS(kBackwardThreads, 2) swiglu_backward_kernel(const SwigluBackwardParams p) {
  const uint32_t team = threadIdx.x / 32 / p.warps, groups = 4 * p.warps, group = threadIdx.x / 8 - team * groups;
  const int64_t row = (int64_t{blockIdx.x} * p.teams + team) * kRows;
  const int rows = static_cast<int>(p.rows - row < kRows ? p.rows - row : kRows);   // none past the end
  Place at;
  at.group = 0;
  const Window first{row, 0, rows, kTile};

  hopper::grid_dependency_wait();
  float weight[kRows];
  spread_rows(load_weight(p.weight, first, at), weight);
  double own[kRows] = {0, 0, 0, 0};
  for (uint32_t pass = 0; pass < p.passes; ++pass) {
    const uint32_t tile = pass * groups + group;
    const int64_t column = int64_t{tile} * kTile;
    const bool exists = rows > 0 && tile < p.tiles;
    const Window window{row, column, exists ? rows : 0,
                        exists ? static_cast<int>(p.inner - column < kTile ? p.inner - column : kTile) : 0};
    const Window up_window = shifted(window, p.inner);
    Patch<T> gate, up, dy;
    gate.template load<kVector>(p.gate_up, window, at);
    up.template load<kVector>(p.gate_up, up_window, at);
    dy.template load<kVector>(p.dy, window, at);
    HOPPER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float terms[kColumns];
      HOPPER_UNROLL
      for (int i = 0; i < kColumns; i += 2) {
        const SwigluGradient a = swiglu_gradient(dy.value(r, i), gate.value(r, i), up.value(r, i), weight[r]);
        const SwigluGradient b = swiglu_gradient(dy.value(r, i + 1), gate.value(r, i + 1), up.value(r, i + 1), weight[r]);
        gate.set(r, i, a.dgate, b.dgate);
        up.set(r, i, a.dup, b.dup);
        terms[i] = a.term, terms[i + 1] = b.term;
      }
      if (p.dweight != nullptr) own[r] += sum_of_columns<Patch<T>::kPiece>(terms, at.lane);
    }
    gate.template store<kVector>(p.dgate_up, 2 * p.inner, window, at);
    up.template store<kVector>(p.dgate_up, 2 * p.inner, up_window, at);
  }
  hopper::grid_dependency_launch();
  if (p.dweight == nullptr) return;
  const double sum = row_sums(own, team * p.warps, p.warps, reinterpret_cast<double*>(hopper::dynamic_smem()));
  if (group == 0 && at.lane < kRows && at.lane < rows) p.dweight[row + at.lane] = static_cast<float>(sum);
}

}  // namespace activation_kernels
