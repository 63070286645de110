// Shared memory and its addresses. PTX ISA: "State spaces, .shared", "mapa".
#pragma once

#include "types.h"
#ifdef HOPPER_EMULATED
#include "../emulator/twins.h"
#endif

namespace hopper {

// The block's dynamic shared memory, aligned to 1024 bytes: the repeat of the widest swizzle pattern.
HOPPER_DEVICE uint8_t* dynamic_smem() {
#ifdef HOPPER_EMULATED
  return emulator::dynamic_smem();
#else
  extern __shared__ __align__(1024) uint8_t hopper_dynamic_smem[];
  return hopper_dynamic_smem;
#endif
}

// 32-bit address in the shared::cta window, as descriptors and copies take it.
HOPPER_DEVICE uint32_t shared_address(const void* p, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  return emulator::shared_address(p, site);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// False on the device. In a mutation run of the emulator, true where this step is to be left out.
HOPPER_DEVICE bool dropped([[maybe_unused]] const char* what, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  return emulator::dropped(what, site);
#else
  return false;
#endif
}

}  // namespace hopper
