// bf16 or fp32 to packed E5M6. Codes go through shared memory of their own warp, so that rows of 12-byte groups leave as
// 16-byte pieces.
//
//   1 x 128     a warp: 16 rows by 128 columns | maxima, scales | encode, 12 bytes a group -> smem | syncwarp | store
//   whole row   a block: one row | maxima, barrier, scale | encode from the registers -> smem | syncwarp | store
#pragma once

#include "e5m6_format.cuh"
#include "row_output.cuh"

namespace quantize_kernels {

constexpr int kPackThreads = 128;
constexpr int kPackRows = kPackThreads / 8 * kRows;   // of a block: 64
constexpr int kWarpRows = 16;

struct PackParams {
  Source x;
  int64_t rows, columns;
  uint32_t column_tiles;
  uint8_t* packed;               // [rows, stride], 4-byte aligned
  int64_t stride;                // bytes: 12 for each 8 columns
  float* scale;                  // [column_tiles, scale_stride], or [rows]
  int64_t scale_stride;          // rows padded to 4
};

// ---- 1 x 128 -------------------------------------------------------------------------------------------------------

// The codes of a warp's 16 rows. 32 bytes between groups of 4 rows: a warp's writes of one word then take all 32 banks,
// for 3 j + 8 g (lane j of group g, modulo 32) takes every value once.
struct PackedRows {
  static constexpr int kGroupWords = kRows * kPackedTile / 4 + 8;
  uint32_t words[kWarpRows / kRows * kGroupWords];

  HOPPER_DEVICE uint32_t* at(int row, int word) { return words + row / kRows * kGroupWords + row % kRows * (kPackedTile / 4) + word; }
};

template <class T, bool kSpecial>
HOPPER_DEVICE void put_packed(const Patch<T>& patch, const float (&multiplier)[kRows], PackedRows& tile, Place at) {
  const int group = at.group % (kWarpRows / kRows);
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float m = multiplier[r];
    const auto four = [&](int i) {
      return four_codes(encode_e5m6<kSpecial>(patch.bits(r, i), m), encode_e5m6<kSpecial>(patch.bits(r, i + 1), m),
                        encode_e5m6<kSpecial>(patch.bits(r, i + 2), m), encode_e5m6<kSpecial>(patch.bits(r, i + 3), m));
    };
    HOPPER_UNROLL
    for (int p = 0; p < Patch<T>::kPieces; ++p) {
      const int column = Patch<T>::column(p * Patch<T>::kPiece, at.lane);
      uint32_t* words = tile.at(group * kRows + r, column / 8 * 3);
      if constexpr (sizeof(T) == 2) {   // a piece is a group of 8
        uint32_t three[3];
        join(four(8 * p), four(8 * p + 4), three);
        HOPPER_UNROLL
        for (int w = 0; w < 3; ++w) words[w] = three[w];
      } else {                          // half a group: one word, and half of the middle one
        const FourCodes half = four(4 * p);
        auto* middle = reinterpret_cast<uint16_t*>(words + 1);
        if (at.lane % 2 == 0) {
          words[0] = half.high;
          middle[1] = static_cast<uint16_t>(half.low);
        } else {
          middle[0] = static_cast<uint16_t>(half.high >> 16);
          words[2] = half.high << 16 | half.low;
        }
      }
    }
  }
}

// `bytes` of each of the warp's `rows` rows; with kVector both sides are multiples of 16.
template <bool kVector>
HOPPER_DEVICE void store_packed(PackedRows& tile, uint8_t* corner, int64_t stride, int rows, int bytes) {
  constexpr int kPiece = kVector ? 16 : 4, kPieces = kPackedTile / kPiece;   // of a row
  using Piece = std::conditional_t<kVector, uint4, uint32_t>;
  HOPPER_UNROLL
  for (int i = 0; i < kWarpRows * kPieces / 32; ++i) {
    const int index = i * 32 + static_cast<int>(threadIdx.x % 32), row = index / kPieces, byte = index % kPieces * kPiece;
    if (row < rows && byte < bytes) {
      hopper::store_vector<Piece>(corner + row * stride + byte, hopper::load_vector<Piece>(tile.at(row, byte / 4)));
    }
  }
}

