// FP8 weight gradient: both operands with 128x1 scales, so that every column of D has a scale of its own in every slice
// (1D1D), and promoted accumulation. Persistent, warp-specialised, one matrix or groups of tokens.
// The schedule is drawn in README.md beside this file. Read kernel, load_operands, load_column_scales, math, epilogue.
#pragma once

#include "../common/accumulator.h"
#include "../common/pipeline.h"
#include "../common/roles.h"
#include "../common/shared_tile.h"
#include "../common/tile_chooser.h"
#include "../hopper/front.h"
#include "fp8_wgrad_tiles.h"

namespace fp8_wgrad_kernels {

using hopper::bf16;
using hopper::e4m3;
using hopper::Swizzle;
using hopper::TensorMap;

constexpr int kSlice = kWgradSlice;         // one scale tile of tokens: 128 bytes, the span of the widest swizzle
constexpr int kStep = 32;                   // of one e4m3 wgmma
constexpr int kSmemLimit = 232448;          // 227 KiB, what a block of sm_90 may use
constexpr int kMaxStages = 8;
constexpr int kPrefetchSlices = 16;         // before a tile's end its part of D is fetched into L2: 8 us or more

template <int TileRows, int TileColumns, class OutputElement, int Cluster>
struct Config {
  static constexpr int kTileRows = TileRows, kTileColumns = TileColumns, kCluster = Cluster;
  static constexpr MathGroupShape kGroup = math_group_shape(TileShape{TileRows, TileColumns});
  static_assert(kGroup.waves == 1, "a math group multiplies its part of a slice at once");
  using D = OutputElement;
  using Role = Roles<2, 40, 232>;
  using Sums = Accumulator<1, kGroup.columns>;

  // bf16 leaves through shared memory and TMA; fp32 pairs fill whole sectors, so that threads store them directly.
  static constexpr bool kStaged = sizeof(D) == 2;
  static constexpr Swizzle kStagingSwizzle = widest_swizzle(kGroup.columns * 2);
  using Staging = SharedTile<bf16, kGroup.rows, kGroup.columns, kStagingSwizzle>;

  static constexpr int kBoxRows = kStaged ? kGroup.rows : TileRows;   // of D's map: what is stored, or prefetched, at once
  static constexpr int kBoxColumns = kStaged ? Staging::kPanelColumns : TileColumns;

  static constexpr int kStageBytes = (TileRows + TileColumns) * kSlice + TileRows * static_cast<int>(sizeof(float));
  static constexpr int kColumnBytes = TileColumns * static_cast<int>(sizeof(float));
  static constexpr int kStagingBytes = kStaged ? TileRows * TileColumns * 2 : 0;
  static constexpr int kFitting = (kSmemLimit - kStagingBytes - 1024) / (kStageBytes + kColumnBytes);
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static_assert(kStages >= 4, "fewer than four stages do not cover the latency of memory");

