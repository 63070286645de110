// Who does what in a warp-specialised kernel: math warpgroups first, then one producer warpgroup.
//
//   warpgroup 0 .. MathGroups-1    multiply and store, many registers
//   warpgroup MathGroups           one elected lane of its first warp issues every load; few registers
//
// A CTA starts with the same number of registers for every thread; setmaxnreg then moves them from the producer to
// the math groups (PTX ISA "setmaxnreg": multiples of 8, 24..256; the register file holds 64 Ki).
#pragma once

#include "../hopper/front.h"

template <int MathGroups, int ProducerRegisters, int MathRegisters>
struct Roles {
  static constexpr int kMathGroups = MathGroups;
  static constexpr int kThreads = 128 * (MathGroups + 1);
  static constexpr int kMathWarps = 4 * MathGroups;
  static_assert(ProducerRegisters % 8 == 0 && MathRegisters % 8 == 0 && ProducerRegisters >= 24 &&
                    MathRegisters <= 240, "setmaxnreg takes multiples of 8 from 24 to 256, ptxas no more than 240 here");
  static_assert(128 * (ProducerRegisters + MathGroups * MathRegisters) <= 65536 / kThreads / 8 * 8 * kThreads,
                "the groups may share no more registers than the launch gave to the CTA");

  // Equal in all lanes, and known to be: the compiler then branches on it without divergence.
  static HOPPER_DEVICE uint32_t warp() { return hopper::shuffle(threadIdx.x / 32, 0); }

  static HOPPER_DEVICE void become_producer(hopper::Site site = HOPPER_HERE) {
    hopper::set_max_registers_down<ProducerRegisters>(site);
  }
  static HOPPER_DEVICE void become_math(hopper::Site site = HOPPER_HERE) {
    hopper::set_max_registers_up<MathRegisters>(site);
  }
};

// Barrier of one math group of 128 threads. Ids are compile-time constants, for a computed one makes ptxas reserve
// all 16; id 0 is the whole block's.
HOPPER_DEVICE void math_group_sync(uint32_t group, hopper::Site site = HOPPER_HERE) {
  if (group == 0) {
    hopper::barrier_sync<1>(128, site);
  } else {
    hopper::barrier_sync<2>(128, site);
  }
}
