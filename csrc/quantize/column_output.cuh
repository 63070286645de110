// 128 x 1: the maxima of a tile's columns, and the codes stored transposed, through shared memory.
//
// A thread packs its 4 rows of a column into one word: row `column` of the transposed tile, word `group`. The tile has
// rows of 128 bytes = 8 pieces of 16; piece p of row c lies at p ^ (c / kPiece % 8):
//
//   writing   a warp's 32 lanes are 8 columns of stride kPiece by 4 groups of one piece: 8 different pieces, 32 banks
//   reading   8 lanes take the 8 pieces of one row: all 32 banks, in any order; 128 contiguous bytes of the output
#pragma once

#include "patch.cuh"

namespace quantize_kernels {

constexpr int kThreads = 256;            // of a block that holds a whole tile
constexpr int kWarps = kThreads / 32;

struct ColumnOutput {
  uint8_t* q_t;                  // [channels, 128 * token_tiles]
  int64_t token_tiles;
  float* scale_t;                // [token_tiles, scale_t_stride]
  int64_t scale_t_stride;        // channels padded to 4
};

struct TransposedTile {
  uint32_t words[kTile][kTile / 4];

  template <int kPiece>
  static HOPPER_DEVICE int piece(int column, int index) { return index ^ (column / kPiece & 7); }

  template <int kPiece>
  HOPPER_DEVICE void put(int column, int group, uint32_t word) {
    words[column][4 * piece<kPiece>(column, group / 4) + group % 4] = word;
  }
  template <int kPiece>
  HOPPER_DEVICE uint32_t word(int column, int group) const {
    return words[column][4 * piece<kPiece>(column, group / 4) + group % 4];
  }
  template <int kPiece>
  HOPPER_DEVICE uint4 get(int column, int index) const {
    return *reinterpret_cast<const uint4*>(&words[column][4 * piece<kPiece>(column, index)]);
  }
};

struct ColumnScratch {
  alignas(16) uint32_t maxima[kWarps][kTile];
  alignas(16) float multiplier[kTile];
};

// Reduces over the 4 groups of a warp; the lane is left with 4 columns, 16 bytes, that it writes to `line`.
template <class P>
HOPPER_DEVICE void reduce_columns(const uint32_t (&own)[kColumns], uint32_t* line, Place at) {
  const bool odd = at.group & 1, high = at.group & 2;
  uint32_t half[8], quarter[4];
  HOPPER_UNROLL
  for (int i = 0; i < 8; ++i) {
    half[i] = larger(odd ? own[8 + i] : own[i], hopper::shuffle_xor(odd ? own[i] : own[8 + i], 8));
  }
  HOPPER_UNROLL
  for (int i = 0; i < 4; ++i) {
    quarter[i] = larger(high ? half[4 + i] : half[i], hopper::shuffle_xor(high ? half[i] : half[4 + i], 16));
  }
  const int first = P::column(8 * odd + 4 * high, at.lane);
  *reinterpret_cast<uint4*>(line + first) = uint4{quarter[0], quarter[1], quarter[2], quarter[3]};
}

// Encodes the thread's columns, `multiplier(column)` each, and puts them into the tile.
template <bool kSpecial, class P, class Multiplier>
HOPPER_DEVICE void put_columns(const P& patch, Multiplier multiplier, TransposedTile& tile, Place at) {
  HOPPER_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    const int column = P::column(i, at.lane);
    const float m = multiplier(column);
    const uint32_t word = encode4<kSpecial>(
        {patch.bits(0, i), patch.bits(1, i), patch.bits(2, i), patch.bits(3, i)}, {m, m, m, m});
    tile.put<P::kPiece>(column, at.group, word);
  }
}

// Byte i of each of 4 words, the first in the lowest byte.
HOPPER_DEVICE uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d, int i) {
  return (a >> 8 * i & 0xFF) | (b >> 8 * i & 0xFF) << 8 | (c >> 8 * i & 0xFF) << 16 | d >> 8 * i << 24;
}

