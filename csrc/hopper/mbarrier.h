// Barriers in shared memory that count arrivals and bytes. PTX ISA: "mbarrier".
// A waiter names the parity of the phase it waits for; a fresh barrier is in phase 0, so that parity 1 does not wait.
#pragma once

#include "address.h"

namespace hopper {

// One thread; others may use it after fence_mbarrier_init (for TMA and the cluster) and a barrier.
HOPPER_DEVICE void mbarrier_init(Mbarrier* b, uint32_t count, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_init(b, count, site);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
#endif
}

HOPPER_DEVICE void mbarrier_invalidate(Mbarrier* b, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_invalidate(b, site);
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
#endif
}

// Releases what this thread did before to those who wait for the phase.
HOPPER_DEVICE void mbarrier_arrive(Mbarrier* b, uint32_t count = 1, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_arrive(b, count, site);
#else
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
#endif
}

// Arrives at the barrier of the same address in another CTA of the cluster (or this one).
HOPPER_DEVICE void mbarrier_arrive_cluster(Mbarrier* b, uint32_t cta_rank, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_arrive(static_cast<Mbarrier*>(emulator::map_shared(b, cta_rank, site)), 1, site);
#else
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(b)),
      "r"(cta_rank)
      : "memory");
#endif
}

// Announces bytes that copies will complete in this phase, without arriving.
HOPPER_DEVICE void mbarrier_expect_tx(Mbarrier* b, uint32_t bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_expect_tx(b, bytes, site);
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
#endif
}

HOPPER_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* b, uint32_t bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_arrive_expect_tx(b, bytes, site);
#else
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
#endif
}

// Whether the phase of this parity is complete; acquires what its arrivals released.
HOPPER_DEVICE bool mbarrier_test_wait(Mbarrier* b, uint32_t parity, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  return emulator::mbarrier_test_wait(b, parity, site);
#else
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return done;
#endif
}

// Waits for it. On the device a wait that never ends becomes a trap after about 2^26 suspended tries (minutes), so that a
// broken pipeline is an error and not a hang.
HOPPER_DEVICE void mbarrier_wait(Mbarrier* b, uint32_t parity, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_wait(b, parity, site);
#else
  uint32_t tries = 0;
  while (!mbarrier_test_wait(b, parity)) {
    if (++tries == (1u << 26)) __trap();
  }
#endif
}

}  // namespace hopper
