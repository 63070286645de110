// The groups of a grouped GEMM as one CTA uses them: read once from device memory, made safe, the empty ones left out.
//
// Made safe: the host never sees offsets or counts, so that nonsense cannot be refused. Here it is clamped to the rows
// that exist and made to ascend (an offset below an earlier one counts as that one): whatever the tensor holds, groups
// are disjoint and lie within the operands.
// Empty ones left out: a role walks over groups to find its tile, and each that is listed has a tile for somebody.
//
//   table.read(rows, groups, limit, threads);   all threads, after grid_dependency_wait
//   block_sync();
//   if (warp == 0) table.compact(rows, groups);
//   block_sync();
//   auto mine = table.rows(rows);               every thread: for GroupedTiles, with table.count groups
#pragma once

#include "../hopper/front.h"
#include "tile_scheduler.h"

// lane l: join of the values of lanes 0 .. l
template <class Join>
HOPPER_DEVICE int32_t warp_scan(int32_t value, Join join) {
  const uint32_t lane = threadIdx.x % 32;
  HOPPER_UNROLL for (uint32_t by = 1; by < 32; by *= 2) {
    const int32_t before = hopper::shuffle_up(value, by);
    if (lane >= by) value = join(before, value);
  }
  return value;
}

template <int MaxGroups>
struct GroupTable {
  static_assert(MaxGroups < 1 << 16, "ids are 16 bits");

  int32_t bounds[MaxGroups + 1];   // by offsets: where the rows begin, and where the last end; by mask: how many
  int32_t count;                   // groups that are listed
  uint16_t ids[MaxGroups];

  static HOPPER_DEVICE int32_t clamp(int32_t value, int32_t limit) {
    return value < 0 ? 0 : value > limit ? limit : value;
  }

  HOPPER_DEVICE void read(const RowsByOffsets& from, int32_t groups, int32_t limit, uint32_t threads) {
    for (int32_t g = threadIdx.x; g <= groups; g += threads) bounds[g] = clamp(from.offsets[g], limit);
  }
  HOPPER_DEVICE void read(const RowsByMask& from, int32_t groups, int32_t limit, uint32_t threads) {
    for (int32_t g = threadIdx.x; g < groups; g += threads) bounds[g] = clamp(from.rows[g], limit);
  }

  // In place: an entry moves to the front, never past one that is still to be read.
  HOPPER_DEVICE void compact(const RowsByOffsets&, int32_t groups, hopper::Site site = HOPPER_HERE) {
    int32_t end = bounds[0];   // of the groups so far
    keep(groups, 1, site, [&](int32_t bound) {
      const int32_t mine = larger(end, warp_scan(bound, larger)), before = hopper::shuffle_up(mine, 1);
      const bool any = mine > (threadIdx.x % 32 == 0 ? end : before);
      end = hopper::shuffle(mine, 31);
      return Kept{any, mine};
    });
  }
  HOPPER_DEVICE void compact(const RowsByMask&, int32_t groups, hopper::Site site = HOPPER_HERE) {
    keep(groups, 0, site, [](int32_t rows) { return Kept{rows > 0, rows}; });
  }

  HOPPER_DEVICE RowsByOffsets rows(const RowsByOffsets&) const { return {bounds, ids}; }
  HOPPER_DEVICE RowsByMask rows(const RowsByMask&) const { return {bounds, ids}; }

 private:
  struct Kept {
    bool any;        // rows in this group
    int32_t bound;
  };
  static HOPPER_DEVICE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

  template <class Choose>
  HOPPER_DEVICE void keep(int32_t groups, int32_t shift, hopper::Site site, Choose choose) {
    const int32_t lane = threadIdx.x % 32;
    int32_t kept = 0;
    for (int32_t first = 0; first < groups; first += 32) {
      const int32_t g = first + lane;
      const Kept mine = choose(g < groups ? bounds[g + shift] : 0);
      const int32_t upto = warp_scan(mine.any, [](int32_t a, int32_t b) { return a + b; });
      hopper::syncwarp(hopper::kAllLanes, site);   // all have read what is written now
      if (mine.any) {
        bounds[kept + upto - 1 + shift] = mine.bound;
        ids[kept + upto - 1] = static_cast<uint16_t>(g);
      }
      kept += hopper::shuffle(upto, 31);
    }
    if (lane == 0) count = kept;
  }
};
