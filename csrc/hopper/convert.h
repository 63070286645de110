// Conversions between fp32 and the low-precision formats: round to nearest even; e4m3 saturates at 448 and
// keeps NaN. PTX ISA: "cvt". The host bodies are exact, special values included; only the
// sign and payload of a decoded NaN may differ from the device's.
#pragma once

#include "math.h"

namespace hopper {

HOPPER_DEVICE float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

#ifdef HOPPER_EMULATED

inline bf16 to_bf16(float x) {
  const uint32_t b = float_bits(x);
  if ((b & 0x7fffffff) > 0x7f800000) return {0x7fff};  // what cvt.rn.bf16.f32 makes of any NaN
  return {static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}

inline e4m3 to_e4m3(float x) {
  const uint32_t b = float_bits(x);
  const auto sign = static_cast<uint8_t>(b >> 24 & 0x80);
  const uint32_t magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7f};           // cvt's canonical NaN
  if (magnitude >= 0x43e00000) return {static_cast<uint8_t>(sign | 0x7e)};  // 448 and beyond, infinity too
  if (magnitude < 0x3c800000) {                        // below 2^-6: multiples of 2^-9
    const float units = bits_float(magnitude) * 512.0f;  // exact; at most 8
    return {static_cast<uint8_t>(sign | static_cast<uint8_t>(std::nearbyintf(units)))};
  }
  // Keep three bits of the fraction; a carry moves on into the exponent, and into 448 at most.
  const uint32_t rounded = magnitude + 0x7ffff + (magnitude >> 20 & 1);
  return {static_cast<uint8_t>(sign | ((rounded >> 20) - ((127 - 7) << 3)))};
}

inline float to_float(e4m3 x) {
  const uint32_t code = x.bits & 0x7f;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  if (code == 0x7f) return bits_float(sign | 0x7fc00000);
  if (code < 8) return bits_float(sign | float_bits(static_cast<float>(code) * 0x1p-9f));
  return bits_float(sign | ((code + ((127 - 7) << 3)) << 20));
}

// Several values, the first in the lowest bits.
inline uint16_t to_e4m3x2(float low, float high) {
  return static_cast<uint16_t>(to_e4m3(low).bits | to_e4m3(high).bits << 8);
}
inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}

#else

HOPPER_DEVICE uint16_t to_e4m3x2(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
HOPPER_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
HOPPER_DEVICE bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
HOPPER_DEVICE e4m3 to_e4m3(float x) { return {static_cast<uint8_t>(to_e4m3x2(x, 0.0f))}; }
#endif

HOPPER_DEVICE uint32_t to_e4m3x4(float x0, float x1, float x2, float x3) {
  return to_e4m3x2(x0, x1) | static_cast<uint32_t>(to_e4m3x2(x2, x3)) << 16;
}

// And back: pairs and quadruples as they lie in memory.
HOPPER_DEVICE float2 bf16x2_to_float2(uint32_t pair) {
  return {bits_float(pair << 16), bits_float(pair & 0xffff0000)};
}
HOPPER_DEVICE float2 e4m3x2_to_float2(uint16_t pair) {
#ifdef HOPPER_EMULATED
  return {to_float(e4m3{static_cast<uint8_t>(pair)}), to_float(e4m3{static_cast<uint8_t>(pair >> 8)})};
#else
  uint32_t halves;   // every e4m3 value is a half
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  float2 y;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(y.x), "=f"(y.y)
      : "r"(halves));
  return y;
#endif
}
#ifndef HOPPER_EMULATED
HOPPER_DEVICE float to_float(e4m3 x) { return e4m3x2_to_float2(x.bits).x; }
#endif
HOPPER_DEVICE float4 e4m3x4_to_float4(uint32_t four) {
  const float2 low = e4m3x2_to_float2(static_cast<uint16_t>(four));
  const float2 high = e4m3x2_to_float2(static_cast<uint16_t>(four >> 16));
  return {low.x, low.y, high.x, high.y};
}

}  // namespace hopper
