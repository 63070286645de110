// The patch of a 128 x 128 tile that one thread holds in registers: 4 consecutive rows by 16 columns.
//
//   rows     32 groups of 4: group r = warp * 4 + lane / 8. 4 rows of one column are one 32-bit word of e4m3.
//   columns  lane j = lane % 8 of its group holds 16-byte pieces j, j + 8, ... of each row:
//
//     bf16   | j=0 | j=1 | ... | j=7 || j=0 | ... | j=7 |      2 pieces of 8 columns
//     fp32   | 0 | 1 | .. | 7 || 0 | .. | 7 || 0 | .. | 7 || 0 | .. | 7 |      4 pieces of 4 columns
//     e4m3   |    j=0    |    j=1    | ... |    j=7    |      1 piece of 16 columns
//
// So 8 lanes read 128 consecutive bytes with each load, and a thread has 4 * sizeof(T) loads of 16 bytes in flight.
#pragma once

#include "scales.cuh"

namespace quantize_kernels {

using hopper::bf16;
using hopper::e4m3;

constexpr int kTile = 128;
constexpr int kRows = 4;         // of a patch
constexpr int kColumns = 16;

// Kernels bound their registers by HOPPER_KERNEL_BLOCKS: the compiler would otherwise keep all 64 elements of a bf16 patch
// as fp32 between the maxima and the codes, and an SM would have half the loads in flight.
// Loads in flight on an SM: bf16 3 blocks of 32 KB, fp32 2 of 64 KB. The fallback is bound by its single loads.
template <class T, bool kVector>
inline constexpr int whole_tiles_per_sm = sizeof(T) == 2 && kVector ? 3 : 2;

// Where a thread stands in its tile.
struct Place {
  int group;                     // its rows are 4 * group ..
  int lane;                      // j, 0..7
  HOPPER_DEVICE Place() : group(static_cast<int>(threadIdx.x / 8)), lane(static_cast<int>(threadIdx.x % 8)) {}
};

// A matrix in global memory, and the part of it that a tile covers.
struct Source {
  const void* data;
  int64_t row_stride, column_stride;   // elements
};
struct Window {
  int64_t row, column;           // of the tile's corner
  int rows, columns;             // that exist, at most 128; the rest of the tile counts as zero
};

// T: the elements in registers; Piece: columns of a 16-byte load, which is another number for decoded e4m3.
template <class T, int Piece = 16 / sizeof(T)>
struct Patch {
  static constexpr int kPiece = Piece;
  static constexpr int kPieces = kColumns / kPiece;

  uint32_t words[kRows][kColumns * sizeof(T) / 4];

  // Column within the tile of the thread's i-th column, i < 16.
  static HOPPER_DEVICE int column(int i, int lane) { return (i / kPiece * 8 + lane) * kPiece + i % kPiece; }

  HOPPER_DEVICE void clear() {
    HOPPER_UNROLL
    for (auto& row : words) {
      HOPPER_UNROLL
      for (uint32_t& word : row) word = 0;
    }
  }

  // fp32 pattern of one element.
  HOPPER_DEVICE uint32_t bits(int r, int i) const {
    static_assert(sizeof(T) > 1, "e4m3 has to be decoded first");
    if constexpr (sizeof(T) == 4) {
      return words[r][i];
    } else {
      return i % 2 ? words[r][i / 2] & 0xFFFF0000 : words[r][i / 2] << 16;
    }
  }

  HOPPER_DEVICE float value(int r, int i) const { return hopper::bits_float(bits(r, i)); }

  // Two neighbours, i even, rounded to T.
  HOPPER_DEVICE void set(int r, int i, float first, float second) {
    if constexpr (sizeof(T) == 4) {
      words[r][i] = hopper::float_bits(first);
      words[r][i + 1] = hopper::float_bits(second);
    } else {
      words[r][i / 2] = hopper::pack_bf16(first, second);
    }
  }

  // Largest magnitude in a row, or in a column, of the patch.
  HOPPER_DEVICE uint32_t row_amax(int r) const {
    uint32_t even = 0, odd = 0;
    HOPPER_UNROLL
    for (int i = 0; i < kColumns; i += 2) {
      even = larger(even, ordered(r, i));
      odd = larger(odd, ordered(r, i + 1));
    }
    return larger(magnitude_of(0, even), magnitude_of(1, odd));
  }
  HOPPER_DEVICE uint32_t column_amax(int i) const {
    return magnitude_of(i, larger(larger(ordered(0, i), ordered(1, i)), larger(ordered(2, i), ordered(3, i))));
  }

