// Which tile of D a CTA of fp8_wgrad works on next, and over which slices of tokens: plain host and device code without
// shared state, like the schedulers of common/tile_scheduler.h, so that a CPU test can enumerate every tile.
//
// All groups have the same tiles and differ in their slices, so that a tile's index is (group, tile of the group) by one
// division and nobody walks. Groups follow one another as they are numbered: the tiles that run together share operands
// in L2. Sorting by length would balance the tail a little better, but needs the lengths before the launch.
#pragma once

#include "../common/tile_scheduler.h"

constexpr int32_t kWgradSlice = 128;   // tokens under one scale

struct WgradTile {
  int32_t group = -1;                  // none yet
  int32_t row = 0, column = 0;         // first of the tile in the group's D
  int32_t slice = 0, slice_end = 0;    // of the tokens
};

struct WgradTiles {
  TileGrid grid;
  Raster raster;                       // of one group: a cluster never straddles two
  uint32_t count = 0;                  // units of all groups
  int32_t slices = 0;                  // that the operands have
  const int32_t* offsets = nullptr;    // [groups + 1] tokens, device; null: one group that owns all slices

  // `tile` is that of the last call, or a fresh one: offsets are read again only when the group changes.
  TILE_FUNCTION bool find(uint32_t index, uint32_t rank, WgradTile& tile) const {
    if (index >= count) return false;
    const auto group = static_cast<int32_t>(index / raster.count());
    if (group != tile.group) {
      tile.group = group;
      slices_of(group, tile.slice, tile.slice_end);
    }
    Tile place;
    grid.place(raster, index % raster.count(), rank, place);
    tile.row = place.row;
    tile.column = place.column;
    return true;
  }

  // The whole slices between two offsets that exist. The device cannot raise an error: whatever stands in `offsets`,
  // 0 <= begin <= end <= slices.
  TILE_FUNCTION void slices_of(int32_t group, int32_t& begin, int32_t& end) const {
    begin = 0, end = slices;
    if (!offsets) return;
    const int32_t first = offsets[group], past = offsets[group + 1];
    if (first > 0) begin = first / kWgradSlice + (first % kWgradSlice != 0);
    if (past < slices * static_cast<int64_t>(kWgradSlice)) end = past > 0 ? past / kWgradSlice : 0;
    if (begin > end) begin = end;
  }
};

inline WgradTiles wgrad_tiles(const TileGrid& grid, int64_t m, int64_t groups, uint32_t clusters) {
  WgradTiles tiles;
  tiles.grid = grid;
  tiles.raster = choose_raster(grid, m, clusters);
  tiles.count = static_cast<uint32_t>(groups * tiles.raster.count());
  return tiles;
}
