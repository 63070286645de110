// Fences. PTX ISA: "fence", "fence.proxy.async", "fence.mbarrier_init", "fence.proxy.tensormap".
#pragma once

#include "address.h"

namespace hopper {

// After mbarrier_init, before the barrier that lets others use it: makes the initialisation visible to the cluster and TMA.
HOPPER_DEVICE void fence_mbarrier_init([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::fence_mbarrier_init(site);
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Makes this thread's ordinary writes (and all it has observed) visible to TMA, bulk copies and wgmma.
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

// fence.acq_rel at a scope.
template <Scope scope>
HOPPER_DEVICE void fence([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::fence(Order::acq_rel, scope, site);
#else
  if constexpr (scope == Scope::cta) asm volatile("fence.acq_rel.cta;" ::: "memory");
  if constexpr (scope == Scope::cluster) asm volatile("fence.acq_rel.cluster;" ::: "memory");
  if constexpr (scope == Scope::gpu) asm volatile("fence.acq_rel.gpu;" ::: "memory");
  if constexpr (scope == Scope::sys) asm volatile("fence.acq_rel.sys;" ::: "memory");
#endif
}

}  // namespace hopper