template <class T, bool kVector>
HOPPER_KERNEL_BLOCKS(kPackThreads, sizeof(T) == 2 && kVector ? 8 : 4) pack_e5m6_tiles_kernel(const PackParams p) {
  auto* tiles = reinterpret_cast<PackedRows*>(hopper::dynamic_smem());
  const int64_t row = int64_t{blockIdx.x / p.column_tiles} * kPackRows;
  const int64_t column = int64_t{blockIdx.x % p.column_tiles} * kTile;
  const Window window{row, column, static_cast<int>(p.rows - row < kPackRows ? p.rows - row : kPackRows),
                      static_cast<int>(p.columns - column < kTile ? p.columns - column : kTile)};
  const Place at;
  const int warp = static_cast<int>(threadIdx.x / 32);

  hopper::grid_dependency_wait();
  Patch<T> patch;
  patch.template load<kVector>(p.x, window, at);
  hopper::grid_dependency_launch();

  float* scale = p.scale + column / kTile * p.scale_stride;
  if (row == 0 && p.rows + threadIdx.x < p.scale_stride) scale[p.rows + threadIdx.x] = 1.0f;   // pads the layout
  const uint32_t own[kRows] = {patch.row_amax(0), patch.row_amax(1), patch.row_amax(2), patch.row_amax(3)};
  float multiplier[kRows];
  scale_rows<E5m6Range>(own, scale, window, {true, false}, at, multiplier);

  if (larger(larger(own[0], own[1]), larger(own[2], own[3])) >= kInfinity) put_packed<T, true>(patch, multiplier, tiles[warp], at);
  else put_packed<T, false>(patch, multiplier, tiles[warp], at);
  hopper::syncwarp();
  const int64_t first = row + warp * kWarpRows;
  store_packed<kVector>(tiles[warp], p.packed + first * p.stride + column / 8 * 12, p.stride,
                        window.rows - warp * kWarpRows, (window.columns + 7) / 8 * 12);
}

// ---- whole rows ----------------------------------------------------------------------------------------------------

constexpr int kRowPackThreads = 256;
constexpr int kRowPackWarps = kRowPackThreads / 32;
constexpr int kGroupsOfThread = 4;                                      // groups of 8 columns
constexpr int kSpan = kRowPackThreads * kGroupsOfThread * 8;            // columns that a block holds in registers: 8192

struct RowPackShared {
  alignas(16) uint32_t words[kRowPackWarps][kGroupsOfThread][32 * 3];   // a warp's neighbouring groups
  uint32_t maxima[kRowPackWarps];
};

// A thread's groups of a span: group k is number (span * 4 + k) * 256 + thread of the row.
template <class T>
struct RowPiece {
  static constexpr int kWords = 8 * sizeof(T) / 4;
  uint32_t words[kGroupsOfThread][kWords];

  HOPPER_DEVICE uint32_t bits(int k, int i) const {
    if constexpr (sizeof(T) == 4) return words[k][i];
    else return i % 2 ? words[k][i / 2] & 0xFFFF0000 : words[k][i / 2] << 16;
  }
  static HOPPER_DEVICE int64_t group(int64_t span, int k) {
    return (span * kGroupsOfThread + k) * kRowPackThreads + threadIdx.x;
  }

  template <bool kVector>
  HOPPER_DEVICE void load(const T* row, int64_t column_stride, int64_t columns, int64_t span) {
    HOPPER_UNROLL
    for (int k = 0; k < kGroupsOfThread; ++k) {
      const int64_t first = group(span, k) * 8;
      HOPPER_UNROLL
      for (uint32_t& word : words[k]) word = 0;
      if constexpr (kVector) {
        HOPPER_UNROLL
        for (int w = 0; w < kWords; w += 4) {
          if (first >= columns) continue;
          const uint4 piece = hopper::load_vector<uint4>(row + first + w * 4 / static_cast<int>(sizeof(T)));
          words[k][w] = piece.x, words[k][w + 1] = piece.y, words[k][w + 2] = piece.z, words[k][w + 3] = piece.w;
        }
      } else {
        HOPPER_UNROLL
        for (int i = 0; i < 8; ++i) {
          if (first + i >= columns) continue;
          const T& x = row[(first + i) * column_stride];
          if constexpr (sizeof(T) == 4) words[k][i] = hopper::float_bits(x);
          else words[k][i / 2] |= uint32_t{x.bits} << (16 * (i % 2));
        }
      }
    }
  }
};

