// AdamW on a list of weights that leaves their FP8 copies too: a block takes one 128 x 128 tile of one weight.
//
//   find the tensor and tile
//   | for each of a thread's 4 rows: 16 elements of p, g, m, v in flight | step | p, m, v, out stored | new p to shared memory
//   | the next kernel may start | maximum of the tile | scale | new p back, encoded, q stored | q_t through shared memory
//
// New masters wait in shared memory, each thread's own without a barrier: 64 registers of them would leave none for loads in
// flight, or unroll the step 64 times. The step is adamw.cuh's, the codes are quantize_128x128's, bit for bit.
#pragma once

#include "../quantize/own_patches.cuh"
#include "../quantize/quantize_blocks.cuh"
#include "adamw.cuh"

namespace optimizer_kernels {

using quantize_kernels::kTile;

struct QuantizedEntry {
  AdamwEntry step;
  uint8_t* q;                    // [batch, rows, columns]
  float* scale;                  // [batch, row_tiles, column_tiles]
  uint8_t* q_t;                  // [batch, columns, rows], or null
  float* scale_t;                // [batch, column_tiles, row_tiles]
  int32_t rows, columns;         // of one matrix
};
static_assert(sizeof(QuantizedEntry) == 104);

struct QuantizedParams {
  TensorTable<QuantizedEntry, 37> table;
  AdamwStep step;
  const float* grad_scale;       // on the device, or null
  quantize_kernels::ScaleRule rule;
};
static_assert(sizeof(QuantizedParams) <= kParameterBytes);

using NewMasters = quantize_kernels::OwnPatches<float>;
constexpr size_t kMasterBytes = NewMasters::bytes(1, kThreads);
static_assert(kThreads == quantize_kernels::kThreads);
static_assert(sizeof(quantize_kernels::TransposedTile) <= kMasterBytes);   // takes their place once they are encoded

constexpr size_t kQuantizedSmem = kMasterBytes + sizeof(uint32_t) * quantize_kernels::kWarps;
constexpr int kQuantizedBlocks = 3;                                        // of an SM
static_assert(kQuantizedBlocks * (kQuantizedSmem + 1024) <= 228 * 1024);

// Which of a weight's tiles, and which part of it exists.
struct WeightTile {
  int64_t batch;
  uint32_t row, column, row_tiles, column_tiles;
  quantize_kernels::Window window;

