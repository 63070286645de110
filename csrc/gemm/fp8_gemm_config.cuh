// What a kernel of the FP8 GEMM family is made of: tile, element of D, cluster, and where its tiles come from.
#pragma once

#include <type_traits>

#include "../common/accumulator.h"
#include "../common/group_table.h"
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
constexpr int kMaxGroups = 512;             // the table of groups must fit beside the stages

constexpr int gcd(int a, int b) { return b == 0 ? a : gcd(b, a % b); }

// Tiles: DenseTiles (one matrix), GroupedTiles<RowsByOffsets> (rows of groups packed in one A and one D) or
// GroupedTiles<RowsByMask> (an A and a D of their own for every group).
template <class Tiles>
struct Params {
  Tiles tiles;
  const float* scale_b;
  int64_t scale_b_stride, scale_b_group_stride;
  int32_t scale_b_rows;
  int32_t n;
  int32_t slices;             // ceil(K / 128)
  int32_t rows;               // of one D, whether a group owns them or not
  void* d;
  int64_t d_stride, d_group_stride;
  bool accumulate;
  bool aligned_rows;          // D's rows start at multiples of 16 bytes: TMA and 16-byte stores reach them
  bool paired_store;          // D is aligned to pairs of elements
  bool clear_rest;            // grouped: rows of D that no group owns become zero
};

template <int TileRows, int TileColumns, class OutputElement, int Cluster, class TileSource = DenseTiles>
struct Config {
  static constexpr int kTileRows = TileRows, kTileColumns = TileColumns, kCluster = Cluster;
  static constexpr MathGroupShape kGroup = math_group_shape(TileShape{TileRows, TileColumns});
  using Tiles = TileSource;
  using Params = fp8_gemm_kernels::Params<Tiles>;
  static constexpr bool kGrouped = !std::is_same_v<Tiles, DenseTiles>;                  // B is one matrix per group
  static constexpr bool kBatched = std::is_same_v<Tiles, GroupedTiles<RowsByMask>>;     // so are A and D
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

  struct Nothing {};
  using Table = std::conditional_t<kGrouped, GroupTable<kMaxGroups>, Nothing>;
  static constexpr int kStageBytes = (TileRows + TileColumns) * kSliceK + TileRows * static_cast<int>(sizeof(float));
  static constexpr int kStagingBytes = kStaged ? TileRows * TileColumns * 2 : 0;
  static constexpr int kTableBytes = kGrouped ? static_cast<int>(sizeof(Table)) : 0;
  static constexpr int kFitting = (kSmemLimit - kStagingBytes - kTableBytes - 1024) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static_assert(kStages >= 3, "fewer than three stages do not cover the latency of memory");

  struct Shared {
    SharedTile<e4m3, TileRows, kSliceK, Swizzle::b128> a[kStages];
    SharedTile<e4m3, TileColumns, kSliceK, Swizzle::b128> b[kStages];
    std::conditional_t<kStaged, Staging, Nothing> staging[Role::kMathGroups];
    alignas(128) float scale_a[kStages][TileRows];
    Pipeline<kStages> pipeline;
    Table table;
  };
  static_assert(sizeof(Shared) <= kSmemLimit, "the stages, the staging and the groups must fit into shared memory");
  static_assert((1 + kGroup.waves) * Sums::kRegisters + 40 <= 232,
                "partial sum, sums and 40 registers for addresses must fit into a math thread");
  static_assert(TileRows % (8 * Cluster) == 0 && TileColumns % (8 * Cluster) == 0,
                "each CTA of a cluster loads whole swizzle patterns of 8 rows");
};

// The list of tiles that a role walks: of groups, the CTA's table. There the compiler may know the tile, since rows
// become tiles at every group; for one matrix it would only rebuild from it what it can keep.
template <class C>
HOPPER_DEVICE typename C::Tiles tiles_of(const typename C::Shared& shared, const typename C::Params& p) {
  typename C::Tiles tiles = p.tiles;
  if constexpr (C::kGrouped) {
    tiles.grid.tile_rows = C::kTileRows;
    tiles.grid.tile_columns = C::kTileColumns;
    if (C::kCluster == 1) tiles.grid.multicast = Multicast::none;
    tiles.rows = shared.table.rows(p.tiles.rows);
    tiles.groups = shared.table.count;
  }
  return tiles;
}

}  // namespace fp8_gemm_kernels
