// FP8 GEMM with 1x128 scales of A, 128x128 scales of B and promoted accumulation: persistent, warp-specialised.
// The schedule is drawn in README.md beside this file. Read kernel, producer, math, epilogue in this order.
#pragma once

#include "../common/accumulator.h"
#include "../common/pipeline.h"
#include "../common/roles.h"
#include "../common/shared_tile.h"
#include "../common/tile_chooser.h"
#include "../common/tile_scheduler.h"
#include "../hopper/front.h"

namespace fp8_gemm_kernels {

using hopper::bf16;
using hopper::e4m3;
using hopper::Swizzle;
using hopper::TensorMap;

constexpr int kSliceK = 128;                // one scale tile of K: 128 bytes, the span of the widest swizzle
constexpr int kStepK = 32;                  // of one e4m3 wgmma
constexpr int kScaleBlock = 128;            // columns of B under one scale
constexpr int kSmemLimit = 232448;          // 227 KiB, what a block of sm_90 may use
constexpr int kMaxStages = 8;

constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

template <int TileRows, int TileColumns, class OutputElement, int Cluster>
struct Config {
  static constexpr int kTileRows = TileRows, kTileColumns = TileColumns, kCluster = Cluster;
  static constexpr MathGroupShape kGroup = math_group_shape(TileShape{TileRows, TileColumns});
  using D = OutputElement;
  using Role = Roles<2, 40, 232>;
  using Sums = Accumulator<kGroup.waves, kGroup.wave_columns>;

  // Where a wave lies within its math group.
  static HOPPER_DEVICE int32_t wave_row(int wave) { return wave / kGroup.column_waves * 64; }
  static HOPPER_DEVICE int32_t wave_column(int wave) { return wave % kGroup.column_waves * kGroup.wave_columns; }

  // bf16 leaves through shared memory and TMA; fp32 pairs fill whole sectors, so that threads store them directly.
  static constexpr bool kStaged = sizeof(D) == 2;
  static constexpr Swizzle kStagingSwizzle = widest_swizzle(kGroup.columns * 2);
  using Staging = SharedTile<bf16, kGroup.rows, kGroup.columns, kStagingSwizzle>;

  // Columns of a math group start at multiples of this, modulo 128: where a border between scale blocks can lie.
  static constexpr int kBorderStep = kScaleBlock % kGroup.wave_columns == 0 ? 0 : gcd(kGroup.columns, kScaleBlock);
  static constexpr bool kTwoBlocks = kBorderStep != 0 || kGroup.column_waves == 2;
  static_assert(kGroup.columns <= kScaleBlock + gcd(kGroup.columns, kScaleBlock),
                "the columns of a math group may touch two scale blocks, not three");

  static constexpr int kStageBytes = (TileRows + TileColumns) * kSliceK + TileRows * static_cast<int>(sizeof(float));
  static constexpr int kStagingBytes = kStaged ? TileRows * TileColumns * 2 : 0;
  static constexpr int kFitting = (kSmemLimit - kStagingBytes - 1024) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static_assert(kStages >= 3, "fewer than three stages do not cover the latency of memory");

