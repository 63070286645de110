// The 64-bit matrix descriptor of wgmma. PTX ISA: "Matrix descriptor format" (wgmma).
//
//   bits 0-13 start address / 16    16-29 leading byte offset / 16    32-45 stride byte offset / 16
//   bits 49-51 base offset          62-63 swizzle: 0 none, 1 128 B, 2 64 B, 3 32 B
//
// K-major operands with a swizzle: rows are `span` bytes apart, groups of 8 rows 8 * span (the stride
// offset); the leading offset is not used (1 by convention). The pattern repeats every 8 * span bytes, so
// tiles start at multiples of that.
#pragma once

#include "address.h"

namespace hopper {

HOPPER_BOTH constexpr uint32_t span_bytes(Swizzle s) {
  return s == Swizzle::b128 ? 128 : s == Swizzle::b64 ? 64 : s == Swizzle::b32 ? 32 : 16;
}

HOPPER_BOTH constexpr uint64_t swizzle_code(Swizzle s) {
  return s == Swizzle::b128 ? 1 : s == Swizzle::b64 ? 2 : s == Swizzle::b32 ? 3 : 0;
}

// Any layout: offsets in bytes, multiples of 16.
HOPPER_DEVICE uint64_t matrix_descriptor(const void* start, Swizzle swizzle, uint32_t leading_bytes, uint32_t stride_bytes,
                                         Site site = HOPPER_HERE) {
  return static_cast<uint64_t>((shared_address(start, site) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3FFFF) >> 4) << 32 | swizzle_code(swizzle) << 62;
}

// K-major with rows of one swizzle span, as TMA writes a box whose inner extent is the span.
template <Swizzle swizzle>
HOPPER_DEVICE uint64_t matrix_descriptor(const void* start, Site site = HOPPER_HERE) {
  static_assert(swizzle != Swizzle::none, "without a swizzle the 8x16-byte cores need both offsets: use the other overload");
  return matrix_descriptor(start, swizzle, 16, 8 * span_bytes(swizzle), site);
}

// The same rows, `bytes` further along K (a multiple of 16, inside the span): the swizzle acts on address
// bits, so that moving the start address is enough.
HOPPER_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace hopper