  HOPPER_DEVICE WeightTile(const QuantizedEntry& e, uint32_t tile)
      : row_tiles((static_cast<uint32_t>(e.rows) + kTile - 1) / kTile),
        column_tiles((static_cast<uint32_t>(e.columns) + kTile - 1) / kTile) {
    const uint32_t line = tile / column_tiles;
    column = tile - line * column_tiles;
    batch = line / row_tiles;
    row = line % row_tiles;
    const int64_t first_row = int64_t{row} * kTile, first_column = int64_t{column} * kTile;
    const int64_t rows = e.rows - first_row, columns = e.columns - first_column;
    window = {first_row, first_column, static_cast<int>(rows < kTile ? rows : kTile),
              static_cast<int>(columns < kTile ? columns : kTile)};
  }
  // Elements before the tile's corner, in weights and in their transposes.
  HOPPER_DEVICE int64_t corner(const QuantizedEntry& e) const {
    return (batch * e.rows + window.row) * e.columns + window.column;
  }
  HOPPER_DEVICE int64_t corner_t(const QuantizedEntry& e) const {
    return (batch * e.columns + window.column) * e.rows + window.row;
  }
};

// Groups of a thread whose loads are in flight at once: a row of its patch, or half of one where 80 registers hold no more.
// Single accesses are bound by themselves.
template <bool kVector, class Grad, class First, class Second>
inline constexpr int kInFlight =
    !kVector ? 1 : sizeof(float) + sizeof(Grad) + sizeof(First) + sizeof(Second) <= 12 ? 4 : 2;

// The step on the thread's patch; new masters to their slots. Returns the largest magnitude of them.
template <bool kVector, class Grad, class First, class Second>
HOPPER_DEVICE uint32_t update_patch(const QuantizedParams& p, const QuantizedEntry& e, const WeightTile& tile,
                                    quantize_kernels::Place at, const NewMasters& masters) {
  using Patch = quantize_kernels::Patch<float>;
  constexpr int kCount = kInFlight<kVector, Grad, First, Second>, kSteps = Patch::kPieces / kCount;   // of a row
  constexpr int kStride = 8 * kGroup;                                  // columns from a thread's group to its next
  static_assert(Patch::kPiece == kGroup);
  const float grad_scale = p.grad_scale ? *p.grad_scale : p.step.grad_scale;
  const bool skip = skips(grad_scale);
  const int first_row = at.group * quantize_kernels::kRows;
  uint32_t largest = 0;
  for (int s = 0; s < quantize_kernels::kRows * kSteps; ++s) {
    const int row = first_row + s / kSteps, first_piece = s % kSteps * kCount;
    const int column = Patch::column(first_piece * kGroup, at.lane);
    const int left = row < tile.window.rows ? tile.window.columns - column : 0;
    const int64_t first = tile.corner(e) + int64_t{row} * e.columns + column;
    const auto present = [&](int k) {
      const int count = left - k * kStride;
      return count >= kGroup ? kGroup : count < 0 ? 0 : count;
    };
    AdamwGroup<Grad, First, Second> groups[kCount];
    HOPPER_UNROLL for (int k = 0; k < kCount; ++k) {
      if (present(k) > 0) groups[k].template load<kVector>(e.step, first + k * kStride, present(k));
    }
    HOPPER_UNROLL for (int k = 0; k < kCount; ++k) {
      uint32_t words[kGroup] = {0, 0, 0, 0};
      if (present(k) > 0) {
        if (!skip) groups[k].template update<kVector>(p.step, grad_scale, e.step, first + k * kStride, present(k));
        HOPPER_UNROLL for (int i = 0; i < kGroup; ++i)
          if (kVector || i < present(k)) words[i] = groups[k].param.words[i];
      }
      masters.put_piece(0, s / kSteps, first_piece + k, {words[0], words[1], words[2], words[3]});
      HOPPER_UNROLL for (const uint32_t word : words) {
        largest = quantize_kernels::larger(largest, quantize_kernels::magnitude(word));
      }
    }
  }
  return largest;
}

template <bool kVector, class Grad, class First, class Second>
HOPPER_DEVICE void adamw_tile(const QuantizedParams& p, const QuantizedEntry& e, const WeightTile& tile) {
  using namespace quantize_kernels;
  auto* smem = hopper::dynamic_smem();
  const NewMasters masters{reinterpret_cast<uint4*>(smem)};
  auto& codes_t = *reinterpret_cast<TransposedTile*>(smem);
  auto& maxima = *reinterpret_cast<uint32_t(*)[kWarps]>(smem + kMasterBytes);
  const Place at;

  const uint32_t own = update_patch<kVector, Grad, First, Second>(p, e, tile, at, masters);
  hopper::grid_dependency_launch();
  const TileScale scale = tile_scale(block_amax(own, maxima), p.rule);
  if (threadIdx.x == 0) {
    e.scale[(tile.batch * tile.row_tiles + tile.row) * tile.column_tiles + tile.column] = scale.scale;
    if (e.q_t) e.scale_t[(tile.batch * tile.column_tiles + tile.column) * tile.row_tiles + tile.row] = scale.scale;
  }

  Patch<float> patch;
  masters.take(0, patch);
  const float m = scale.multiplier;
  Codes codes;
  encode_rows(patch, {own, 0, 0, 0}, {m, m, m, m}, codes);
  store_rows<float, kVector>(codes, e.q + tile.corner(e), e.columns, tile.window, at);
  if (!e.q_t) return;

  hopper::barrier_sync<0>(optimizer_kernels::kThreads);   // every master has been taken
  put_codes<Patch<float>>(codes, codes_t, at);
  hopper::barrier_sync<0>(optimizer_kernels::kThreads);
  const bool aligned = e.rows % 16 == 0 && reinterpret_cast<uintptr_t>(e.q_t) % 16 == 0;
  store_transposed<Patch<float>::kPiece>(codes_t, e.q_t + tile.corner_t(e), e.rows, tile.window.columns, tile.window.rows,
                                         aligned);
}

template <class Grad, class First, class Second>
HOPPER_KERNEL_BLOCKS(kThreads, kQuantizedBlocks) adamw_quantize_kernel(HOPPER_GRID_CONSTANT const QuantizedParams p) {
  const auto place = p.table.find(blockIdx.x);
  const QuantizedEntry& e = p.table.entries[place.entry];
  const WeightTile tile(e, place.chunk);
  // Codes leave in pieces of 16 columns.
  const bool vector = groups_aligned<Grad, First, Second>(e.step) && e.columns % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(e.q) % 16 == 0;
  hopper::grid_dependency_wait();
  if (vector) adamw_tile<true, Grad, First, Second>(p, e, tile);
  else adamw_tile<false, Grad, First, Second>(p, e, tile);
}

}  // namespace optimizer_kernels