  struct NoStaging {};
  struct Shared {
    SharedTile<e4m3, TileRows, kSlice, Swizzle::b128> a[kStages];
    SharedTile<e4m3, TileColumns, kSlice, Swizzle::b128> b[kStages];
    std::conditional_t<kStaged, Staging, NoStaging> staging[Role::kMathGroups];
    alignas(128) float scale_a[kStages][TileRows];
    alignas(128) float scale_b[kStages][TileColumns];   // in owner_order
    Pipeline<kStages> pipeline;                         // a, b, scale_a
    Pipeline<kStages> columns;                          // scale_b: held longer, until the slice has been promoted
  };
  static_assert(sizeof(Shared) <= kSmemLimit, "the stages and the staging must fit into shared memory");
  static_assert(2 * Sums::kRegisters + 40 <= 232,
                "partial sum, sums and 40 registers for scales and addresses must fit into a math thread");
  static_assert(TileRows % (8 * Cluster) == 0 && TileColumns % (8 * Cluster) == 0,
                "each CTA of a cluster loads whole swizzle patterns of 8 rows");
};

struct Params {
  WgradTiles tiles;
  const float* scale_b;
  int64_t scale_b_stride;
  int32_t m, n;
  void* d;
  int64_t d_stride, d_group_stride;
  bool accumulate;
  bool tma_store;             // D is aligned for TMA
  bool paired_store;          // D is aligned to pairs of elements
  bool prefetch;              // D will be read, and TMA can address it
};

// Accumulation: what the epilogue reads of D is in L2 by then, for it has no registers to read ahead.
template <class C>
HOPPER_DEVICE void prefetch(const TensorMap& map_d, const WgradTile& tile) {
  for (int32_t row = 0; row < C::kTileRows; row += C::kBoxRows)
    for (int32_t column = 0; column < C::kTileColumns; column += C::kBoxColumns)
      hopper::tma_prefetch(map_d, {tile.column + column, tile.row + row, tile.group});
}

// One elected lane keeps the ring full: per slice A, its scales and B. In a cluster each CTA loads one half of the
// shared operand into both.
template <class C>
HOPPER_DEVICE void load_operands(typename C::Shared& shared, const TensorMap& map_a, const TensorMap& map_b,
                                 const TensorMap& map_scale_a, const TensorMap& map_d, const Params& p) {
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const bool share_a = C::kCluster > 1 && p.tiles.grid.multicast == Multicast::a;
  const bool share_b = C::kCluster > 1 && p.tiles.grid.multicast == Multicast::b;
  const uint16_t mask_a = share_a ? (1 << C::kCluster) - 1 : 0, mask_b = share_b ? (1 << C::kCluster) - 1 : 0;
  const int32_t a_first = share_a ? rank * (C::kTileRows / C::kCluster) : 0;
  const int32_t b_first = share_b ? rank * (C::kTileColumns / C::kCluster) : 0;
  auto& pipeline = shared.pipeline;
  typename Pipeline<C::kStages>::Cursor cursor;
  WgradTile tile;
  for (uint32_t i = blockIdx.x / C::kCluster; p.tiles.find(i, rank, tile); i += gridDim.x / C::kCluster) {
    const int32_t late = tile.slice_end - kPrefetchSlices, prefetch_at = late > tile.slice ? late : tile.slice;
    for (int32_t slice = tile.slice; slice < tile.slice_end; ++slice, cursor.advance()) {
      const uint32_t stage = cursor.stage;
      pipeline.acquire(cursor);
      pipeline.expect(cursor, C::kStageBytes);
      hopper::Mbarrier* full = pipeline.full_barrier(cursor);
      hopper::tma_load(shared.a[stage].row(a_first), map_a, full, {slice * kSlice, tile.row + a_first}, mask_a);
      hopper::tma_load(&shared.scale_a[stage][a_first], map_scale_a, full, {tile.row + a_first, slice}, mask_a);
      hopper::tma_load(shared.b[stage].row(b_first), map_b, full, {slice * kSlice, tile.column + b_first}, mask_b);
      if (p.prefetch && slice == prefetch_at) prefetch<C>(map_d, tile);
    }
  }
  // The last loads are on their way: the next kernel may come and set itself up where this one leaves room.
  hopper::grid_dependency_launch();
}

// One warp keeps the ring of column scales full. It also puts them into the order in which threads own columns, which
// TMA cannot: its strides are multiples of 16 bytes, and here pairs of 8 bytes change places.
template <class C>
HOPPER_DEVICE void load_column_scales(typename C::Shared& shared, const Params& p) {
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const int32_t first = threadIdx.x % 32 * 2;
  auto& columns = shared.columns;
  typename Pipeline<C::kStages>::Cursor cursor;
  WgradTile tile;
  for (uint32_t i = blockIdx.x / C::kCluster; p.tiles.find(i, rank, tile); i += gridDim.x / C::kCluster) {
    const int32_t left = p.n - tile.column - first;   // columns that exist from the lane's first on; the others get zeros
    const float* from = p.scale_b + tile.slice * p.scale_b_stride + tile.column + first;
    for (int32_t slice = tile.slice; slice < tile.slice_end; ++slice, cursor.advance(), from += p.scale_b_stride) {
      float* to = &shared.scale_b[cursor.stage][owner_order(first)];
      columns.acquire(cursor);
      HOPPER_UNROLL for (int i = 0; i < C::kTileColumns; i += 64) {   // 64 is a multiple of the order's period
        const uint32_t valid = left > i + 1 ? 8 : left == i + 1 ? 4 : 0;
        if (first + i < C::kTileColumns) hopper::cp_async<8>(to + i, valid ? from + i : p.scale_b, valid);
      }
      hopper::cp_async_mbarrier_arrive<true>(columns.full_barrier(cursor));
      // What a stage held before has landed long ago. The arrival counts all copies that the thread has in its books.
      hopper::cp_async_commit();
      hopper::cp_async_wait<C::kStages>();
    }
  }
}

template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const TensorMap& map_d, const Params& p, const WgradTile& tile,
                            typename C::Sums& acc, uint32_t group, int32_t row, int32_t column);

