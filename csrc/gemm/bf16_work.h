// What a CTA of bf16_gemm works on next: a tile of D, the matrices that it comes from, and the range of K.
//
// Plain host and device code without shared state, as tile_scheduler.h, whose schedulers it joins: every role walks the
// same list by itself, with ascending indices. How the problem is cut is a value, not a type: it costs a branch a tile
// and saves a kernel for each.
#pragma once

#include <cstdint>

#include "../common/tile_scheduler.h"

enum class Grouping : uint8_t {
  none,             // one product
  rows_by_offsets,  // rows index[g] .. index[g+1] of A and D meet B[g]
  rows_by_mask,     // the first index[g] rows of A[g] and D[g] meet B[g]
  k_by_offsets,     // D[g] is the product over index[g] .. index[g+1] of K
  k_by_mask         // D[g] = A[g] B[g]^T over the first index[g] of K
};

// The range of each group. The device cannot raise an error: what lies outside of 0..limit is moved to its border, and
// a range that descends is empty.
struct GroupRanges {
  const int32_t* index = nullptr;   // offsets [groups + 1] or counts [groups]
  int32_t limit = 0;
  bool counts = false;

  TILE_FUNCTION int32_t clamped(int32_t x) const { return x < 0 ? 0 : x > limit ? limit : x; }
  TILE_FUNCTION int32_t begin(int32_t g) const { return counts ? 0 : clamped(index[g]); }
  TILE_FUNCTION int32_t end(int32_t g) const { return clamped(index[counts ? g : g + 1]); }
  TILE_FUNCTION int32_t id(int32_t g) const { return g; }
};

struct Work {
  Tile tile;
  int32_t a_matrix = 0, b_matrix = 0, d_matrix = 0;
  int32_t k_begin = 0, k_end = 0;   // never descends
  bool empty_group = false;         // a group without K: accumulation leaves D as it is
};

struct WorkList {
  Grouping grouping = Grouping::none;
  DenseTiles dense;                    // of D, or of each D[g]
  GroupedTiles<GroupRanges> grouped;   // rows by offsets or by mask
  GroupRanges ranges;                  // of K
  int32_t groups = 0, k = 0;

  TILE_FUNCTION bool find(uint32_t index, uint32_t rank, Work& work) {
    work = Work{};
    work.k_end = k;
    if (grouping == Grouping::none) return dense.find(index, rank, work.tile);
    if (grouping == Grouping::rows_by_offsets || grouping == Grouping::rows_by_mask) {
      if (!grouped.find(index, rank, work.tile)) return false;
      work.b_matrix = work.tile.group;
      if (grouping == Grouping::rows_by_mask) work.a_matrix = work.d_matrix = work.tile.group;
      return true;
    }
    const uint32_t count = dense.raster.count();
    const int32_t group = static_cast<int32_t>(index / count);
    if (group >= groups) return false;
    dense.find(index % count, rank, work.tile);
    work.d_matrix = group;
    if (grouping == Grouping::k_by_mask) work.a_matrix = work.b_matrix = group;
    work.k_begin = ranges.begin(group);
    work.k_end = ranges.end(group);
    work.empty_group = work.k_end <= work.k_begin;
    if (work.empty_group) work.k_end = work.k_begin;
    return true;
  }

  // Whether a group owns this row of D[matrix].
  TILE_FUNCTION bool owned(int32_t matrix, int32_t row) const {
    if (grouping == Grouping::rows_by_mask) return row < grouped.rows.end(matrix);
    if (grouping != Grouping::rows_by_offsets) return true;
    return row >= grouped.rows.begin(0) && row < grouped.rows.begin(groups);
  }
};
