// A ring of shared-memory stages between one producer and the warps that consume what it loads.
//
// Each stage has two mbarriers. `full` completes when the bytes that the producer announced have landed; `empty`
// completes when every consumer warp has released the stage. Who waits for phase p of a barrier passes its parity, so
// a role carries a Cursor: the stage it is at, and how often the ring has come around, modulo 2.
//
//   producer                                      consumer
//     ring.acquire(cursor);                         ring.wait(cursor);
//     ring.expect(cursor, bytes);                   ... read the stage ...
//     tma_load(..., ring.full_barrier(cursor));     ring.release<ClusterSize>(cursor);
//     cursor.advance();                             cursor.advance();
//
// In a cluster that multicasts, a load writes the stage of both CTAs. The producer must then know that the stage is
// free in both, so each consumer warp releases it to both: `empty` counts the consumers of the whole cluster.
#pragma once

#include "../hopper/front.h"

template <int Stages>
struct Pipeline {
  static_assert(Stages >= 2, "one stage cannot overlap loading with computing");

  hopper::Mbarrier full[Stages];
  hopper::Mbarrier empty[Stages];

  struct Cursor {
    uint32_t stage = 0, phase = 0;
    HOPPER_DEVICE void advance() {
      if (++stage == Stages) {
        stage = 0;
        phase ^= 1;
      }
    }
  };

  // One thread; the caller then synchronises the block (or the cluster), which also publishes the barriers to TMA.
  // A ring that the 32 lanes of a warp fill by cp.async has 32 producer arrivals: cp_async_mbarrier_arrive of each.
  HOPPER_DEVICE void init(uint32_t consumer_warps_of_cluster, uint32_t producer_arrivals = 1,
                          hopper::Site site = HOPPER_HERE) {
    for (int stage = 0; stage < Stages; ++stage) {
      hopper::mbarrier_init(&full[stage], producer_arrivals, site);
      hopper::mbarrier_init(&empty[stage], consumer_warps_of_cluster, site);
    }
    hopper::fence_mbarrier_init(site);
  }

  // Waits until the stage is free. Of a fresh barrier the phase before the first counts as complete, so that the first
  // round does not wait.
  HOPPER_DEVICE void acquire(const Cursor& cursor, hopper::Site site = HOPPER_HERE) {
    hopper::mbarrier_wait(&empty[cursor.stage], cursor.phase ^ 1, site);
  }

  // The producer's only arrival, together with all bytes that will land in this CTA's stage - the peer's half too.
  HOPPER_DEVICE void expect(const Cursor& cursor, uint32_t bytes, hopper::Site site = HOPPER_HERE) {
    hopper::mbarrier_arrive_expect_tx(&full[cursor.stage], bytes, site);
  }

  HOPPER_DEVICE hopper::Mbarrier* full_barrier(const Cursor& cursor) { return &full[cursor.stage]; }

  // Every consuming thread waits by itself: that is what makes the landed bytes visible to it.
  HOPPER_DEVICE void wait(const Cursor& cursor, hopper::Site site = HOPPER_HERE) {
    hopper::mbarrier_wait(&full[cursor.stage], cursor.phase, site);
  }

  // Whole warps. The __syncwarp orders the reads of all 32 lanes before the arrival that one of them makes: the PTX
  // memory model orders nothing else here, although silicon seems to.
  template <int ClusterSize>
  HOPPER_DEVICE void release(const Cursor& cursor, hopper::Site site = HOPPER_HERE) {
    hopper::syncwarp(0xffffffffu, site);
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (ClusterSize == 1) {
      if (lane == 0) hopper::mbarrier_arrive(&empty[cursor.stage], 1, site);
    } else {
      if (lane < ClusterSize) hopper::mbarrier_arrive_cluster<hopper::Scope::cta>(&empty[cursor.stage], lane, site);
    }
  }
};

// The end of a kernel with clusters, for every thread: no CTA leaves while its peer may still write to its shared
// memory or arrive on its barriers. Without a cluster the consumers' waits are drain enough.
template <int ClusterSize>
HOPPER_DEVICE void drain_cluster(hopper::Site site = HOPPER_HERE) {
  if constexpr (ClusterSize > 1) {
    hopper::syncwarp(0xffffffffu, site);   // barrier.cluster is .aligned: the elected lane rejoins its warp
    hopper::cluster_arrive(true, site);
    hopper::cluster_wait(site);
  }
}
