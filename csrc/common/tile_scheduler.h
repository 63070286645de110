// Persistent tile schedulers: which tile of D a CTA works on next.
//
// Every role of a kernel (producer, math) walks the same list by itself, so no role has to tell another what comes:
//
//   for (uint32_t i = cluster; tiles.find(i, rank, tile); i += clusters) { ... }
//
// All of it is plain host and device code without shared state, so that a CPU test can enumerate every tile.
//
// A cluster of two CTAs takes two neighbouring tiles at once and `rank` picks one of them. When the number of tiles
// along that axis is odd, the last cluster has a surplus tile outside of the matrix: TMA fills its loads with zeros
// and clips its stores, so it costs time but needs no special case, and the two CTAs stay in step. With groups the
// rounding is done inside each group: a cluster never straddles two of them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../hopper/types.h"

#ifdef __CUDACC__
#define TILE_FUNCTION __host__ __device__ __forceinline__
#else
#define TILE_FUNCTION inline
#endif

// The operand that the two CTAs of a cluster share, each loading one half for both. Sharing A means neighbours along N.
enum class Multicast : uint8_t { none, a, b };

// One tile of D. Rows from row_end and columns from N on do not exist.
struct Tile {
  int32_t group = 0;      // which matrix B (and, in a masked batch, which A and D)
  int32_t row = 0;        // first row
  int32_t row_end = 0;    // past the last row that exists
  int32_t column = 0;     // first column
};

TILE_FUNCTION uint32_t tiles_of(int64_t size, uint32_t tile) { return static_cast<uint32_t>((size + tile - 1) / tile); }

// The tiles of one matrix, numbered in bands: `band` tiles wide along one axis, as long as the matrix along the other,
// the short side running fastest. The tiles that run at the same time then form a compact block, which needs the
// fewest different rows of A and B: they are found in L2 instead of HBM.
struct Raster {
  uint32_t m_units = 0, n_units = 0;   // tiles, or pairs of tiles along the multicast axis
  uint32_t band = 8;
  bool along_m = true;                 // the axis that is cut into bands

  TILE_FUNCTION uint32_t count() const { return m_units * n_units; }

  TILE_FUNCTION void at(uint32_t index, uint32_t& m, uint32_t& n) const {
    const uint32_t across = along_m ? m_units : n_units, length = along_m ? n_units : m_units;
    const uint32_t first = index / (band * length) * band;
    const uint32_t width = across - first < band ? across - first : band;
    const uint32_t inside = index - first * length;
    const uint32_t p = first + inside % width, q = inside / width;
    m = along_m ? p : q;
    n = along_m ? q : p;
  }
};

// What every scheduler knows about tiles and clusters.
struct TileGrid {
  int32_t n = 0;
  uint32_t tile_rows = 0, tile_columns = 0;
  Multicast multicast = Multicast::none;

  TILE_FUNCTION uint32_t m_pair() const { return multicast == Multicast::b ? 2 : 1; }
  TILE_FUNCTION uint32_t n_pair() const { return multicast == Multicast::a ? 2 : 1; }
  TILE_FUNCTION uint32_t m_units(int64_t rows) const { return tiles_of(rows, tile_rows * m_pair()); }
  TILE_FUNCTION uint32_t n_units() const { return tiles_of(n, tile_columns * n_pair()); }

  TILE_FUNCTION void place(const Raster& raster, uint32_t index, uint32_t rank, Tile& tile) const {
    uint32_t m, n_;
    raster.at(index, m, n_);
    if (multicast == Multicast::b) m = m * 2 + rank;
    if (multicast == Multicast::a) n_ = n_ * 2 + rank;
    tile.row += static_cast<int32_t>(m * tile_rows);
    tile.column = static_cast<int32_t>(n_ * tile_columns);
  }
};

// One matrix.
struct DenseTiles {
  TileGrid grid;
  int32_t m = 0;
  Raster raster;

