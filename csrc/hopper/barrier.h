// Barriers of a block. PTX ISA: "barrier{.cta}". The id is a template constant: with an id known only at run
// time ptxas reserves all sixteen.
#pragma once

#include "address.h"

namespace hopper {

// All of `threads` (a multiple of 32) meet at barrier `id`. Give each group of warps an id of its own.
template <uint32_t id>
HOPPER_DEVICE void barrier_sync(uint32_t threads, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(id < 16, "a block has 16 barriers");
#ifdef HOPPER_EMULATED
  emulator::barrier_sync(id, threads, site);
#else
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"n"(id), "r"(threads) : "memory");
#endif
}

// Arrives without waiting: the others may count on what this thread did before.
template <uint32_t id>
HOPPER_DEVICE void barrier_arrive(uint32_t threads, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(id < 16, "a block has 16 barriers");
#ifdef HOPPER_EMULATED
  emulator::barrier_arrive(id, threads, site);
#else
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"n"(id), "r"(threads) : "memory");
#endif
}

// The whole block; barrier 0.
HOPPER_DEVICE void block_sync([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  const dim3 d = emulator::identity().block_dim;
  emulator::barrier_sync(0, d.x * d.y * d.z, site);
#else
  __syncthreads();
#endif
}

}  // namespace hopper
