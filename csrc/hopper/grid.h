// Programmatic dependent launch. PTX ISA: "griddepcontrol".
#pragma once

#include "address.h"

namespace hopper {

// Before the first access to what the previous kernel of the stream wrote, or to what it still reads.
HOPPER_DEVICE void grid_dependency_wait([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::grid_dependency_wait(site);
#else
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel of the stream may begin, as far as this block is concerned.
HOPPER_DEVICE void grid_dependency_launch([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::grid_dependency_launch(site);
#else
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace hopper