  TILE_FUNCTION bool find(uint32_t index, uint32_t rank, Tile& tile) const {
    if (index >= raster.count()) return false;
    tile = Tile{0, 0, m, 0};
    grid.place(raster, index, rank, tile);
    return true;
  }
};

// Rows of A packed group after group: group g owns rows offsets[g] .. offsets[g+1], with no alignment.
// Offsets that descend count as an empty group: the device cannot raise an error.
struct RowsByOffsets {
  const int32_t* offsets = nullptr;   // [groups + 1], global or a copy in shared memory
  const uint16_t* ids = nullptr;      // what the groups are called where empty ones were left out; null: 0, 1, 2, ...
  TILE_FUNCTION int32_t begin(int32_t g) const { return offsets[g]; }
  TILE_FUNCTION int32_t end(int32_t g) const { return offsets[g + 1]; }
  TILE_FUNCTION int32_t id(int32_t g) const { return ids == nullptr ? g : ids[g]; }
};

// A batch of matrices with the same room for rows, of which the first rows[g] exist.
struct RowsByMask {
  const int32_t* rows = nullptr;      // [groups]
  const uint16_t* ids = nullptr;
  TILE_FUNCTION int32_t begin(int32_t) const { return 0; }
  TILE_FUNCTION int32_t end(int32_t g) const { return rows[g]; }
  TILE_FUNCTION int32_t id(int32_t g) const { return ids == nullptr ? g : ids[g]; }
};

// The tiles of all groups, one group after the other so that its B stays in L2. Indices must ascend from call to
// call: the walk over groups goes on from where it stands, so that all calls together read each group once.
template <class Rows>
struct GroupedTiles {
  TileGrid grid;
  Rows rows;
  int32_t groups = 0;
  uint32_t band = 8;

  int32_t group = -1;          // the walk: current group, number of its first tile, number past its last
  uint32_t first = 0, past = 0;
  Raster raster;

  TILE_FUNCTION bool find(uint32_t index, uint32_t rank, Tile& tile) {
    while (index >= past) {
      if (++group >= groups) return false;
      const int32_t count = rows.end(group) - rows.begin(group);
      raster = Raster{grid.m_units(count > 0 ? count : 0), grid.n_units(), band, true};
      first = past;
      past += raster.count();
    }
    tile = Tile{rows.id(group), rows.begin(group), rows.end(group), 0};
    grid.place(raster, index - first, rank, tile);
    return true;
  }
};

template <class Rows>
TILE_FUNCTION GroupedTiles<Rows> grouped_tiles(const TileGrid& grid, Rows rows, int32_t groups) {
  GroupedTiles<Rows> tiles{};
  tiles.grid = grid;
  tiles.rows = rows;
  tiles.groups = groups;
  return tiles;
}

// The raster of a dense matrix whose cheapest wave of `clusters` reads the fewest different rows of A and B.
inline Raster choose_raster(const TileGrid& grid, int64_t m, uint32_t clusters) {
  Raster best{grid.m_units(m), grid.n_units(), 8, true};
  uint64_t best_rows = ~uint64_t{0};
  for (const bool along_m : {true, false}) {
    for (const uint32_t band : {8u, 16u, 4u, 32u}) {
      const uint32_t across = along_m ? best.m_units : best.n_units, length = along_m ? best.n_units : best.m_units;
      const uint32_t p = band < across ? band : across;
      const uint32_t q = p == 0 ? 0 : (clusters + p - 1) / p < length ? (clusters + p - 1) / p : length;
      const uint64_t a_rows = uint64_t{along_m ? p : q} * grid.tile_rows * grid.m_pair();
      const uint64_t b_rows = uint64_t{along_m ? q : p} * grid.tile_columns * grid.n_pair();
      if (a_rows + b_rows < best_rows) {
        best_rows = a_rows + b_rows;
        best.band = band;
        best.along_m = along_m;
      }
    }
  }
  return best;
}

inline DenseTiles dense_tiles(const TileGrid& grid, int32_t m, uint32_t clusters) {
  return DenseTiles{grid, m, choose_raster(grid, m, clusters)};
}
