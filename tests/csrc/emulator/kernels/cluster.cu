// Clusters: a multicast ring between two CTAs, distributed shared memory, the cluster barrier.
#include "cases.h"

using namespace planted;

namespace {

constexpr int kStages = 2, kSlices = 5, kWords = 64;

struct Shared {
  alignas(128) uint32_t data[kStages][kWords];
  Mbarrier full[kStages], empty[kStages];
};

// Each CTA loads its half of every slice into both CTAs; four consumer warps of each add the slices up. Bugs 1 and 2 are
// numbers 9 and 10 of the GEMM's list.
HOPPER_KERNEL(160) ring(const uint32_t* in, uint32_t* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  const uint32_t own = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], bug == 1 ? 4 : 8);   // of both CTAs' consumers: this CTA writes to both
    }
    fence_mbarrier_init();
  }
  if (bug == 3)
    block_sync();   // the peer's barriers may not be there yet
  else
    cluster_sync();
  if (threadIdx.x >= 128) {
    if (elect_one()) {
      for (int i = 0; i < kSlices; ++i) {
        const int stage = i % kStages;
        mbarrier_wait(&s.empty[stage], (i / kStages & 1) ^ 1);
        mbarrier_arrive_expect_tx(&s.full[stage], kWords * 4);
        bulk_load(&s.data[stage][own * kWords / 2], in + i * kWords + own * kWords / 2, kWords * 2, &s.full[stage], bug == 4 ? 7 : 3);
      }
    }
  } else {
    uint32_t sum = 0;
    for (int i = 0; i < kSlices; ++i) {
      const int stage = i % kStages;
      mbarrier_wait(&s.full[stage], i / kStages & 1);
      sum += s.data[stage][threadIdx.x % kWords];
      syncwarp();
      if (threadIdx.x % 32 == 0) {
        if (bug == 1) {
          mbarrier_arrive(&s.empty[stage]);
        } else {
          mbarrier_arrive_cluster(&s.empty[stage], 0);
          mbarrier_arrive_cluster(&s.empty[stage], 1);
        }
      }
    }
    out[blockIdx.x * 128 + threadIdx.x] = sum;
  }
  if (bug != 2) cluster_sync();
}

// Every CTA reads its neighbour's memory.
HOPPER_KERNEL(64) exchange(uint32_t* out, int bug) {
  auto* mine = reinterpret_cast<uint32_t*>(dynamic_smem());
  const uint32_t other = (cluster_rank() + 1) % cluster_size();
  mine[threadIdx.x] = 100 * cluster_rank() + threadIdx.x;
  if (bug == 1) {
    block_sync();
  } else if (bug == 2) {
    cluster_arrive(false);   // relaxed: nothing written before is released
    cluster_wait();
  } else {
    cluster_sync();
  }
  const uint32_t* theirs = bug == 4 ? map_shared(mine, cluster_size()) : map_shared(mine, other);
  if (bug == 5) theirs += 1 << 14;
  out[blockIdx.x * 64 + threadIdx.x] = theirs[threadIdx.x ^ 1];
  if (bug != 3) cluster_sync();
}

HOPPER_KERNEL(64) order(uint32_t* out, int bug) {
  if (threadIdx.x >= 32 && bug == 0) return;   // the barrier waits for the threads that are left
  if (bug != 2) cluster_arrive();
  if (bug == 1) cluster_arrive();
  cluster_wait();
  cluster_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = 1;
}

// A CTA fills its neighbour's memory through the copy engine and its barrier.
HOPPER_KERNEL(32) push(uint32_t* out, int bug) {
  auto* data = reinterpret_cast<uint32_t*>(dynamic_smem());
  auto* inbox = data + 32;
  auto* arrived = reinterpret_cast<Mbarrier*>(data + 64);
  const uint32_t other = cluster_rank() ^ 1;
  data[threadIdx.x] = 10 * cluster_rank() + threadIdx.x;
  if (threadIdx.x == 0) {
    mbarrier_init(arrived, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(arrived, bug == 3 ? 64 : 128);
  }
  if (bug != 1) fence_proxy_async();
  cluster_sync();
  if (threadIdx.x == 0) {
    Mbarrier* theirs = map_shared(arrived, other);
    bulk_copy_cluster(map_shared(inbox, other), data, 128, theirs);
    if (bug == 4) mbarrier_wait(theirs, 0);   // only arrivals may be remote
  }
  if (bug != 2) mbarrier_wait(arrived, 0);
  out[blockIdx.x * 32 + threadIdx.x] = inbox[threadIdx.x];
  cluster_sync();
}

}  // namespace

CASE(cluster_ring, "race|mbarrier.phase", "smem.dead_block", "mbarrier.uninitialised|race", "tma.arguments") {
  Buffer<uint32_t> in(kSlices * kWords, "in", false), out(256, "out", true);
  for (int i = 0; i < kSlices * kWords; ++i) in[i] = i;
  launch(shape(2, 160, sizeof(Shared), 2), ring, in.data(), out.data(), bug);
  out.expect([](size_t i) { return kSlices * (i % kWords) + kWords * kSlices * (kSlices - 1) / 2; });
}

CASE(cluster_exchange, "race", "race", "smem.dead_block", "smem.bounds", "smem.bounds") {
  Buffer<uint32_t> out(256, "out", true);
  launch(shape(4, 64, 1024, 4), exchange, out.data(), bug);
  out.expect([](size_t i) { return 100 * ((i / 64 + 1) % 4) + (i % 64 ^ 1); });
}

CASE(cluster_order, "cluster.order", "cluster.order") {
  Buffer<uint32_t> out(2, "out", true);
  launch(shape(2, 64, 1024, 2), order, out.data(), bug);
}

CASE(cluster_push, "proxy", "race|smem.uninitialised", "deadlock", "mbarrier.misuse") {
  Buffer<uint32_t> out(64, "out", true);
  launch(shape(2, 32, 1024, 2), push, out.data(), bug);
  out.expect([](size_t i) { return 10 * (1 - i / 32) + i % 32; });
}
