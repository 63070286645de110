// 128 x 1, stored transposed; with kWithRows the 1 x 128 rows too, from the same read. One block a tile.
//
//   load 128 x 128 -> registers | rows: reduce, encode, store | columns: maxima of each warp -> smem | barrier |
//   scales and multipliers of 128 columns -> smem | barrier | encode, 4 rows a word -> smem | barrier | store
#pragma once

#include <type_traits>

#include "column_output.cuh"
#include "e5m6_format.cuh"
#include "groups.cuh"
#include "row_output.cuh"

namespace quantize_kernels {

struct ColumnParams {
  Source x;
  const float* x_scale;          // of e4m3 or E5M6 input: [column_tiles, x_scale_stride]
  int64_t x_scale_stride;
  int64_t tokens, channels;
  uint32_t column_tiles;         // of channels
  Groups groups;
  RowOutput rows;                // with kWithRows
  ColumnOutput columns;
  ScaleRule rule;
};

struct ColumnShared {
  TransposedTile codes;
  ColumnScratch scratch;
};

template <class T>
using Values = std::conditional_t<sizeof(T) == 1, DecodedPatch, Patch<T>>;

template <class T, bool kWithRows, bool kVector>
HOPPER_KERNEL_BLOCKS(kThreads, (whole_tiles_per_sm<T, kVector>)) quantize_columns_kernel(const ColumnParams p) {
  auto& shared = *reinterpret_cast<ColumnShared*>(hopper::dynamic_smem());
  const int64_t tile = blockIdx.x / p.column_tiles, column = int64_t{blockIdx.x % p.column_tiles} * kTile;
  const Place at;

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
    if (tile >= p.columns.token_tiles) return;   // tokens of no group that found no padding tile
  }
  if (!span.in_group) patch.clear();

  quantize_patch_columns(patch, p.columns, window, tile, p.rule, shared.codes, shared.scratch, at);
}

}  // namespace quantize_kernels
