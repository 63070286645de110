// Fences. PTX ISA: "membar, fence" (fence.acq_rel, fence.proxy.async, fence.mbarrier_init,
// fence.proxy.tensormap).
#pragma once

#include "address.h"
#include "text.h"

namespace hopper {

// After mbarrier_init, before the barrier that lets others use it: makes the initialisation visible to the
// cluster and TMA.
HOPPER_DEVICE void fence_mbarrier_init([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::fence_mbarrier_init(site);
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Makes this thread's ordinary writes (and all it has observed) visible to TMA, bulk copies and wgmma: each
// writer executes it, then a barrier, then the copy is issued. Space::shared is this CTA's memory; a peer's
// needs Space::all.
template <Space space = Space::shared>
HOPPER_DEVICE void fence_proxy_async([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::fence_proxy_async(space, site);
#else
  if constexpr (space == Space::shared)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  else if constexpr (space == Space::global)
    asm volatile("fence.proxy.async.global;" ::: "memory");
  else
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

// fence.acq_rel at a scope: for flags that are written and read relaxed, and several of them at once.
template <Scope scope>
HOPPER_DEVICE void fence([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::fence(Order::acq_rel, scope, site);
#else
  asm volatile("fence.acq_rel.%0;" ::"C"(text::ScopeName<scope>::text) : "memory");
#endif
}

// Before TMA uses a map in global memory that was written during this kernel, or since the last use by this
// SM.
template <Scope scope>
HOPPER_DEVICE void fence_proxy_tensormap_acquire([[maybe_unused]] const TensorMap* map,
                                                 [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::fence_proxy_tensormap_acquire(map, scope, site);
#else
  asm volatile("fence.proxy.tensormap::generic.acquire.%1 [%0], 128;" ::"l"(map),
               "C"(text::ScopeName<scope>::text)
               : "memory");
#endif
}

}  // namespace hopper
