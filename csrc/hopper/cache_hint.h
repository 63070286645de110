// What L2 should do with the lines of a bulk or tensor copy. PTX ISA: "createpolicy", "Cache eviction
// priority hints".
#pragma once

#include "types.h"

namespace hopper {

// normal adds nothing to the instruction. evict_first: read once; evict_last: wanted again by many blocks. A
// hint changes time only, so that the emulator ignores it.
enum class CacheHint : uint8_t { normal, evict_first, evict_last };

#ifndef HOPPER_EMULATED
namespace detail {

// Not volatile: the compiler may keep one policy for a whole loop.
template <CacheHint hint>
HOPPER_DEVICE uint64_t cache_policy() {
  uint64_t policy = 0;
  if constexpr (hint == CacheHint::evict_first)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  if constexpr (hint == CacheHint::evict_last)
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace detail
#endif

}  // namespace hopper
