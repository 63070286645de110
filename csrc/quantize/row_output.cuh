// 1 x 128: the maxima of a patch's rows, their scales, and the codes stored row by row. Within a warp, no barrier.
#pragma once

#include "patch.cuh"

namespace quantize_kernels {

struct RowOutput {
  uint8_t* q;                    // [rows, columns]
  int64_t stride;                // columns
  float* scale;                  // [ceil(columns / 128), scale_stride], rows contiguous
  int64_t scale_stride;          // rows padded to 4
};

// Lane j of a group of 8 ends with the maximum of row j % 4 over all 8: each exchange halves the rows a lane cares for.
HOPPER_DEVICE uint32_t reduce_rows(const uint32_t (&own)[kRows], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const uint32_t low_pair = larger(odd ? own[1] : own[0], hopper::shuffle_xor(odd ? own[0] : own[1], 1));
  const uint32_t high_pair = larger(odd ? own[3] : own[2], hopper::shuffle_xor(odd ? own[2] : own[3], 1));
  const uint32_t row = larger(high ? high_pair : low_pair, hopper::shuffle_xor(high ? low_pair : high_pair, 2));
  return larger(row, hopper::shuffle_xor(row, 4));
}

// The codes of a patch in its own order: word w of a row holds the thread's columns 4 w .. 4 w + 3.
using Codes = uint32_t[kRows][kColumns / 4];

template <bool kSpecial, class P>
HOPPER_DEVICE void encode_rows(const P& patch, const float (&multiplier)[kRows], Codes& codes) {
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float m = multiplier[r];
    HOPPER_UNROLL
    for (int i = 0; i < kColumns; i += 4) {
      codes[r][i / 4] = encode4<kSpecial>(
          {patch.bits(r, i), patch.bits(r, i + 1), patch.bits(r, i + 2), patch.bits(r, i + 3)}, {m, m, m, m});
    }
  }
}

// `own`: the maxima of the thread's rows.
template <class P>
HOPPER_DEVICE void encode_rows(const P& patch, const uint32_t (&own)[kRows], const float (&multiplier)[kRows],
                               Codes& codes) {
  if (larger(larger(own[0], own[1]), larger(own[2], own[3])) >= kInfinity) {
    encode_rows<true>(patch, multiplier, codes);
  } else {
    encode_rows<false>(patch, multiplier, codes);
  }
}

// Exchanges words between neighbour lanes until each holds 16 contiguous columns; returns the first of them.
//   bf16   even lanes take both halves of piece j, j + 1 on the left, odd lanes those on the right
//   fp32   4 lanes transpose their 4 x 4 words
template <class T>
HOPPER_DEVICE int gather_columns(uint32_t (&w)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  if constexpr (sizeof(T) == 2) {
    const uint32_t first = hopper::shuffle_xor(odd ? w[0] : w[2], 1);
    const uint32_t second = hopper::shuffle_xor(odd ? w[1] : w[3], 1);
    if (odd) {
      w[0] = first, w[1] = second;
      return 64 + 8 * (lane - 1);
    }
    w[2] = first, w[3] = second;
    return 8 * lane;
  } else {
    HOPPER_UNROLL
    for (int p = 0; p < 4; p += 2) {
      const uint32_t other = hopper::shuffle_xor(odd ? w[p] : w[p + 1], 1);
      (odd ? w[p] : w[p + 1]) = other;
    }
    HOPPER_UNROLL
    for (int p = 0; p < 2; ++p) {
      const uint32_t other = hopper::shuffle_xor(high ? w[p] : w[p + 2], 2);
      (high ? w[p] : w[p + 2]) = other;
    }
    return 32 * (lane & 3) + 16 * (lane >> 2);
  }
}

// Stores the codes of a patch of T. `corner`: the tile's place in q.
template <class T, bool kVector>
HOPPER_DEVICE void store_rows(const Codes& codes, uint8_t* corner, int64_t stride, const Window& window, Place at) {
  uint8_t* line = corner + at.group * kRows * stride;
  const int rows = window.rows - at.group * kRows;
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kVector) {
      uint32_t w[4] = {codes[r][0], codes[r][1], codes[r][2], codes[r][3]};
      const int first = gather_columns<T>(w, at.lane);
      if (r < rows && first < window.columns) {
        *reinterpret_cast<uint4*>(line + first) = uint4{w[0], w[1], w[2], w[3]};
      }
    } else {
      HOPPER_UNROLL
      for (int i = 0; i < kColumns; ++i) {
        const int column = Patch<T>::column(i, at.lane);
        if (r < rows && column < window.columns) line[column] = static_cast<uint8_t>(codes[r][i / 4] >> (8 * (i % 4)));
      }
    }
    line += stride;
  }
}

// From the maxima of a thread's own rows to the multipliers of all 4; stores the scales, which lie under these columns.
template <class Range = E4m3Range>
HOPPER_DEVICE void scale_rows(const uint32_t (&own)[kRows], float* scale, const Window& window, ScaleRule rule, Place at,
                              float (&multiplier)[kRows]) {
  // Lane j computes the scale of row j % 4 alone (two divisions instead of eight) and lanes 0..3 store them: 16 bytes.
  const TileScale mine = tile_scale<Range>(reduce_rows(own, at.lane), rule);
  const int row = at.group * kRows + at.lane;
  if (at.lane < kRows && row < window.rows) scale[window.row + row] = mine.scale;
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    multiplier[r] = hopper::bits_float(hopper::shuffle(hopper::float_bits(mine.multiplier), (threadIdx.x & 24) + r));
  }
}

// All of 1 x 128 for one patch.
template <class T, bool kVector>
HOPPER_DEVICE void quantize_patch_rows(const Patch<T>& patch, const RowOutput& out, const Window& window,
                                       ScaleRule rule, Place at) {
  const uint32_t own[kRows] = {patch.row_amax(0), patch.row_amax(1), patch.row_amax(2), patch.row_amax(3)};
  float multiplier[kRows];
  scale_rows(own, out.scale + window.column / kTile * out.scale_stride, window, rule, at, multiplier);
  Codes codes;
  encode_rows(patch, own, multiplier, codes);
  store_rows<T, kVector>(codes, out.q + window.row * out.stride + window.column, out.stride, window, at);
}

// The scales of rows that only pad the layout to a multiple of 4. One tile of each 128 columns does it.
HOPPER_DEVICE void pad_row_scales(const RowOutput& out, int64_t rows, int64_t column) {
  const int64_t row = rows + threadIdx.x;
  if (row < out.scale_stride) out.scale[column / kTile * out.scale_stride + row] = 1.0f;
}

}  // namespace quantize_kernels
