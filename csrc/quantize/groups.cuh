// Groups of tokens, each padded to whole tiles of its own: which tokens a tile of the transposed output holds.
#pragma once

#include "patch.cuh"

namespace quantize_kernels {

struct Groups {
  const int32_t* offsets = nullptr;         // [count + 1] rows of x; null: one group, all rows
  const int32_t* padded_offsets = nullptr;  // [count + 1] columns of q_t
  int32_t count = 0;
};

// The tokens of one tile of q_t: `count` from `first` on. Outside the groups the tile is padding, and its tokens, if
// any, are quantised along rows only.
struct Span {
  int64_t first, count;
  bool in_group;
};

HOPPER_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Tiles past the last group take the tokens of no group, in order: those before the first group, then those behind.
HOPPER_DEVICE Span span_of_rest(const Groups& groups, int64_t tokens, int64_t tile) {
  const int64_t before = groups.offsets[0], behind = groups.offsets[groups.count];
  const int64_t tiles_before = (before + kTile - 1) / kTile;
  if (tile < tiles_before) return {tile * kTile, smaller(before - tile * kTile, kTile), false};
  const int64_t first = behind + (tile - tiles_before) * kTile;
  return {first, smaller(tokens - first, kTile), false};
}

HOPPER_DEVICE Span span_of_tile(const Groups& groups, int64_t tokens, int64_t tile) {
  const int64_t start = tile * kTile;
  if (groups.offsets == nullptr) return {start, smaller(tokens - start, kTile), true};
  // The tile's group is the number of groups that end at or before it. Lanes look at 32 groups at once.
  uint32_t ended = 0;
  for (int32_t g = static_cast<int32_t>(threadIdx.x % 32); g < groups.count; g += 32) {
    ended += groups.padded_offsets[g + 1] <= start;
  }
  const int32_t group = static_cast<int32_t>(hopper::warp_sum(ended));
  if (group == groups.count) return span_of_rest(groups, tokens, tile - groups.padded_offsets[group] / kTile);
  const int64_t first = groups.offsets[group] + (start - groups.padded_offsets[group]);
  return {first, smaller(groups.offsets[group + 1] - first, kTile), true};
}

// Offsets are device data that nobody has checked: a span never leaves the tensor, whatever they hold.
HOPPER_DEVICE Window window_of(const Span& span, int64_t tokens, int64_t channels, int64_t column) {
  const bool inside = span.first >= 0 && span.first < tokens && span.count > 0;
  return {inside ? span.first : 0, column, inside ? static_cast<int>(smaller(span.count, tokens - span.first)) : 0,
          static_cast<int>(smaller(channels - column, kTile))};
}

// padded_offsets[g]: where group g starts once every group before it is padded to a multiple of 128. One warp; each
// lane sums a run of groups.
HOPPER_KERNEL(32) pad_offsets_kernel(const int32_t* offsets, int32_t* padded_offsets, int32_t count) {
  const auto padded = [&](int32_t g) {
    return static_cast<uint32_t>((int64_t{offsets[g + 1]} - offsets[g] + kTile - 1) / kTile * kTile);
  };
  const auto lane = static_cast<int32_t>(threadIdx.x);
  const int32_t run = (count + 31) / 32;
  const int32_t begin = run * lane < count ? run * lane : count;
  const int32_t end = begin + run < count ? begin + run : count;

  hopper::grid_dependency_wait();
  uint32_t sum = 0;
  for (int32_t g = begin; g < end; ++g) sum += padded(g);
  uint32_t through = sum;
  HOPPER_UNROLL
  for (int32_t distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = hopper::shuffle_up(through, distance);
    if (lane >= distance) through += before;
  }
  uint32_t at = through - sum;
  for (int32_t g = begin; g < end; ++g) {
    padded_offsets[g] = static_cast<int32_t>(at);
    at += padded(g);
  }
  if (lane == 31) padded_offsets[count] = static_cast<int32_t>(through);
  hopper::grid_dependency_launch();
}

}  // namespace quantize_kernels
