// From the largest magnitude of a tile to its scale and multiplier: the rule of docs/numerics.md, bit for bit.
//
// A magnitude is the fp32 pattern without its sign. Patterns order as the values do, with Inf and NaN above every
// finite value, so that an integer maximum finds amax and tells at once whether the tile holds Inf or NaN.
#pragma once

#include "../hopper/front.h"

namespace quantize_kernels {

constexpr uint32_t kInfinity = 0x7F800000;         // this and above: Inf and NaN
constexpr uint32_t kOfficialFloor = 0x38D1B717;    // 1e-4f: the released inference code's, for zeros too

// A format's largest value, and the amax that a smaller one counts as, so that largest / amax stays finite.
struct E4m3Range {
  static constexpr float kLargest = 448.0f;
  static constexpr uint32_t kFloor = (127 - 118) << 23;   // 2^-118
};
struct E5m6Range {
  static constexpr float kLargest = 65024.0f;
  static constexpr uint32_t kFloor = (127 - 111) << 23;   // 2^-111
};

HOPPER_DEVICE uint32_t magnitude(uint32_t bits) { return bits & 0x7FFFFFFF; }
HOPPER_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

struct ScaleRule {
  bool pow2 = false;             // the smallest power of two that is not below amax / largest
  bool official_clamp = false;
};

struct TileScale {
  float scale;                   // dequantisation: x ~ q * scale
  float multiplier;              // q = round(x * multiplier)
};

template <class Range = E4m3Range>
HOPPER_DEVICE TileScale tile_scale(uint32_t amax, ScaleRule rule) {
  if (amax >= kInfinity || (amax == 0 && !rule.official_clamp)) return {1.0f, 1.0f};
  const float bounded = hopper::bits_float(larger(amax, rule.official_clamp ? kOfficialFloor : Range::kFloor));
  const float scale = hopper::div_rn(bounded, Range::kLargest);
  if (!rule.pow2) return {scale, hopper::div_rn(Range::kLargest, bounded)};
  // Rounded up on the bits. A subnormal scale has biased exponent 0 and becomes 2^-126, so that both stay normal.
  const uint32_t exponent = ((hopper::float_bits(scale) - 1) >> 23) + 1;
  return {hopper::bits_float(exponent << 23), hopper::bits_float((254 - exponent) << 23)};
}

}  // namespace quantize_kernels
