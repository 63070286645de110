// Which tile of D an FP8 GEMM should use: a cost model in SM clocks, from research/gemm-quant.md sections 1.3 and 6.2.
//
// The model is arithmetic, not measurement: its constants stand below by name, so that a ledger of hardware runs can
// correct them one by one. Whoever knows better passes a tile of their own; nothing here is global or remembered.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tile_scheduler.h"

struct TileShape {
  int32_t rows, columns;
  constexpr bool operator==(const TileShape& other) const { return rows == other.rows && columns == other.columns; }
};

// How the two math warpgroups divide a tile. A wave is what one warpgroup multiplies before it promotes: 64 rows by
// wave_columns, wave_columns / 2 registers a thread. Two waves share that partial sum, which is how 256x128 and
// 128x256 fit into 232 registers (64 partial + 128 final).
struct MathGroupShape {
  int32_t rows, columns;           // of one warpgroup's part of the tile
  int32_t row_waves, column_waves;
  int32_t waves;                   // row_waves * column_waves
  int32_t wave_columns;
};

constexpr MathGroupShape math_group_shape(TileShape tile) {
  MathGroupShape group{};
  // 64 rows are one wgmma tall, so that the groups divide the columns; otherwise each takes half of the rows.
  group.rows = tile.rows == 64 ? 64 : tile.rows / 2;
  group.columns = tile.rows == 64 ? tile.columns / 2 : tile.columns;
  group.row_waves = group.rows / 64;
  group.column_waves = group.columns > 192 ? 2 : 1;
  group.waves = group.row_waves * group.column_waves;
  group.wave_columns = group.columns / group.column_waves;
  return group;
}

struct TileProblem {
  int64_t m, n, k;
  int32_t sms;          // multiprocessors the launch may use
  bool clusters = true; // whether pairs of CTAs may share an operand
  int64_t groups = 1;   // that share the m rows, nobody on the host knows how; tiles never span two of them
};

struct TileChoice {
  TileShape shape;
  Multicast multicast;
  uint64_t clocks;      // of the model, for the whole GEMM
};

// Clocks of one SM for one 128-deep slice of a tile: the slowest of tensor core, shared memory port and L2.
uint64_t slice_clocks(TileShape, Multicast);

// Clocks of the whole GEMM: full waves of tiles, each with its slices and its epilogue.
uint64_t gemm_clocks(const TileProblem&, TileShape, Multicast);

// The cheapest of `shapes`, with or without a cluster. Equal costs go to the earlier shape and to no cluster.
TileChoice choose_tile(const TileProblem&, const TileShape* shapes, size_t count);