template <class T, bool kVector>
HOPPER_DEVICE void pack_span(const RowPiece<T>& piece, int64_t span, float multiplier, RowPackShared& shared, uint8_t* row,
                             int64_t bytes) {
  const auto lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  HOPPER_UNROLL
  for (int k = 0; k < kGroupsOfThread; ++k) {
    uint32_t code[8], three[3];
    HOPPER_UNROLL
    for (int i = 0; i < 8; ++i) code[i] = encode_e5m6<true>(piece.bits(k, i), multiplier);
    join(four_codes(code[0], code[1], code[2], code[3]), four_codes(code[4], code[5], code[6], code[7]), three);
    HOPPER_UNROLL
    for (int w = 0; w < 3; ++w) shared.words[warp][k][3 * lane + w] = three[w];
  }
  hopper::syncwarp();
  constexpr int kPiece = kVector ? 16 : 4;
  using Piece = std::conditional_t<kVector, uint4, uint32_t>;
  HOPPER_UNROLL
  for (int k = 0; k < kGroupsOfThread; ++k) {
    const int64_t first = RowPiece<T>::group(span, k) * 12 - lane * 12;   // of the warp
    HOPPER_UNROLL
    for (int byte = lane * kPiece; byte < 32 * 12; byte += 32 * kPiece) {
      if (first + byte < bytes) {
        hopper::store_vector<Piece>(row + first + byte, hopper::load_vector<Piece>(shared.words[warp][k] + byte / 4));
      }
    }
  }
  hopper::syncwarp();   // the words may be overwritten by the next span
}

// Rows of up to 8192 columns are read once; longer ones are read again, from L2, except for their last span.
template <class T, bool kVector>
HOPPER_KERNEL_BLOCKS(kRowPackThreads, sizeof(T) == 2 && kVector ? 5 : 3) pack_e5m6_rows_kernel(const PackParams p) {
  auto& shared = *reinterpret_cast<RowPackShared*>(hopper::dynamic_smem());
  const int64_t row = blockIdx.x, spans = (p.columns + kSpan - 1) / kSpan;
  const T* line = static_cast<const T*>(p.x.data) + row * p.x.row_stride;

  hopper::grid_dependency_wait();
  RowPiece<T> piece;
  uint32_t own = 0;
  for (int64_t span = 0; span < spans; ++span) {
    piece.template load<kVector>(line, p.x.column_stride, p.columns, span);
    HOPPER_UNROLL
    for (int k = 0; k < kGroupsOfThread; ++k) {
      HOPPER_UNROLL
      for (int i = 0; i < 8; ++i) own = larger(own, magnitude(piece.bits(k, i)));
    }
  }
  hopper::grid_dependency_launch();
  const uint32_t warp_amax = hopper::warp_max(own);
  if (threadIdx.x % 32 == 0) shared.maxima[threadIdx.x / 32] = warp_amax;
  hopper::barrier_sync<0>(kRowPackThreads);
  uint32_t amax = 0;
  HOPPER_UNROLL
  for (uint32_t m : shared.maxima) amax = larger(amax, m);
  const TileScale scale = tile_scale<E5m6Range>(amax, {});
  if (threadIdx.x == 0) p.scale[row] = scale.scale;

  for (int64_t span = spans - 1; span >= 0; --span) {
    if (span != spans - 1) piece.template load<kVector>(line, p.x.column_stride, p.columns, span);
    pack_span<T, kVector>(piece, span, scale.multiplier, shared, p.packed + row * p.stride, p.stride);
  }
}

}  // namespace quantize_kernels