// A math group multiplies its part of each tile slice by slice; see MathGroupShape for its part.
template <class C>
HOPPER_DEVICE void math(typename C::Shared& shared, const TensorMap& map_d, const Params& p, uint32_t group) {
  constexpr MathGroupShape part = C::kGroup;
  using Multiply = hopper::Wgmma<part.columns, hopper::Operand::e4m3, hopper::Operand::e4m3>;
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const int32_t group_row = C::kTileRows == part.rows ? 0 : group * part.rows;
  const int32_t group_column = C::kTileColumns == part.columns ? 0 : group * part.columns;
  const int32_t thread_row = group_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const int32_t thread_columns = group_column + threadIdx.x % 4 * 4;   // in owner_order
  auto& pipeline = shared.pipeline;
  auto& columns = shared.columns;
  typename Pipeline<C::kStages>::Cursor cursor;   // of both rings: they have the same slices and as many stages
  typename C::Sums acc;
  WgradTile tile;
  for (uint32_t i = blockIdx.x / C::kCluster; p.tiles.find(i, rank, tile); i += gridDim.x / C::kCluster) {
    acc.clear();
    for (int32_t slice = tile.slice; slice < tile.slice_end; ++slice, cursor.advance()) {
      pipeline.wait(cursor);
      const uint64_t a_matrix = hopper::matrix_descriptor<Swizzle::b128>(shared.a[cursor.stage].row(group_row));
      const uint64_t b_matrix = hopper::matrix_descriptor<Swizzle::b128>(shared.b[cursor.stage].row(group_column));
      hopper::wgmma_fence();
      HOPPER_UNROLL for (int k = 0; k < kSlice; k += kStep)
        Multiply::issue(acc.partial, hopper::advance(a_matrix, k), hopper::advance(b_matrix, k), k != 0);
      hopper::wgmma_commit();
      const float upper = shared.scale_a[cursor.stage][thread_row], lower = shared.scale_a[cursor.stage][thread_row + 8];
      columns.wait(cursor);
      hopper::wgmma_wait<0>();
      hopper::register_fence(acc.partial);
      pipeline.template release<C::kCluster>(cursor);
      acc.promote_columns(0, upper, lower, &shared.scale_b[cursor.stage][thread_columns]);
      columns.template release<1>(cursor);
    }
    // Adding nothing would still turn -0 into +0.
    const bool untouched = p.accumulate && p.tiles.offsets && tile.slice == tile.slice_end;
    if (!untouched) epilogue<C>(shared, map_d, p, tile, acc, group, tile.row + group_row, tile.column + group_column);
  }
}

// D leaves while the next tile's slices are already landing. `row` and `column` are of the math group's part.
template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const TensorMap& map_d, const Params& p, const WgradTile& tile,
                            typename C::Sums& acc, uint32_t group, int32_t row, int32_t column) {
  constexpr int kColumns = C::kGroup.columns;
  const GlobalRows<typename C::D> d{static_cast<typename C::D*>(p.d) + tile.group * p.d_group_stride, p.d_stride, p.m,
                                    p.n, p.paired_store};
  if (p.accumulate) d.template add_to<kColumns>(acc.sum[0], row, column);
  if constexpr (C::kStaged) {
    if (p.tma_store) {
      auto& staging = shared.staging[group];
      const bool storer = threadIdx.x % 128 == 0;
      if (storer) hopper::bulk_wait_read<0>();   // the previous tile has left the staging
      math_group_sync(group);
      acc.stage_bf16(0, staging, 0, 0);
      // Each writer: its writes to the staging before the TMA store reads them, its reads of D before it overwrites them.
      if (p.accumulate) {
        hopper::fence_proxy_async<hopper::Space::all>();
      } else {
        hopper::fence_proxy_async<hopper::Space::shared>();
      }
      math_group_sync(group);
      if (storer) {
        HOPPER_UNROLL for (int panel = 0; panel < C::Staging::kPanels; ++panel)
          hopper::tma_store(map_d, staging.panel(panel),
                            {column + panel * C::Staging::kPanelColumns, row, tile.group});
        hopper::bulk_commit();
      }
      return;
    }
  }
  d.template store<kColumns>(acc.sum[0], row, column);
}

template <class C>
HOPPER_KERNEL(C::Role::kThreads)
fp8_wgrad_kernel(HOPPER_GRID_CONSTANT const TensorMap map_a, HOPPER_GRID_CONSTANT const TensorMap map_b,
                 HOPPER_GRID_CONSTANT const TensorMap map_scale_a, HOPPER_GRID_CONSTANT const TensorMap map_d,
                 HOPPER_GRID_CONSTANT const Params p) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(hopper::dynamic_smem());
  const uint32_t warp = C::Role::warp(), group = warp / 4;
  if (threadIdx.x == 0) {
    shared.pipeline.init(C::Role::kMathWarps * C::kCluster);
    shared.columns.init(C::Role::kMathWarps, 32);
  }
  if constexpr (C::kCluster > 1) {
    hopper::cluster_sync();
  } else {
    hopper::block_sync();
  }
  hopper::grid_dependency_wait();   // before the first global access: the previous kernel may have written A or read D

  if (group == C::Role::kMathGroups) {
    C::Role::become_producer();
    if (warp == C::Role::kMathWarps && hopper::elect_one())
      load_operands<C>(shared, map_a, map_b, map_scale_a, map_d, p);
    if (warp == C::Role::kMathWarps + 1) load_column_scales<C>(shared, p);
  } else {
    C::Role::become_math();
    math<C>(shared, map_d, p, group);
    if (C::kStaged && threadIdx.x % 128 == 0) hopper::bulk_wait<0>();   // the last store still reads shared memory
  }
  drain_cluster<C::kCluster>();
}

}  // namespace fp8_wgrad_kernels
