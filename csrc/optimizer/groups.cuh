// Four neighbouring elements of a dense array whose type is known only at run time: how kernels here read and write.
//
// Why four: an fp32 group is 16 bytes and a bf16 group 8, so that 32 lanes cover 512 or 256 contiguous bytes whatever
// mixture of types an element's arrays have. Eight would leave holes of 16 bytes between the lanes' fp32 pieces.
#pragma once

#include "../hopper/front.h"
#include "optimizer.h"

namespace optimizer_kernels {

using hopper::bf16;
using optimizer::Type;

constexpr int kGroup = 4;

// As it lies in memory: 4 words of fp32, or 2 of bf16. Turned into values late, so that loads stay in flight.
struct RawGroup {
  uint32_t words[kGroup];

  HOPPER_DEVICE float value(int i, bool wide) const {
    const uint32_t half = i % 2 ? words[i / 2] & 0xFFFF0000 : words[i / 2] << 16;
    return hopper::bits_float(wide ? words[i] : half);
  }
};

// `present` elements exist from `index` on; `vector`: all four do, and they are aligned to their size together.
HOPPER_DEVICE RawGroup load_group(const void* array, bool wide, int64_t index, int present, bool vector) {
  RawGroup raw{};
  if (wide) {
    const auto* at = static_cast<const float*>(array) + index;
    if (vector) {
      const uint4 w = hopper::load_stream(reinterpret_cast<const uint4*>(at));
      raw.words[0] = w.x, raw.words[1] = w.y, raw.words[2] = w.z, raw.words[3] = w.w;
    } else {
      HOPPER_UNROLL for (int i = 0; i < kGroup; ++i)
        if (i < present) raw.words[i] = hopper::float_bits(at[i]);
    }
  } else {
    const auto* at = static_cast<const bf16*>(array) + index;
    if (vector) {
      const uint2 w = hopper::load_stream(reinterpret_cast<const uint2*>(at));
      raw.words[0] = w.x, raw.words[1] = w.y;
    } else {
      HOPPER_UNROLL for (int i = 0; i < kGroup; ++i)
        if (i < present) raw.words[i / 2] |= uint32_t{at[i].bits} << (16 * (i % 2));
    }
  }
  return raw;
}

HOPPER_DEVICE void store_fp32(float* at, const float (&values)[kGroup], int present, bool vector) {
  if (vector) {
    hopper::store_stream(reinterpret_cast<float4*>(at), float4{values[0], values[1], values[2], values[3]});
  } else {
    HOPPER_UNROLL for (int i = 0; i < kGroup; ++i)
      if (i < present) at[i] = values[i];
  }
}

// Words of two bf16 each.
HOPPER_DEVICE void store_bf16(bf16* at, const uint32_t (&words)[kGroup / 2], int present, bool vector) {
  if (vector) {
    hopper::store_stream(reinterpret_cast<uint2*>(at), uint2{words[0], words[1]});
  } else {
    HOPPER_UNROLL for (int i = 0; i < kGroup; ++i)
      if (i < present) at[i].bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
  }
}

}  // namespace optimizer_kernels
