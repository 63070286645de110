// The permutation between tokens and experts: where each row goes (plan), and taking it there.
//
// The plan is a stable counting sort of the slots (token, choice) by expert, in one launch: a cluster whose warps own
// consecutive parts of the slots, each with counters of its own.
//
//   count     each warp its part, 32 slots a step; equal experts of a step find each other by ballots
//   prefix    over the warps of a block, for each expert; over the blocks of the cluster, through distributed shared
//             memory; over the experts
//   assign    each warp its part again: position = base of expert and block + base of warp + rank within the warp
//
// Counters belong to one warp and positions follow from prefix sums: no atomics, the same order in every run.
#pragma once

#include "../hopper/front.h"

namespace moe_kernels {

constexpr int kPlanWarps = 32;             // of a block, at most
constexpr int kPlanBlocks = 8;             // of the cluster, at most; what every Hopper GPU can place
constexpr int kPlanSmem = 227 << 10;
constexpr int kMoveThreads = 128;
constexpr int kMoveUnits = 8;              // loads in flight a thread; 128 x 8 x 16 bytes hold a row of 8192 bf16

struct PlanParams {
  const int64_t* topk_idx;
  int64_t idx_strides[2];
  uint32_t rows, top_k, experts;
  int32_t bin_bits;          // that tell experts + 1 bins apart
  int32_t* offsets;          // [experts + 1]
  int64_t* source;           // [rows]
  int32_t* row_of_slot;      // [rows]
};

// Shared memory: warps x bins counters, then three rows of bins.
inline constexpr int64_t plan_smem_bytes(int64_t warps, int64_t bins) { return (warps + 3) * bins * 4; }

// The expert of a slot; `experts` for any index that is none.
HOPPER_DEVICE uint32_t bin_of(const PlanParams& p, uint32_t slot) {
  const uint32_t token = slot / p.top_k, choice = slot - token * p.top_k;
  const int64_t expert = p.topk_idx[token * p.idx_strides[0] + choice * p.idx_strides[1]];
  return expert >= 0 && expert < p.experts ? static_cast<uint32_t>(expert) : p.experts;
}

// The lanes with the same bin, of those that are active.
HOPPER_DEVICE uint32_t lanes_with(uint32_t bin, bool active, int32_t bits) {
  uint32_t lanes = hopper::ballot(active);
  for (int32_t bit = 0; bit < bits; ++bit) {
    const bool one = bin >> bit & 1;
    const uint32_t ones = hopper::ballot(one);
    lanes &= one ? ones : ~ones;
  }
  return lanes;
}

// Calls visit(slot, bin, rank among the step's equals) for each slot of [begin, end), and counts them in `counters`.
template <class Visit>
HOPPER_DEVICE void count_slots(const PlanParams& p, uint32_t begin, uint32_t end, uint32_t* counters, Visit visit) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t next = begin + lane < end ? bin_of(p, begin + lane) : 0;
  for (uint32_t first = begin; first < end; first += 32) {
    const uint32_t slot = first + lane, bin = next;
    const bool active = slot < end;
    next = end - first > 32 + lane ? bin_of(p, slot + 32) : 0;   // its load overlaps this step; slot + 32 < end
    const uint32_t equals = lanes_with(bin, active, p.bin_bits);
    if (active) visit(slot, bin, static_cast<uint32_t>(__builtin_popcount(equals & ((1u << lane) - 1))));
    hopper::syncwarp();      // all have read their counters
    if (active && equals >> lane == 1) counters[bin] += static_cast<uint32_t>(__builtin_popcount(equals));   // the last lane
    hopper::syncwarp();
  }
}

// Exclusive prefix sums of one warp over `bins` values: base[i] += what precedes values[i]; `store(i, prefix)` too.
template <class Store>
HOPPER_DEVICE void scan_bins(const uint32_t* values, uint32_t bins, Store store) {
  const uint32_t lane = threadIdx.x % 32, run = (bins + 31) / 32;
  const uint32_t begin = run * lane < bins ? run * lane : bins, end = begin + run < bins ? begin + run : bins;
  uint32_t sum = 0;
  for (uint32_t bin = begin; bin < end; ++bin) sum += values[bin];
  uint32_t through = sum;
  HOPPER_UNROLL for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = hopper::shuffle_up(through, distance);
    if (lane >= distance) through += before;
  }
  uint32_t at = through - sum;
  for (uint32_t bin = begin; bin < end; ++bin) {
    store(bin, at);
    at += values[bin];
  }
}

