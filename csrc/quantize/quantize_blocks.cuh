// 128 x 128 blocks of weights: one block of threads a block of weights, one scale; the transposed copy from the same
// read on request. And the transposed copy of codes that are quantised already.
#pragma once

#include "column_output.cuh"
#include "row_output.cuh"

namespace quantize_kernels {

struct BlockParams {
  Source x;
  int64_t batch_stride;          // elements of x
  int64_t rows, columns;         // of one matrix
  uint32_t row_tiles, column_tiles;
  const float* input_scale;      // e4m3 input: [batch, row_tiles, column_tiles], strides in elements
  int64_t input_scale_strides[3];
  uint8_t* q;                    // [batch, rows, columns], or null for e4m3 input
  float* scale;                  // [batch, row_tiles, column_tiles], or null
  uint8_t* q_t;                  // [batch, columns, rows], or null
  float* scale_t;                // [batch, column_tiles, row_tiles], or null
  bool aligned_t;                // rows of q_t start at multiples of 16 bytes, and a multiple of 16 of them exists
  ScaleRule rule;
};

struct BlockShared {
  TransposedTile codes;
  alignas(16) uint32_t maxima[kWarps];
};

// Which matrix and which of its blocks this thread block works on.
struct BlockIndex {
  int64_t batch, row, column;
  HOPPER_DEVICE explicit BlockIndex(const BlockParams& p)
      : batch(blockIdx.x / p.column_tiles / p.row_tiles), row(blockIdx.x / p.column_tiles % p.row_tiles),
        column(blockIdx.x % p.column_tiles) {}
  HOPPER_DEVICE Window window(const BlockParams& p) const {
    const int64_t rows = p.rows - row * kTile, columns = p.columns - column * kTile;
    return {row * kTile, column * kTile, static_cast<int>(rows < kTile ? rows : kTile),
            static_cast<int>(columns < kTile ? columns : kTile)};
  }
};

// The largest magnitude of the tile, to every thread, from each thread's own. One barrier.
HOPPER_DEVICE uint32_t block_amax(uint32_t own, uint32_t (&maxima)[kWarps]) {
  const uint32_t warp_largest = hopper::warp_max(own);
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = warp_largest;
  hopper::barrier_sync<0>(kThreads);
  uint32_t amax = 0;
  HOPPER_UNROLL
  for (int w = 0; w < kWarps; ++w) amax = larger(amax, maxima[w]);
  return amax;
}

template <int kPiece>
HOPPER_DEVICE void store_block_transposed(const BlockParams& p, const BlockShared& shared, const BlockIndex& block,
                                          const Window& window) {
  uint8_t* corner = p.q_t + block.batch * p.rows * p.columns + window.column * p.rows + window.row;
  store_transposed<kPiece>(shared.codes, corner, p.rows, window.columns, window.rows, p.aligned_t);
}

template <class T, bool kTransposed, bool kVector>
HOPPER_KERNEL_BLOCKS(kThreads, (whole_tiles_per_sm<T, kVector>)) quantize_blocks_kernel(const BlockParams p) {
  auto& shared = *reinterpret_cast<BlockShared*>(hopper::dynamic_smem());
  const BlockIndex block(p);
  const Window window = block.window(p);
  const Place at;

  hopper::grid_dependency_wait();
  Source x = p.x;
  x.data = static_cast<const T*>(x.data) + block.batch * p.batch_stride;
  Patch<T> patch;
  patch.template load<kVector>(x, window, at);
  hopper::grid_dependency_launch();

  const uint32_t own[kRows] = {patch.row_amax(0), patch.row_amax(1), patch.row_amax(2), patch.row_amax(3)};
  const uint32_t largest = larger(larger(own[0], own[1]), larger(own[2], own[3]));
  const TileScale scale = tile_scale(block_amax(largest, shared.maxima), p.rule);
  const float m = scale.multiplier;

  if (threadIdx.x == 0) {
    p.scale[(block.batch * p.row_tiles + block.row) * p.column_tiles + block.column] = scale.scale;
    if constexpr (kTransposed) {
      p.scale_t[(block.batch * p.column_tiles + block.column) * p.row_tiles + block.row] = scale.scale;
    }
  }
  Codes codes;
  encode_rows(patch, own, {m, m, m, m}, codes);
  uint8_t* corner = p.q + (block.batch * p.rows + window.row) * p.columns + window.column;
  store_rows<T, kVector>(codes, corner, p.columns, window, at);

  if constexpr (kTransposed) {
    put_codes<Patch<T>>(codes, shared.codes, at);
    hopper::barrier_sync<0>(kThreads);
    store_block_transposed<Patch<T>::kPiece>(p, shared, block, window);
  }
}

template <bool kVector>
HOPPER_KERNEL(kThreads) transpose_blocks_kernel(const BlockParams p) {
  auto& shared = *reinterpret_cast<BlockShared*>(hopper::dynamic_smem());
  const BlockIndex block(p);
  const Window window = block.window(p);
  const Place at;

  hopper::grid_dependency_wait();
  Source x = p.x;
  x.data = static_cast<const e4m3*>(x.data) + block.batch * p.batch_stride;
  CodedPatch patch;
  patch.load<kVector>(x, window, at);
  if (threadIdx.x == 0) {
    const int64_t* stride = p.input_scale_strides;
    p.scale_t[(block.batch * p.column_tiles + block.column) * p.row_tiles + block.row] =
        p.input_scale[block.batch * stride[0] + block.row * stride[1] + block.column * stride[2]];
  }
  hopper::grid_dependency_launch();

  put_codes<CodedPatch>(patch.words, shared.codes, at);
  hopper::barrier_sync<0>(kThreads);
  store_block_transposed<CodedPatch::kPiece>(p, shared, block, window);
}

}  // namespace quantize_kernels
