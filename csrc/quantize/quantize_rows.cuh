// 1 x 128 alone: every warp takes 16 rows by 128 columns and is done; no shared memory, no barrier.
#pragma once

#include "row_output.cuh"

namespace quantize_kernels {

constexpr int kRowThreads = 128;
constexpr int kRowsOfBlock = kRowThreads / 8 * kRows;   // 64

struct RowParams {
  Source x;
  int64_t rows, columns;
  uint32_t column_tiles;
  RowOutput out;
  ScaleRule rule;
};

// In flight on an SM: 8 blocks of 16 KB for bf16, 5 of 32 KB for fp32.
template <class T, bool kVector>
HOPPER_KERNEL_BLOCKS(kRowThreads, sizeof(T) == 2 && kVector ? 8 : 4) quantize_rows_kernel(const RowParams p) {
  const int64_t row = int64_t{blockIdx.x / p.column_tiles} * kRowsOfBlock;
  const int64_t column = int64_t{blockIdx.x % p.column_tiles} * kTile;
  const Window window{row, column, static_cast<int>(p.rows - row < kRowsOfBlock ? p.rows - row : kRowsOfBlock),
                      static_cast<int>(p.columns - column < kTile ? p.columns - column : kTile)};
  const Place at;

  hopper::grid_dependency_wait();
  Patch<T> patch;
  patch.template load<kVector>(p.x, window, at);
  hopper::grid_dependency_launch();

  if (row == 0) pad_row_scales(p.out, p.rows, column);
  quantize_patch_rows<T, kVector>(patch, p.out, window, p.rule, at);
}

}  // namespace quantize_kernels
