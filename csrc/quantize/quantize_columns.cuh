// 128 x 1, stored transposed; with kWithRows the 1 x 128 rows too, from the same read. One block a tile.
//
//   load 128 x 128 -> registers | rows: reduce, encode, store | columns: maxima of each warp -> smem | barrier |
//   scales and multipliers of 128 columns -> smem | barrier | encode, 4 rows a word -> smem | barrier | store
#pragma once

#include <type_traits>

#include "column_output.cuh"
#include "e5m6_format.cuh"
#include "row_output.cuh"

namespace quantize_kernels {

struct Groups {
  const int32_t* offsets = nullptr;         // [count + 1] rows of x; null: one group, all rows
  const int32_t* padded_offsets = nullptr;  // [count + 1] columns of q_t
  int32_t count = 0;
};

struct ColumnParams {
  Source x;
  const float* x_scale;          // of e4m3 or E5M6 input: [column_tiles, x_scale_stride]
  int64_t x_scale_stride;
  int64_t tokens, channels;
  uint32_t column_tiles;         // of channels
  Groups groups;
  RowOutput rows;                // with kWithRows
  uint8_t* q_t;                  // [channels, 128 * token_tiles]
  int64_t token_tiles;
  float* scale_t;                // [token_tiles, scale_t_stride]
  int64_t scale_t_stride;        // channels padded to 4
  ScaleRule rule;
};

struct ColumnShared {
  TransposedTile codes;
  alignas(16) uint32_t maxima[kWarps][kTile];
  alignas(16) float multiplier[kTile];
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

template <class T>
using Values = std::conditional_t<sizeof(T) == 1, DecodedPatch, Patch<T>>;

template <class T, bool kWithRows, bool kVector>
HOPPER_KERNEL_BLOCKS(kThreads, (whole_tiles_per_sm<T, kVector>)) quantize_columns_kernel(const ColumnParams p) {
  auto& shared = *reinterpret_cast<ColumnShared*>(hopper::dynamic_smem());
  const int64_t tile = blockIdx.x / p.column_tiles, column = int64_t{blockIdx.x % p.column_tiles} * kTile;
  const Place at;
  const int warp = static_cast<int>(threadIdx.x / 32);

  hopper::grid_dependency_wait();
  const Span span = span_of_tile(p.groups, p.tokens, tile);
  const Window window = window_of(span, p.tokens, p.channels, column);
  Values<T> patch;
  if constexpr (sizeof(T) == 1) {
    std::conditional_t<std::is_same_v<T, e5m6>, PackedPatch, CodedPatch> coded;
    coded.template load<kVector>(p.x, window, at);
    decode(coded, p.x_scale + column / kTile * p.x_scale_stride, window, at, patch);
  } else {
    patch.template load<kVector>(p.x, window, at);
  }
  hopper::grid_dependency_launch();

  if constexpr (kWithRows) {
    if (tile == 0) pad_row_scales(p.rows, p.tokens, column);
    quantize_patch_rows<T, kVector>(patch, p.rows, window, p.rule, at);
    if (tile >= p.token_tiles) return;   // tokens of no group that found no padding tile
  }
  if (!span.in_group) patch.clear();

  uint32_t own[kColumns];
  uint32_t largest = 0;
  HOPPER_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    own[i] = patch.column_amax(i);
    largest = larger(largest, own[i]);
  }
  reduce_columns<Values<T>>(own, shared.maxima[warp], at);
  hopper::barrier_sync<0>(kThreads);

  if (threadIdx.x < kTile) {
    uint32_t amax = 0;
    HOPPER_UNROLL
    for (int w = 0; w < kWarps; ++w) amax = larger(amax, shared.maxima[w][threadIdx.x]);
    const TileScale scale = tile_scale(amax, p.rule);
    shared.multiplier[threadIdx.x] = scale.multiplier;
    // Channels past the end are zeros, hence 1: the padding of the layout.
    const int64_t channel = column + threadIdx.x;
    if (channel < p.scale_t_stride) p.scale_t[tile * p.scale_t_stride + channel] = scale.scale;
  }
  hopper::barrier_sync<0>(kThreads);

  const auto multiplier = [&](int c) { return shared.multiplier[c]; };
  if (largest >= kInfinity) {
    put_columns<true>(patch, multiplier, shared.codes, at);
  } else {
    put_columns<false>(patch, multiplier, shared.codes, at);
  }
  hopper::barrier_sync<0>(kThreads);

  const int64_t stride = p.token_tiles * kTile;
  uint8_t* corner = p.q_t + column * stride + tile * kTile;
  store_transposed<Values<T>::kPiece>(shared.codes, corner, stride, window.columns, kTile, true);
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
