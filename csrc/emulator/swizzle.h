// The XOR patterns of shared memory. PTX ISA: "Tensor swizzling modes": within each 8 rows of the span, 16-byte chunk number
// c of row r moves to c ^ r. The pattern is a function of the absolute shared address, so that TMA and wgmma agree.
#pragma once

#include "../hopper/types.h"

namespace emulator {

constexpr uint32_t swizzled(uint32_t shared_address, hopper::Swizzle mode) {
  switch (mode) {
    case hopper::Swizzle::b128: return shared_address ^ ((shared_address >> 7 & 7) << 4);
    case hopper::Swizzle::b64: return shared_address ^ ((shared_address >> 7 & 3) << 4);
    case hopper::Swizzle::b32: return shared_address ^ ((shared_address >> 7 & 1) << 4);
    default: return shared_address;
  }
}

}  // namespace emulator