  struct NoStaging {};
  struct Shared {
    SharedTile<e4m3, TileRows, kSliceK, Swizzle::b128> a[kStages];
    SharedTile<e4m3, TileColumns, kSliceK, Swizzle::b128> b[kStages];
    std::conditional_t<kStaged, Staging, NoStaging> staging[Role::kMathGroups];
    alignas(128) float scale_a[kStages][TileRows];
    Pipeline<kStages> pipeline;
  };
  static_assert(sizeof(Shared) <= kSmemLimit, "the stages and the staging must fit into shared memory");
  static_assert((1 + kGroup.waves) * Sums::kRegisters + 40 <= 232,
                "partial sum, sums and 40 registers for addresses must fit into a math thread");
  static_assert(TileRows % (8 * Cluster) == 0 && TileColumns % (8 * Cluster) == 0,
                "each CTA of a cluster loads whole swizzle patterns of 8 rows");
};

struct Params {
  DenseTiles tiles;
  const float* scale_b;
  int64_t scale_b_stride;
  int32_t scale_b_rows;
  int32_t n;
  int32_t slices;             // ceil(K / 128)
  void* d;
  int64_t d_stride;
  bool accumulate;
  bool tma_store;             // D is aligned for TMA
  bool paired_store;          // D is aligned to pairs of elements
};

// One elected lane keeps the ring full: per slice A, its scales and B. In a cluster each CTA loads one half of the
// shared operand into both.
template <class C>
HOPPER_DEVICE void producer(typename C::Shared& shared, const TensorMap& map_a, const TensorMap& map_b,
                            const TensorMap& map_scale_a, const Params& p) {
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const bool share_a = C::kCluster > 1 && p.tiles.grid.multicast == Multicast::a;
  const bool share_b = C::kCluster > 1 && p.tiles.grid.multicast == Multicast::b;
  const uint16_t mask_a = share_a ? (1 << C::kCluster) - 1 : 0, mask_b = share_b ? (1 << C::kCluster) - 1 : 0;
  const int32_t a_first = share_a ? rank * (C::kTileRows / C::kCluster) : 0;
  const int32_t b_first = share_b ? rank * (C::kTileColumns / C::kCluster) : 0;
  auto& pipeline = shared.pipeline;
  typename Pipeline<C::kStages>::Cursor cursor;
  Tile tile;
  for (uint32_t i = blockIdx.x / C::kCluster; p.tiles.find(i, rank, tile); i += gridDim.x / C::kCluster) {
    for (int32_t slice = 0; slice < p.slices; ++slice, cursor.advance()) {
      const uint32_t stage = cursor.stage;
      pipeline.acquire(cursor);
      pipeline.expect(cursor, C::kStageBytes);
      hopper::Mbarrier* full = pipeline.full_barrier(cursor);
      hopper::tma_load(shared.a[stage].row(a_first), map_a, full, {slice * kSliceK, tile.row + a_first}, mask_a);
      hopper::tma_load(&shared.scale_a[stage][a_first], map_scale_a, full, {tile.row + a_first, slice}, mask_a);
      hopper::tma_load(shared.b[stage].row(b_first), map_b, full, {slice * kSliceK, tile.column + b_first}, mask_b);
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

  HOPPER_DEVICE ColumnScales(const Params& p, int32_t column) : slices(p.slices) {
    const int32_t block = column / kScaleBlock, last = p.scale_b_rows - 1;   // columns past N: any block will do
    left_row = p.scale_b + (block < last ? block : last) * p.scale_b_stride;
    right_row = p.scale_b + (block + 1 < last ? block + 1 : last) * p.scale_b_stride;
    border = kScaleBlock - column % kScaleBlock;
    load(0);
  }
  HOPPER_DEVICE void load(int32_t slice) {
    left = slice < slices ? left_row[slice] : 0.0f;
    right = C::kTwoBlocks && slice < slices ? right_row[slice] : 0.0f;
  }
};

template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const TensorMap& map_d, const Params& p, const Tile& tile,
                            typename C::Sums& acc, uint32_t group, int32_t row, int32_t column);

// A math group multiplies its part of each tile slice by slice, promoting every wave; see MathGroupShape for its part.
template <class C>
HOPPER_DEVICE void math(typename C::Shared& shared, const TensorMap& map_d, const Params& p, uint32_t group) {
  constexpr MathGroupShape part = C::kGroup;
  using Multiply = hopper::Wgmma<part.wave_columns, hopper::Operand::e4m3, hopper::Operand::e4m3>;
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const int32_t group_row = C::kTileRows == part.rows ? 0 : group * part.rows;
  const int32_t group_column = C::kTileColumns == part.columns ? 0 : group * part.columns;
  const int32_t thread_row = group_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  auto& pipeline = shared.pipeline;
  typename Pipeline<C::kStages>::Cursor cursor;
  typename C::Sums acc;
  Tile tile;
  for (uint32_t i = blockIdx.x / C::kCluster; p.tiles.find(i, rank, tile); i += gridDim.x / C::kCluster) {
    acc.clear();
    ColumnScales<C> scale_b(p, tile.column + group_column);
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

// D leaves while the next tile's slices are already landing. `row` is relative to the tile, `column` to the matrix.
template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const TensorMap& map_d, const Params& p, const Tile& tile,
                            typename C::Sums& acc, uint32_t group, int32_t row, int32_t column) {
  constexpr MathGroupShape part = C::kGroup;
  const GlobalRows<typename C::D> d{static_cast<typename C::D*>(p.d), p.d_stride, tile.row_end, p.n, p.paired_store};
  if (p.accumulate) {
    HOPPER_UNROLL for (int wave = 0; wave < part.waves; ++wave)
      d.template add_to<part.wave_columns>(acc.sum[wave], tile.row + row + C::wave_row(wave), column + C::wave_column(wave));
  }
  if constexpr (C::kStaged) {
    if (p.tma_store) {
      auto& staging = shared.staging[group];
      const bool storer = threadIdx.x % 128 == 0;
      if (storer) hopper::bulk_wait_read<0>();   // the previous tile has left the staging
      math_group_sync(group);
      HOPPER_UNROLL for (int wave = 0; wave < part.waves; ++wave)
        acc.stage_bf16(wave, staging, C::wave_row(wave), C::wave_column(wave));
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
                            {column + panel * C::Staging::kPanelColumns, tile.row + row});
        hopper::bulk_commit();
      }
      return;
    }
  }
  HOPPER_UNROLL for (int wave = 0; wave < part.waves; ++wave)
    d.template store<part.wave_columns>(acc.sum[wave], tile.row + row + C::wave_row(wave), column + C::wave_column(wave));
}

template <class C>
HOPPER_KERNEL(C::Role::kThreads)
fp8_gemm_kernel(HOPPER_GRID_CONSTANT const TensorMap map_a, HOPPER_GRID_CONSTANT const TensorMap map_b,
                HOPPER_GRID_CONSTANT const TensorMap map_scale_a, HOPPER_GRID_CONSTANT const TensorMap map_d,
                HOPPER_GRID_CONSTANT const Params p) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(hopper::dynamic_smem());
  const uint32_t warp = C::Role::warp(), group = warp / 4;
  if (threadIdx.x == 0) shared.pipeline.init(C::Role::kMathWarps * C::kCluster);
  if constexpr (C::kCluster > 1) {
    hopper::cluster_sync();
  } else {
    hopper::block_sync();
  }
  hopper::grid_dependency_wait();   // before the first global access: the previous kernel may have written A or read D

  if (group == C::Role::kMathGroups) {
    C::Role::become_producer();
    if (warp == C::Role::kMathWarps && hopper::elect_one()) producer<C>(shared, map_a, map_b, map_scale_a, p);
  } else {
    C::Role::become_math();
    math<C>(shared, map_d, p, group);
    if (C::kStaged && threadIdx.x % 128 == 0) hopper::bulk_wait<0>();   // the last store still reads shared memory
  }
  drain_cluster<C::kCluster>();
}

}  // namespace fp8_gemm_kernels
