// SwiGLU backward: a team of up to 4 warps takes 4 whole rows, 2048 columns of I at a time, so that the gradient of a
// row's weight is summed without leaving the block. Nothing waits for that sum but its own store.
//
//   gate, up, dy -> shared memory, each thread for itself | dgate, dup in their places, terms of dweight -> fp64 of the
//   thread | dgate, dup -> store ... | sum over the team -> dweight
#pragma once

#include "../quantize/own_patches.cuh"
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

// In flight on an SM: 4 blocks of 48 KB for bf16, 2 of 96 KB for fp32.
template <class T>
inline constexpr size_t backward_patches = OwnPatches<T>::bytes(3, kBackwardThreads);

template <class T, bool kVector>
HOPPER_KERNEL_BLOCKS(kBackwardThreads, sizeof(T) == 2 ? 4 : 2) swiglu_backward_kernel(const SwigluBackwardParams p) {
  const OwnPatches<T> own{reinterpret_cast<uint4*>(hopper::dynamic_smem())};   // gate, up, dy
  const uint32_t team = threadIdx.x / 32 / p.warps, groups = 4 * p.warps, group = threadIdx.x / 8 - team * groups;
  const int64_t row = (int64_t{blockIdx.x} * p.teams + team) * kRows;
  const int rows = static_cast<int>(p.rows - row < kRows ? p.rows - row : kRows);   // none past the end
  Place at;
  at.group = 0;
  const Window first{row, 0, rows, kTile};

  hopper::grid_dependency_wait();
  const float weight = load_weight(p.weight, first, at);
  double sum = 0;
  for (uint32_t pass = 0; pass < p.passes; ++pass) {
    const uint32_t tile = pass * groups + group;
    const int64_t column = int64_t{tile} * kTile;
    const bool exists = rows > 0 && tile < p.tiles;
    const Window window{row, column, exists ? rows : 0,
                        exists ? static_cast<int>(p.inner - column < kTile ? p.inner - column : kTile) : 0};
    const Window up_window = shifted(window, p.inner);
    Patch<T> patch;
    if constexpr (kVector) {
      own.start_copy(0, p.gate_up, window, at);
      own.start_copy(1, p.gate_up, up_window, at);
      own.start_copy(2, p.dy, window, at);
      hopper::cp_async_commit();
      hopper::cp_async_wait<0>();
    } else {
      patch.template load<false>(p.gate_up, window, at);
      own.put(0, patch);
      patch.template load<false>(p.gate_up, up_window, at);
      own.put(1, patch);
      patch.template load<false>(p.dy, window, at);
      own.put(2, patch);
    }
    sum += replace_by_gradients<T>(own.first_slot(0), own.first_slot(1), own.first_slot(2), weight, at.lane);
    own.take(0, patch);
    patch.template store<kVector>(p.dgate_up, 2 * p.inner, window, at);
    own.take(1, patch);
    patch.template store<kVector>(p.dgate_up, 2 * p.inner, up_window, at);
  }
  hopper::grid_dependency_launch();
  if (p.dweight == nullptr) return;
  sum = team_row_sums(sum, team * p.warps, p.warps, static_cast<double*>(own.end(3)));
  if (group == 0 && at.lane < kRows && at.lane < rows) p.dweight[row + at.lane] = static_cast<float>(sum);
}

}  // namespace activation_kernels
