// FP8 GEMM with 1x128 scales of A, 128x128 scales of B and promoted accumulation: persistent, warp-specialised. One
// matrix, or groups of rows with a B each: the same kernel with another list of tiles.
// The schedule is drawn in README.md beside this file. Read kernel, producer, math here, then epilogue in
// fp8_gemm_store.cuh; types and sizes are in fp8_gemm_config.cuh.
#pragma once

#include "fp8_gemm_config.cuh"
#include "fp8_gemm_store.cuh"

namespace fp8_gemm_kernels {

// A box of one matrix, or of the group's matrix among many.
template <bool PerGroup>
HOPPER_DEVICE void load_box(void* to, const TensorMap& map, hopper::Mbarrier* full, int32_t x, int32_t y, int32_t group,
                            uint16_t mask, hopper::Site site = HOPPER_HERE) {
  if constexpr (PerGroup) {
    hopper::tma_load(to, map, full, {x, y, group}, mask, site);
  } else {
    hopper::tma_load(to, map, full, {x, y}, mask, site);
  }
}

// One elected lane keeps the ring full: per slice A, its scales and B. In a cluster each CTA loads one half of the
// shared operand into both. Rows behind the end of a group belong to the next one; they are loaded and not stored.
template <class C>
HOPPER_DEVICE void producer(typename C::Shared& shared, const TensorMap& map_a, const TensorMap& map_b,
                            const TensorMap& map_scale_a, const typename C::Params& p) {
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const bool share_a = C::kCluster > 1 && p.tiles.grid.multicast == Multicast::a;
  const bool share_b = C::kCluster > 1 && p.tiles.grid.multicast == Multicast::b;
  const uint16_t mask_a = share_a ? (1 << C::kCluster) - 1 : 0, mask_b = share_b ? (1 << C::kCluster) - 1 : 0;
  const int32_t a_first = share_a ? rank * (C::kTileRows / C::kCluster) : 0;
  const int32_t b_first = share_b ? rank * (C::kTileColumns / C::kCluster) : 0;
  auto& pipeline = shared.pipeline;
  typename Pipeline<C::kStages>::Cursor cursor;
  auto tiles = tiles_of<C>(shared, p);
  Tile tile;
  for (uint32_t i = blockIdx.x / C::kCluster; tiles.find(i, rank, tile); i += gridDim.x / C::kCluster) {
    for (int32_t slice = 0; slice < p.slices; ++slice, cursor.advance()) {
      const uint32_t stage = cursor.stage;
      pipeline.acquire(cursor);
      pipeline.expect(cursor, C::kStageBytes);
      hopper::Mbarrier* full = pipeline.full_barrier(cursor);
      const int32_t k = slice * kSliceK, row = tile.row + a_first, column = tile.column + b_first;
      load_box<C::kBatched>(shared.a[stage].row(a_first), map_a, full, k, row, tile.group, mask_a);
      load_box<C::kBatched>(&shared.scale_a[stage][a_first], map_scale_a, full, row, slice, tile.group, mask_a);
      load_box<C::kGrouped>(shared.b[stage].row(b_first), map_b, full, k, column, tile.group, mask_b);
    }
  }
  // The last loads are on their way: the next kernel may come and set itself up where this one leaves room.
  hopper::grid_dependency_launch();
}

// The scales of B for the columns of one math group: one or two rows of scale_b, read one slice ahead so that their
// latency hides behind the tensor core.
template <class C>
struct ColumnScales {
  const float *left_row, *right_row;
  float left, right;          // of the next slice
  int32_t border;             // column of the group where the right block begins
  int32_t slices;

