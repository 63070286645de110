// One stack and one saved context for each CUDA thread. Switching costs tens of nanoseconds and no system call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

inline constexpr size_t kStackBytes = 128 << 10;
inline constexpr size_t kGuardBytes = 4096;
inline constexpr size_t kMaxFibers = 1 << 14;

struct Fiber {
  void* context = nullptr;   // saved stack pointer (or Boost's context) while not running
  uint8_t* stack = nullptr;  // lowest usable address; below it lies a guard page
};

// Stacks come from one reserved region, so that "is this a stack, and whose" is a subtraction.
uint8_t* stack_region();
inline size_t stack_region_bytes() { return kMaxFibers * (kStackBytes + kGuardBytes); }

void prepare_fiber(Fiber&, size_t index, void (*entry)());  // takes stack `index`; entry never returns
void switch_to_fiber(Fiber&);                               // from the scheduler; returns when the fiber gives back
void switch_to_scheduler(Fiber&);                           // from the running fiber

}  // namespace emulator
