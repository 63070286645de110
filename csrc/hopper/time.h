// Clocks, deadlines and the end with an error. PTX ISA: "%globaltimer", "trap".
#pragma once

#include "address.h"

namespace hopper {

// Nanoseconds; on the device its resolution may be a microsecond. In the emulator time passes with
// scheduling.
HOPPER_DEVICE uint64_t global_timer() {
#ifdef HOPPER_EMULATED
  return emulator::global_timer();
#else
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
#endif
}

// For spins on flags: `while (!arrived()) if (deadline.passed()) trap("what")`.
struct Deadline {
  uint64_t end;
  explicit HOPPER_DEVICE Deadline(uint64_t nanoseconds) : end(global_timer() + nanoseconds) {}
  HOPPER_DEVICE bool passed() const { return global_timer() > end; }
};

HOPPER_DEVICE void trap([[maybe_unused]] const char* message, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::trap(message, site);
#else
  __trap();
#endif
}

}  // namespace hopper
