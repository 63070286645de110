// Copies of 4, 8 or 16 bytes, global to shared, by a thread for itself (generic proxy). PTX ISA: "cp.async".
#pragma once

#include "address.h"

namespace hopper {

// Bytes past `valid` are filled with zeros.
template <uint32_t bytes>
HOPPER_DEVICE void cp_async(void* dst, const void* src, uint32_t valid = bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef HOPPER_EMULATED
  emulator::cp_async(dst, src, bytes, valid, site);
#else
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared::cta.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared::cta.global [%0], [%1], %2, %3;" ::"r"(shared_address(dst)), "l"(src), "n"(bytes), "r"(valid)
                 : "memory");
#endif
}

HOPPER_DEVICE void cp_async_commit([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::cp_async_commit(site);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `pending` of this thread's groups are in flight. Other threads need a barrier besides.
template <uint32_t pending>
HOPPER_DEVICE void cp_async_wait([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::cp_async_wait(pending, site);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// The barrier gets an arrival of this thread when its copies so far have landed. no_increment: the arrival is
// one of those the barrier was initialised for.
template <bool no_increment>
HOPPER_DEVICE void cp_async_mbarrier_arrive(Mbarrier* b, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::cp_async_mbarrier_arrive(b, no_increment, site);
#else
  if constexpr (no_increment)
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
  else
    asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory");
#endif
}

}  // namespace hopper