  // kVector: rows start at multiples of 16 bytes, columns are contiguous and a multiple of 16 of them exists.
  template <bool kVector>
  HOPPER_DEVICE void load(const Source& source, const Window& window, Place at) {
    const T* line = static_cast<const T*>(source.data) + (window.row + at.group * kRows) * source.row_stride +
                    (window.column + at.lane * kPiece) * source.column_stride;
    const int rows = window.rows - at.group * kRows, columns = window.columns - at.lane * kPiece;
    HOPPER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HOPPER_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        constexpr int kStep = 8 * kPiece;      // columns between a lane's pieces
        uint4 piece{0, 0, 0, 0};
        if constexpr (kVector) {
          if (r < rows && p * kStep < columns) {
            piece = hopper::load_stream(reinterpret_cast<const uint4*>(line + p * kStep));
          }
        } else if (r < rows) {
          piece = gather(line + p * kStep * source.column_stride, source.column_stride, columns - p * kStep);
        }
        words[r][4 * p] = piece.x;
        words[r][4 * p + 1] = piece.y;
        words[r][4 * p + 2] = piece.z;
        words[r][4 * p + 3] = piece.w;
      }
      line += source.row_stride;
    }
  }

  // To a matrix whose columns are contiguous. kVector: its rows start at multiples of 16 bytes too.
  template <bool kVector>
  HOPPER_DEVICE void store(void* matrix, int64_t row_stride, const Window& window, Place at) const {
    static_assert(kPiece * sizeof(T) == 16, "a piece in registers is a piece in memory");
    T* line = static_cast<T*>(matrix) + (window.row + at.group * kRows) * row_stride + window.column + at.lane * kPiece;
    const int rows = window.rows - at.group * kRows, columns = window.columns - at.lane * kPiece;
    HOPPER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HOPPER_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        constexpr int kStep = 8 * kPiece;
        const uint32_t* w = &words[r][4 * p];
        if constexpr (kVector) {
          if (r < rows && p * kStep < columns) {
            *reinterpret_cast<uint4*>(line + p * kStep) = uint4{w[0], w[1], w[2], w[3]};
          }
        } else {
          HOPPER_UNROLL
          for (int i = 0; i < kPiece; ++i) {
            if (r < rows && p * kStep + i < columns) put_element(line + p * kStep + i, w, i);
          }
        }
      }
      line += row_stride;
    }
  }

 private:
  // Orders like the magnitude of an element, in one instruction: the odd ones of bf16 keep their neighbour in the low
  // bits, the even ones lie one bit too high. The maximum is brought into form afterwards.
  HOPPER_DEVICE uint32_t ordered(int r, int i) const {
    if constexpr (sizeof(T) == 4) return magnitude(words[r][i]);
    return i % 2 ? magnitude(words[r][i / 2]) : words[r][i / 2] << 17;
  }
  static HOPPER_DEVICE uint32_t magnitude_of(int i, uint32_t ordered) {
    if constexpr (sizeof(T) == 4) return ordered;
    return i % 2 ? ordered & 0x7FFF0000 : ordered >> 1;
  }

  // 16 bytes from single elements, of which `count` exist.
  static HOPPER_DEVICE uint4 gather(const T* first, int64_t stride, int count) {
    uint32_t w[4] = {0, 0, 0, 0};
    HOPPER_UNROLL
    for (int i = 0; i < kPiece; ++i) {
      if (i < count) w[i * sizeof(T) / 4] |= element(first + i * stride) << (8 * (i * sizeof(T) % 4));
    }
    return {w[0], w[1], w[2], w[3]};
  }
  static HOPPER_DEVICE void put_element(T* p, const uint32_t* words, int i) {
    if constexpr (sizeof(T) == 4) {
      *p = hopper::bits_float(words[i]);
    } else {
      p->bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
  static HOPPER_DEVICE uint32_t element(const T* p) {
    if constexpr (sizeof(T) == 4) {
      return hopper::float_bits(*p);
    } else {
      return p->bits;
    }
  }
};

using CodedPatch = Patch<e4m3>;
using DecodedPatch = Patch<float, CodedPatch::kPiece>;

// fp32 pattern of an e4m3 code times a scale, rounded once.
HOPPER_DEVICE uint32_t decode(uint32_t code, float scale) {
  // Its exponent and mantissa in the lowest exponent bits of a float are the value times 2^-120, subnormals included.
  // NaN keeps its sign, which a multiplication need not do.
  const uint32_t sign = code >> 7 << 31;
  if ((code & 0x7F) == 0x7F) return sign | 0x7FC00000;
  const float value = hopper::mul_rn(hopper::bits_float(sign | (code & 0x7F) << 20), 0x1p120f);
  return hopper::float_bits(hopper::mul_rn(value, scale));
}

// `row_scale`: of the window's rows, which lie under these 128 columns.
HOPPER_DEVICE void decode(const CodedPatch& coded, const float* row_scale, const Window& window, Place at,
                          DecodedPatch& decoded) {
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = at.group * kRows + r;
    const float scale = row < window.rows ? row_scale[window.row + row] : 1.0f;
    HOPPER_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      decoded.words[r][i] = decode(coded.words[r][i / 4] >> (8 * (i % 4)) & 0xFF, scale);
    }
  }
}

// Four values as e4m3, the first in the lowest byte. kSpecial: some may be Inf or NaN, which become NaN with their
// sign; the conversion instruction would saturate the one and drop the other's sign.
template <bool kSpecial>
HOPPER_DEVICE uint32_t encode4(const uint32_t (&bits)[4], const float (&multiplier)[4]) {
  float v[4];
  HOPPER_UNROLL
  for (int i = 0; i < 4; ++i) v[i] = hopper::mul_rn(hopper::bits_float(bits[i]), multiplier[i]);
  uint32_t word = static_cast<uint32_t>(hopper::to_e4m3x2(v[0], v[1])) |
                  static_cast<uint32_t>(hopper::to_e4m3x2(v[2], v[3])) << 16;
  if constexpr (kSpecial) {
    HOPPER_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (magnitude(bits[i]) >= kInfinity) {
        word = (word & ~(0xFFu << (8 * i))) | (0x7F | bits[i] >> 31 << 7) << (8 * i);
      }
    }
  }
  return word;
}

}  // namespace quantize_kernels
