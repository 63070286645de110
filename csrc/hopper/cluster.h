// Clusters and distributed shared memory. PTX ISA: "barrier.cluster", "mapa", "%cluster_ctarank".
#pragma once

#include "address.h"

namespace hopper {

HOPPER_DEVICE uint32_t cluster_rank() {
#ifdef HOPPER_EMULATED
  return emulator::identity().cluster_rank;
#else
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

HOPPER_DEVICE uint32_t cluster_size() {
#ifdef HOPPER_EMULATED
  return emulator::identity().cluster_size;
#else
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#endif
}

// Whole warps (.aligned). release = false: only execution is ordered, not memory.
HOPPER_DEVICE void cluster_arrive(bool release = true, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::cluster_arrive(release, site);
#else
  if (release)
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

HOPPER_DEVICE void cluster_wait([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::cluster_wait(site);
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

HOPPER_DEVICE void cluster_sync([[maybe_unused]] Site site = HOPPER_HERE) {
  cluster_arrive(true, site);
  cluster_wait(site);
}

// The same variable in the shared memory of another CTA of the cluster, as an ordinary pointer. The peer must
// be alive: a cluster barrier after the last access.
template <class T>
HOPPER_DEVICE T* map_shared(T* p, uint32_t cta_rank, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  return static_cast<T*>(emulator::map_shared(p, cta_rank, site));
#else
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(cta_rank));
  return reinterpret_cast<T*>(there);
#endif
}

}  // namespace hopper
