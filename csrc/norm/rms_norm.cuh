// RMSNorm forward: a team of warps takes 4 whole rows, a thread 16 columns of them at a time (the patch of quantize).
//
//   load [, add residual, store the sum] -> squares -> sum over the team (one barrier) -> rstd -> multiply by rstd and
//   weight -> store, or maxima, scales and codes as quantize_1x128 writes them
//
// kHeld: a thread has one patch, and keeps it in registers. Without it rows may be of any length and layout: patches
// wait in shared memory, or, where that is full, x (the sum, with a residual) is read again, from L2.
#pragma once

#include "../quantize/own_patches.cuh"
#include "../quantize/row_output.cuh"
#include "../quantize/row_sums.cuh"
#include "weight.cuh"

namespace norm_kernels {

struct NormParams {
  Source x, residual;            // residual: with kResidual
  int64_t rows, columns;
  uint32_t tiles;                // of 128 columns
  WeightRow weight;
  float width, eps;              // columns, as the divisor
  void* y;                       // without kQuantize
  void* new_residual;            // with kResidual
  float* rstd;
  RowOutput out;                 // with kQuantize
  ScaleRule rule;
  uint32_t warps;                // of a team
  uint32_t teams;                // of a block
  uint32_t passes;               // patches of a thread
  bool vector;                   // without kHeld: whether 16-byte accesses are allowed
  bool keep;                     // without kHeld: whether shared memory has room for the row
};

// Most threads of a block. Two blocks of held rows fit on an SM: 114 KB of x in flight.
template <class T, bool kHeld>
inline constexpr int norm_threads = kHeld ? 448 : sizeof(T) == 2 ? 512 : 256;
constexpr uint32_t kHeldTiles = norm_threads<bf16, true> / 8;
static_assert(kHeldTiles * kTile == 7168, "the model's hidden size");

// Loads a patch; adds the residual to it, rounded to T, and stores the sum.
template <class T, bool kResidual, bool kVector>
HOPPER_DEVICE void fetch(const NormParams& p, const Window& window, Place at, Patch<T>& patch) {
  patch.template load<kVector>(p.x, window, at);
  if constexpr (kResidual) {
    Patch<T> residual;
    residual.template load<kVector>(p.residual, window, at);
    HOPPER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HOPPER_UNROLL
      for (int i = 0; i < kColumns; i += 2) {
        patch.set(r, i, hopper::add_rn(patch.value(r, i), residual.value(r, i)),
                  hopper::add_rn(patch.value(r, i + 1), residual.value(r, i + 1)));
      }
    }
    patch.template store<kVector>(p.new_residual, p.columns, window, at);
  }
}

template <class T>
HOPPER_DEVICE void add_squares(const Patch<T>& patch, int lane, double (&own)[kRows]) {
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float terms[kColumns];
    HOPPER_UNROLL
    for (int i = 0; i < kColumns; ++i) terms[i] = hopper::mul_rn(patch.value(r, i), patch.value(r, i));
    own[r] += sum_of_columns<Patch<T>::kPiece>(terms, lane);
  }
}

// (x rstd) weight, to y or to codes.
template <class T, bool kQuantize, bool kVector>
HOPPER_DEVICE void emit(const NormParams& p, const Window& window, Place at, const float (&rstd)[kRows],
                        Patch<T>& patch) {
  constexpr int kPiece = Patch<T>::kPiece;
  HOPPER_UNROLL
  for (int first = 0; first < kColumns; first += kPiece) {
    float w[kPiece];
    const int column = Patch<T>::column(first, at.lane);
    load_weight<kPiece, kVector>(p.weight, window.column + column, window.columns - column, w);
    HOPPER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HOPPER_UNROLL
      for (int i = 0; i < kPiece; i += 2) {
        patch.set(r, first + i, hopper::mul_rn(hopper::mul_rn(patch.value(r, first + i), rstd[r]), w[i]),
                  hopper::mul_rn(hopper::mul_rn(patch.value(r, first + i + 1), rstd[r]), w[i + 1]));
      }
    }
  }
  if constexpr (kQuantize) {
    quantize_patch_rows<T, kVector>(patch, p.out, window, p.rule, at);
    if (window.rows > 0 && at.lane >= window.rows && at.lane < kRows) {   // rows that only pad the scales to 4
      p.out.scale[window.column / kTile * p.out.scale_stride + window.row + at.lane] = 1.0f;
    }
  } else {
    patch.template store<kVector>(p.y, p.columns, window, at);
  }
}

template <class T, bool kHeld, bool kResidual, bool kQuantize>
HOPPER_KERNEL_BLOCKS((norm_threads<T, kHeld>), (kHeld && sizeof(T) == 2 && !kResidual ? 2 : 1))
rms_norm_kernel(const NormParams p) {
  const uint32_t team = threadIdx.x / 32 / p.warps, groups = 4 * p.warps, group = threadIdx.x / 8 - team * groups;
  const int64_t row = (int64_t{blockIdx.x} * p.teams + team) * kRows;
  const int rows = static_cast<int>(p.rows - row < kRows ? p.rows - row : kRows);   // none past the end
  Place at;
  at.group = 0;                  // the window of a group of 8 lanes is its own 4 rows by 128 columns
  const auto window = [&](uint32_t pass) {
    const uint32_t tile = pass * groups + group;
    const int64_t column = int64_t{tile} * kTile, columns = p.columns - column < kTile ? p.columns - column : kTile;
    const bool exists = rows > 0 && tile < p.tiles;
    return Window{row, column, exists ? rows : 0, exists ? static_cast<int>(columns) : 0};
  };

  auto* room = reinterpret_cast<double*>(hopper::dynamic_smem());
  const OwnPatches<T> kept{reinterpret_cast<uint4*>(room + blockDim.x / 32 * kRows)};

  hopper::grid_dependency_wait();
  Patch<T> patch;
  double own[kRows] = {0, 0, 0, 0};
  if constexpr (kHeld) {
    fetch<T, kResidual, true>(p, window(0), at, patch);
    hopper::grid_dependency_launch();
    add_squares(patch, at.lane, own);
  } else {
    for (uint32_t pass = 0; pass < p.passes; ++pass) {
      p.vector ? fetch<T, kResidual, true>(p, window(pass), at, patch)
               : fetch<T, kResidual, false>(p, window(pass), at, patch);
      if (p.keep) kept.put(pass, patch);
      add_squares(patch, at.lane, own);
    }
  }

  const double squares = team_row_sums(group_row_sums(own, at.lane), team * p.warps, p.warps, room);
  const float mean = hopper::div_rn(static_cast<float>(squares), p.width);
  const float mine = hopper::rsqrt_approximate(hopper::add_rn(mean, p.eps));
  if (group == 0 && at.lane < rows && at.lane < kRows) p.rstd[row + at.lane] = mine;
  float rstd[kRows];
  spread_rows(mine, rstd);

  if constexpr (kHeld) {
    emit<T, kQuantize, true>(p, window(0), at, rstd, patch);
  } else {
    const Source again = kResidual ? Source{p.new_residual, p.columns, 1} : p.x;   // the thread's own stores
    for (uint32_t pass = 0; pass < p.passes; ++pass) {
      if (p.keep) {
        kept.take(pass, patch);
      } else {
        p.vector ? patch.template load<true>(again, window(pass), at) : patch.template load<false>(again, window(pass), at);
      }
      p.vector ? emit<T, kQuantize, true>(p, window(pass), at, rstd, patch)
               : emit<T, kQuantize, false>(p, window(pass), at, rstd, patch);
    }
    hopper::grid_dependency_launch();
  }
}

}  // namespace norm_kernels
