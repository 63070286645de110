// E5M6: sign, 5 exponent bits (bias 15), 6 mantissa bits, the top 12 bits of an IEEE half; 8 values in 3 words, the
// first in the most significant bits, words little-endian. To and from fp32, and the patch of a packed matrix.
//
//   word 0   v0 v0 v0 v1 v1 v1 v2 v2     (hexadecimal digits)
//   word 1   v2 v3 v3 v3 v4 v4 v4 v5
//   word 2   v5 v5 v6 v6 v6 v7 v7 v7
#pragma once

#include "patch.cuh"

namespace quantize_kernels {

struct e5m6 { uint8_t bits; };   // names the format; strides of a packed matrix count bytes

constexpr int kPackedTile = kTile / 8 * 12;   // bytes of 128 columns

// The code of value * multiplier: nearest even from the fp32 product, saturating at 65024.
HOPPER_DEVICE uint32_t encode_e5m6(uint32_t bits, float multiplier) {
  using namespace hopper;
  const float y = fminf(fabsf(mul_rn(bits_float(bits), multiplier)), E5m6Range::kLargest);   // Inf and NaN too
  // In the binade of 2^(E + 17) the last place is 2^(E - 6), that of an E5M6 value in [2^E, 2^(E + 1)), and of a subnormal
  // with E = -14: the addition rounds. What it adds to the anchor's pattern is 64 .. 128 units, or 0 .. 64 if subnormal, and
  // a code is 64 (E + 14) more than that, a carry into the next exponent included.
  const uint32_t anchor = larger(float_bits(y) & 0x7F800000, (127 - 14) << 23) + (17 << 23);
  const uint32_t units = float_bits(add_rn(y, bits_float(anchor))) - anchor;
  return (units + (anchor >> 17) - 64 * (127 - 14 + 17)) | (bits >> 20 & 0x800);
}

// The same in a tile with Inf or NaN, which become 0x7FF with their sign.
template <bool kSpecial>
HOPPER_DEVICE uint32_t encode_e5m6(uint32_t bits, float multiplier) {
  if (kSpecial && magnitude(bits) >= kInfinity) return 0x7FF | (bits >> 20 & 0x800);
  return encode_e5m6(bits, multiplier);
}

// fp32 pattern of a code times a scale, rounded once. NaN, and infinities that we never write, pass by the multiplication,
// which need not keep a NaN's sign.
HOPPER_DEVICE uint32_t decode_e5m6(uint32_t code, float scale) {
  const uint32_t rest = (code & 0x7FF) << 17, bits = rest | (code & 0x800) << 20;
  const uint32_t value = hopper::float_bits(hopper::mul_rn(hopper::mul_rn(hopper::bits_float(bits), 0x1p112f), scale));
  return rest >= 31 << 23 ? bits | 0x7F800000 : value;
}

// Four codes of 8: the first four are word 0 and the high half of word 1, the others the low half and word 2.
struct FourCodes { uint32_t high, low; };   // 32 bits and 16 bits, from the first value down

HOPPER_DEVICE FourCodes four_codes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return {a << 20 | b << 8 | c >> 4, (c << 12 | d) & 0xFFFF};
}
HOPPER_DEVICE uint32_t code_of(const FourCodes& four, int i) {
  if (i == 0) return four.high >> 20;
  if (i == 1) return four.high >> 8 & 0xFFF;
  if (i == 2) return (four.high << 4 & 0xFF0) | four.low >> 12;
  return four.low & 0xFFF;
}

HOPPER_DEVICE void join(const FourCodes& left, const FourCodes& right, uint32_t (&words)[3]) {
  words[0] = left.high;
  words[1] = left.low << 16 | right.high >> 16;
  words[2] = right.high << 16 | right.low;
}
HOPPER_DEVICE FourCodes left_four(uint32_t word0, uint32_t word1) { return {word0, word1 >> 16}; }
HOPPER_DEVICE FourCodes right_four(uint32_t word1, uint32_t word2) { return {word1 << 16 | word2 >> 16, word2 & 0xFFFF}; }

// The patch of a packed matrix: 4 rows by 16 columns, as CodedPatch; a lane's 16 columns are 24 bytes, two groups of 8.
struct PackedPatch {
  uint32_t words[kRows][6];

  // kVector: rows start at multiples of 8 bytes and a multiple of 16 columns exists. Through L1, where the lines stay
  // that a lane's next pieces are in.
  template <bool kVector>
  HOPPER_DEVICE void load(const Source& source, const Window& window, Place at) {
    const auto* line = static_cast<const uint8_t*>(source.data) + (window.row + at.group * kRows) * source.row_stride +
                       window.column / 8 * 12 + at.lane * 24;
    const int rows = window.rows - at.group * kRows, columns = window.columns - at.lane * kColumns;
    HOPPER_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HOPPER_UNROLL
      for (int w = 0; w < 6; w += kVector ? 2 : 1) {
        if constexpr (kVector) {
          const uint2 pair = r < rows && columns > 0 ? hopper::load_vector<uint2>(line + 4 * w) : uint2{0, 0};
          words[r][w] = pair.x, words[r][w + 1] = pair.y;
        } else {
          words[r][w] = r < rows && columns > w / 3 * 8 ? hopper::load_vector<uint32_t>(line + 4 * w) : 0;
        }
      }
      line += source.row_stride;
    }
  }
};

HOPPER_DEVICE void decode(const PackedPatch& packed, const float* row_scale, const Window& window, Place at,
                          DecodedPatch& decoded) {
  const int columns = window.columns - at.lane * kColumns;
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const int row = at.group * kRows + r;
    const float scale = row < window.rows ? row_scale[window.row + row] : 1.0f;
    HOPPER_UNROLL
    for (int i = 0; i < kColumns; i += 4) {
      const uint32_t* w = packed.words[r] + i / 8 * 3;
      const FourCodes four = i % 8 == 0 ? left_four(w[0], w[1]) : right_four(w[1], w[2]);
      HOPPER_UNROLL
      for (int k = 0; k < 4; ++k) {
        // What pads a row's last group of 8 counts as zero, whatever it holds.
        decoded.words[r][i + k] = i + k < columns ? decode_e5m6(code_of(four, k), scale) : 0;
      }
    }
  }
}

}  // namespace quantize_kernels
