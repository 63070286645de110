// Barriers in shared memory that count arrivals and bytes. PTX ISA: "mbarrier.init", "mbarrier.inval",
// "mbarrier.arrive", "mbarrier.expect_tx", "mbarrier.test_wait, mbarrier.try_wait". A waiter names the parity
// of the phase it waits for; a fresh barrier is in phase 0, so that parity 1 does not wait. Parity tells
// neighbours apart only: nobody may fall two phases behind.
#pragma once

#include "address.h"

namespace hopper {

// One thread; count is 1 to 2^20 - 1. Others may use it after fence_mbarrier_init (for TMA and the cluster)
// and a barrier.
HOPPER_DEVICE void mbarrier_init(Mbarrier* b, uint32_t count, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_init(b, count, site);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
#endif
}

// Before its memory is used for anything else.
HOPPER_DEVICE void mbarrier_invalidate(Mbarrier* b, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_invalidate(b, site);
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
#endif
}

// Releases what this thread did before to those who wait for the phase (cta scope). For the other lanes of
// its warp: syncwarp first.
HOPPER_DEVICE void mbarrier_arrive(Mbarrier* b, uint32_t count = 1, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_arrive(b, count, site);
#else
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
#endif
}

// Arrives at the barrier of the same address in another CTA of the cluster (or this one). The peer must have
// initialised it (cluster barrier) and must still be alive. Scope::cluster hands ordinary writes of this CTA to the peer and
// costs a GPU-wide memory barrier (MEMBAR.ALL.GPU) before the arrival. Scope::cta only says "I have finished reading": enough
// for a stage that the peer's TMA overwrites next, since reads that have returned their values cannot be undone.
template <Scope scope = Scope::cluster>
HOPPER_DEVICE void mbarrier_arrive_cluster(Mbarrier* b, uint32_t cta_rank, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_arrive(static_cast<Mbarrier*>(emulator::map_shared(b, cta_rank, site)), 1, site);
#else
  static_assert(scope == Scope::cta || scope == Scope::cluster, "a barrier is shared by a CTA or a cluster");
  if constexpr (scope == Scope::cta)
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "mbarrier.arrive.release.cta.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(b)),
        "r"(cta_rank)
        : "memory");
  else
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(b)),
        "r"(cta_rank)
        : "memory");
#endif
}

// Announces bytes that copies will complete in this phase, without arriving: before the phase can complete.
HOPPER_DEVICE void mbarrier_expect_tx(Mbarrier* b, uint32_t bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_expect_tx(b, bytes, site);
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
#endif
}

// Both: the usual step of a producer, before its copies.
HOPPER_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* b, uint32_t bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_arrive_expect_tx(b, bytes, site);
#else
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
#endif
}

// Whether the phase of this parity is complete; acquires what its arrivals released. May suspend the thread
// for a while (try_wait). Scope::cluster is for reading ordinary writes of a peer CTA (it invalidates L1,
// which costs); bytes that landed by TMA or bulk copies, and stages that a peer has finished reading, need
// only Scope::cta.
template <Scope scope = Scope::cta>
HOPPER_DEVICE bool mbarrier_test_wait(Mbarrier* b, uint32_t parity, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(scope == Scope::cta || scope == Scope::cluster, "a barrier is shared by a CTA or a cluster");
#ifdef HOPPER_EMULATED
  return emulator::mbarrier_test_wait(b, parity, site);
#else
  uint32_t done;
  if constexpr (scope == Scope::cta)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  else
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
  return done;
#endif
}

// Waits for it. On the device a wait that never ends becomes a trap after 2^26 tries, so that a broken
// pipeline is an error and not a hang. How long a suspended try lasts is the hardware's choice: minutes, as
// an estimate.
template <Scope scope = Scope::cta>
HOPPER_DEVICE void mbarrier_wait(Mbarrier* b, uint32_t parity, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::mbarrier_wait(b, parity, site);
#else
  // One asm: with the trap in a C++ loop, ptxas 13.0 spills hundreds of bytes in kernels whose warpgroups change their
  // register counts (setmaxnreg), as if the largest count were that of the launch (fp8_gemm 128x192, 256x128, 128x256).
#define HOPPER_WAIT(semantics)                                                                              \
  asm volatile("{ .reg .pred done, late; .reg .b32 tries; mov.b32 tries, 0;\n"                              \
               "again: mbarrier.try_wait.parity" semantics ".shared::cta.b64 done, [%0], %1;\n"             \
               "@done bra out;\n"                                                                           \
               "add.u32 tries, tries, 1; setp.eq.u32 late, tries, 0x4000000;\n"                             \
               "@late trap;\n"                                                                              \
               "bra again;\n"                                                                               \
               "out: }" ::"r"(shared_address(b)), "r"(parity) : "memory")
  if constexpr (scope == Scope::cta)
    HOPPER_WAIT("");
  else
    HOPPER_WAIT(".acquire.cluster");
#undef HOPPER_WAIT
#endif
}

}  // namespace hopper
