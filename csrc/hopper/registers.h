// Register budgets of warpgroups. PTX ISA: "setmaxnreg". All warps of the warpgroup execute it; `up` waits
// until others have given enough back. ptxas ignores it (C7508) unless the kernel has __launch_bounds__:
// HOPPER_KERNEL gives them.
#pragma once

#include "address.h"

namespace hopper {

// To more registers a thread: inc.
template <uint32_t count>
HOPPER_DEVICE void set_max_registers_up([[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256");
#ifdef HOPPER_EMULATED
  emulator::set_max_registers(true, count, site);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

// To fewer: dec.
template <uint32_t count>
HOPPER_DEVICE void set_max_registers_down([[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256");
#ifdef HOPPER_EMULATED
  emulator::set_max_registers(false, count, site);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#endif
}

}  // namespace hopper