// Puts codes that exist row by row into the tile; P is the patch that they follow.
template <class P>
HOPPER_DEVICE void put_codes(const uint32_t (&codes)[kRows][kColumns / 4], TransposedTile& tile, Place at) {
  HOPPER_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    const uint32_t word = gather_bytes(codes[0][i / 4], codes[1][i / 4], codes[2][i / 4], codes[3][i / 4], i % 4);
    tile.put<P::kPiece>(P::column(i, at.lane), at.group, word);
  }
}

// Stores the tile's columns as rows of `out`: 8 lanes one row, 128 bytes. `lengths` of those exist; `aligned` if all
// rows start at multiples of 16 bytes and a multiple of 16 of them exists.
template <int kPiece>
HOPPER_DEVICE void store_transposed(const TransposedTile& tile, uint8_t* corner, int64_t stride, int columns,
                                    int lengths, bool aligned) {
  constexpr int kStep = kThreads / 8;
  const int index = static_cast<int>(threadIdx.x % 8), first = 16 * index;
  const int thread_column = static_cast<int>(threadIdx.x / 8);
  uint8_t* line = corner + thread_column * stride + first;
  HOPPER_UNROLL
  for (int step = 0; step < kTile / kStep; ++step, line += kStep * stride) {
    const int column = thread_column + step * kStep;
    if (column >= columns || first >= lengths) continue;
    const uint4 codes = tile.get<kPiece>(column, index);
    if (aligned) {
      *reinterpret_cast<uint4*>(line) = codes;
    } else {
      const uint32_t w[4] = {codes.x, codes.y, codes.z, codes.w};
      HOPPER_UNROLL
      for (int b = 0; b < 16; ++b) {
        if (first + b < lengths) line[b] = static_cast<uint8_t>(w[b / 4] >> (8 * (b % 4)));
      }
    }
  }
}

// All of 128 x 1 for one tile, in patches of P; three barriers, two of them before the first access to `codes`. The same
// shared memory serves the block's next tile at once: whoever writes has passed a barrier behind the last reader.
template <class P>
HOPPER_DEVICE void quantize_patch_columns(const P& patch, const ColumnOutput& out, const Window& window, int64_t tile,
                                          ScaleRule rule, TransposedTile& codes, ColumnScratch& scratch,
                                          Place at) {
  uint32_t own[kColumns];
  uint32_t largest = 0;
  HOPPER_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    own[i] = patch.column_amax(i);
    largest = larger(largest, own[i]);
  }
  reduce_columns<P>(own, scratch.maxima[threadIdx.x / 32], at);
  hopper::barrier_sync<0>(kThreads);

  if (threadIdx.x < kTile) {
    uint32_t amax = 0;
    HOPPER_UNROLL
    for (int w = 0; w < kWarps; ++w) amax = larger(amax, scratch.maxima[w][threadIdx.x]);
    const TileScale scale = tile_scale(amax, rule);
    scratch.multiplier[threadIdx.x] = scale.multiplier;
    // Channels past the end are zeros, hence 1: the padding of the layout.
    const int64_t channel = window.column + threadIdx.x;
    if (channel < out.scale_t_stride) out.scale_t[tile * out.scale_t_stride + channel] = scale.scale;
  }
  hopper::barrier_sync<0>(kThreads);

  const auto multiplier = [&](int c) { return scratch.multiplier[c]; };
  if (largest >= kInfinity) {
    put_columns<true>(patch, multiplier, codes, at);
  } else {
    put_columns<false>(patch, multiplier, codes, at);
  }
  hopper::barrier_sync<0>(kThreads);

  const int64_t stride = out.token_tiles * kTile;
  uint8_t* corner = out.q_t + window.column * stride + tile * kTile;
  store_transposed<P::kPiece>(codes, corner, stride, window.columns, kTile, true);
}

}  // namespace quantize_kernels