  HOPPER_DEVICE ColumnScales(const typename C::Params& p, int32_t group, int32_t column) : slices(p.slices) {
    const int32_t block = column / kScaleBlock, last = p.scale_b_rows - 1;   // columns past N: any block will do
    const float* scale_b = p.scale_b;
    if constexpr (C::kGrouped) scale_b += group * p.scale_b_group_stride;
    left_row = scale_b + (block < last ? block : last) * p.scale_b_stride;
    right_row = scale_b + (block + 1 < last ? block + 1 : last) * p.scale_b_stride;
    border = kScaleBlock - column % kScaleBlock;
    load(0);
  }
  HOPPER_DEVICE void load(int32_t slice) {
    left = slice < slices ? left_row[slice] : 0.0f;
    right = C::kTwoBlocks && slice < slices ? right_row[slice] : 0.0f;
  }
};

// A math group multiplies its part of each tile slice by slice, promoting every wave; see MathGroupShape for its part.
template <class C>
HOPPER_DEVICE void math(typename C::Shared& shared, const TensorMap& map_d, const typename C::Params& p,
                        uint32_t group) {
  constexpr MathGroupShape part = C::kGroup;
  using Multiply = hopper::Wgmma<part.wave_columns, hopper::Operand::e4m3, hopper::Operand::e4m3>;
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const int32_t group_row = C::kTileRows == part.rows ? 0 : group * part.rows;
  const int32_t group_column = C::kTileColumns == part.columns ? 0 : group * part.columns;
  const int32_t thread_row = group_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  auto& pipeline = shared.pipeline;
  typename Pipeline<C::kStages>::Cursor cursor;
  typename C::Sums acc;
  auto tiles = tiles_of<C>(shared, p);
  Tile tile;
  for (uint32_t i = blockIdx.x / C::kCluster; tiles.find(i, rank, tile); i += gridDim.x / C::kCluster) {
    if (C::kGrouped && (tile.row + group_row >= tile.row_end || tile.column + group_column >= p.n)) {
      for (int32_t slice = 0; slice < p.slices; ++slice, cursor.advance()) {   // nothing of D here: a short group's end
        pipeline.wait(cursor);
        pipeline.template release<C::kCluster>(cursor);   // nothing was read, but no lane may fall a ring behind
      }
      continue;
    }
    acc.clear();
    ColumnScales<C> scale_b(p, tile.group, tile.column + group_column);
    for (int32_t slice = 0; slice < p.slices; ++slice, cursor.advance()) {
      const float left = scale_b.left, right = scale_b.right;
      scale_b.load(slice + 1);
      pipeline.wait(cursor);
      HOPPER_UNROLL for (int wave = 0; wave < part.waves; ++wave) {
        const e4m3* a = shared.a[cursor.stage].row(group_row + C::wave_row(wave));
        const e4m3* b = shared.b[cursor.stage].row(group_column + C::wave_column(wave));
        const uint64_t a_matrix = hopper::matrix_descriptor<Swizzle::b128>(a);
        const uint64_t b_matrix = hopper::matrix_descriptor<Swizzle::b128>(b);
        hopper::wgmma_fence();
        HOPPER_UNROLL for (int k = 0; k < kSliceK; k += kStepK)
          Multiply::issue(acc.partial, hopper::advance(a_matrix, k), hopper::advance(b_matrix, k), k != 0);
        hopper::wgmma_commit();
        const float* scale_a = &shared.scale_a[cursor.stage][thread_row + C::wave_row(wave)];
        const float upper = scale_a[0], lower = scale_a[8];
        const float first = wave % part.column_waves == 0 ? left : right;   // the second wave is the second block
        const WaveScales scales{{upper * first, lower * first}, {upper * right, lower * right}, scale_b.border};
        hopper::wgmma_wait<0>();
        hopper::register_fence(acc.partial);
        if (wave == part.waves - 1) pipeline.template release<C::kCluster>(cursor);
        acc.template promote<C::kBorderStep>(wave, scales);
      }
    }
    epilogue<C>(shared, map_d, p, tile, acc, group, group_row, tile.column + group_column);
  }
}

// One thread; maps that will not be used are zero.
template <class C>
HOPPER_DEVICE void prefetch_maps(const TensorMap& map_a, const TensorMap& map_b, const TensorMap& map_scale_a,
                                 const TensorMap& map_d, const typename C::Params& p) {
  if (p.slices > 0) {
    hopper::tma_prefetch(map_a);
    hopper::tma_prefetch(map_scale_a);
    hopper::tma_prefetch(map_b);
  }
  if (C::kStaged && p.aligned_rows) hopper::tma_prefetch(map_d);
}

template <class C>
HOPPER_DEVICE void block_or_cluster_sync(hopper::Site site = HOPPER_HERE) {
  if constexpr (C::kCluster > 1) {
    hopper::cluster_sync(site);
  } else {
    hopper::block_sync(site);
  }
}

template <class C>
HOPPER_KERNEL(C::Role::kThreads)
fp8_gemm_kernel(HOPPER_GRID_CONSTANT const TensorMap map_a, HOPPER_GRID_CONSTANT const TensorMap map_b,
                HOPPER_GRID_CONSTANT const TensorMap map_scale_a, HOPPER_GRID_CONSTANT const TensorMap map_d,
                HOPPER_GRID_CONSTANT const typename C::Params p) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(hopper::dynamic_smem());
  const uint32_t warp = C::Role::warp(), group = warp / 4;
  if (threadIdx.x == 0) shared.pipeline.init(C::Role::kMathWarps * C::kCluster);
  if (threadIdx.x == C::Role::kThreads - 1) prefetch_maps<C>(map_a, map_b, map_scale_a, map_d, p);
  if constexpr (C::kGrouped) {
    hopper::grid_dependency_wait();   // the previous kernel may have written the offsets
    shared.table.read(p.tiles.rows, p.tiles.groups, p.rows, C::Role::kThreads);
    hopper::block_sync();
    if (warp == 0) shared.table.compact(p.tiles.rows, p.tiles.groups);
    block_or_cluster_sync<C>();
  } else {
    block_or_cluster_sync<C>();
    hopper::grid_dependency_wait();   // before the first global access: the previous kernel may have written A or read D
  }

  if (group == C::Role::kMathGroups) {
    C::Role::become_producer();
    if (warp == C::Role::kMathWarps) {
      if (hopper::elect_one()) producer<C>(shared, map_a, map_b, map_scale_a, p);
    } else if constexpr (C::kGrouped) {
      const uint32_t idle = warp - C::Role::kMathWarps - 1;
      if (p.clear_rest) clear_rest<C>(shared, p, blockIdx.x * 3 + idle, gridDim.x * 3);
    }
  } else {
    C::Role::become_math();
    math<C>(shared, map_d, p, group);
    if (C::kStaged && threadIdx.x % 128 == 0) hopper::bulk_wait<0>();   // the last store still reads shared memory
  }
  drain_cluster<C::kCluster>();
}

}  // namespace fp8_gemm_kernels