// One cluster: block b of it is cluster rank b.
HOPPER_KERNEL(kPlanWarps * 32) plan_kernel(const PlanParams p) {
  const uint32_t bins = p.experts + 1, threads = blockDim.x, warps = threads / 32, blocks = gridDim.x;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x;
  auto* counters = reinterpret_cast<uint32_t*>(hopper::dynamic_smem());
  uint32_t* mine = counters + warp * bins;
  uint32_t* of_block = counters + warps * bins;    // totals of this block, read by the others
  uint32_t* of_cluster = of_block + bins;
  uint32_t* base = of_cluster + bins;

  // Consecutive parts of whole steps.
  const uint32_t parts = blocks * warps, part = rank * warps + warp;
  const uint64_t steps = (uint64_t{p.rows} + 31) / 32, own = (steps + parts - 1) / parts * 32;
  const auto begin = static_cast<uint32_t>(own * part < p.rows ? own * part : p.rows);
  const auto end = static_cast<uint32_t>(begin + own < p.rows ? begin + own : p.rows);

  for (uint32_t bin = lane; bin < bins; bin += 32) mine[bin] = 0;   // before the first count lies a syncwarp
  hopper::grid_dependency_wait();
  count_slots(p, begin, end, mine, [](uint32_t, uint32_t, uint32_t) {});
  hopper::block_sync();

  for (uint32_t bin = threadIdx.x; bin < bins; bin += threads) {
    uint32_t before = 0;
    for (uint32_t w = 0; w < warps; ++w) {
      uint32_t& counter = counters[w * bins + bin];
      const uint32_t count = counter;
      counter = before;
      before += count;
    }
    of_block[bin] = before;
  }
  hopper::cluster_sync();

  for (uint32_t bin = threadIdx.x; bin < bins; bin += threads) {
    uint32_t before = 0, total = 0;
    for (uint32_t b = 0; b < blocks; ++b) {
      if (b == rank) before = total;
      total += hopper::map_shared(of_block, b)[bin];
    }
    base[bin] = before;
    of_cluster[bin] = total;
  }
  hopper::cluster_arrive();  // the others' totals have been read
  hopper::block_sync();
  if (warp == 0) {
    scan_bins(of_cluster, bins, [&](uint32_t bin, uint32_t prefix) {
      base[bin] += prefix;
      if (rank == 0) p.offsets[bin] = static_cast<int32_t>(prefix);   // the bin of no expert begins at offsets[experts]
    });
  }
  hopper::block_sync();

  count_slots(p, begin, end, mine, [&](uint32_t slot, uint32_t bin, uint32_t place) {
    const uint32_t row = base[bin] + mine[bin] + place;
    p.source[row] = slot;
    p.row_of_slot[slot] = static_cast<int32_t>(row);
  });
  hopper::grid_dependency_launch();
  hopper::cluster_wait();    // no block ends while its totals may still be read
}

struct MoveParams {
  const void* x;
  int64_t row_stride, column_stride, columns;   // in words of the kernel
  const int32_t* row_of_slot;
  int32_t top_k;
  void* out;                 // [tokens * top_k, columns]
};

// A block a token: its row is read once and written top_k times. Word: 16 bytes, or one element of any stride.
template <class Word>
HOPPER_KERNEL_BLOCKS(kMoveThreads, 8) move_rows_kernel(const MoveParams p) {
  const int64_t token = blockIdx.x;
  const Word* from = static_cast<const Word*>(p.x) + token * p.row_stride;

  hopper::grid_dependency_wait();
  const int32_t* rows = p.row_of_slot + token * p.top_k;
  for (int64_t first = threadIdx.x; first < p.columns; first += kMoveThreads * kMoveUnits) {
    Word words[kMoveUnits];
    HOPPER_UNROLL for (int u = 0; u < kMoveUnits; ++u) {
      const int64_t column = first + u * kMoveThreads;
      if (column >= p.columns) continue;
      if constexpr (sizeof(Word) == 16) words[u] = hopper::load_stream(from + column);
      else words[u] = from[column * p.column_stride];
    }
    for (int32_t slot = 0; slot < p.top_k; ++slot) {
      Word* to = static_cast<Word*>(p.out) + rows[slot] * p.columns;
      HOPPER_UNROLL for (int u = 0; u < kMoveUnits; ++u) {
        const int64_t column = first + u * kMoveThreads;
        if (column < p.columns) to[column] = words[u];
      }
    }
  }
  hopper::grid_dependency_launch();
}

constexpr int kScaleThreads = 256;
constexpr int kScaleTiles = 8;             // tiles of 128 columns that a thread takes along

struct MoveScalesParams {
  const float* scale;        // [tiles, scale_stride]
  int64_t scale_stride;
  int64_t rows, padded_rows, tiles;
  const int64_t* source;
  uint32_t top_k;
  float* out;                // [tiles, padded_rows]
};

// Scales lie row by row of tiles: threads are neighbours in the output, so that writes are whole lines. What they read
// is in L2: a permutation's scales are 1/32 of its codes.
HOPPER_KERNEL(kScaleThreads) move_scales_kernel(const MoveScalesParams p) {
  const int64_t row = int64_t{blockIdx.x} * kScaleThreads + threadIdx.x;
  const int64_t first = int64_t{blockIdx.y} * kScaleTiles;
  hopper::grid_dependency_wait();
  if (row >= p.padded_rows) return;
  const bool real = row < p.rows;
  const uint32_t token = real ? static_cast<uint32_t>(p.source[row]) / p.top_k : 0;
  float scale[kScaleTiles];
  HOPPER_UNROLL for (int i = 0; i < kScaleTiles; ++i)
    scale[i] = real && first + i < p.tiles ? p.scale[(first + i) * p.scale_stride + token] : 1.0f;
  hopper::grid_dependency_launch();
  HOPPER_UNROLL for (int i = 0; i < kScaleTiles; ++i)
    if (first + i < p.tiles) p.out[(first + i) * p.padded_rows + row] = scale[i];
}

}  // namespace moe_kernels
