// Bulk copies and reductions of contiguous bytes, and the groups of their stores.
#include "cases.h"

using namespace planted;

namespace {

struct Shared {
  alignas(128) float tile[2][64];
  Mbarrier barrier;
};

HOPPER_KERNEL(64) copy(const float* in, float* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  if (threadIdx.x == 0) {
    mbarrier_init(&s.barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&s.barrier, 256);
    bulk_load(s.tile[0], bug == 1 ? in + 1 : in, bug == 2 ? 252 : 256, &s.barrier);
  }
  block_sync();
  if (bug != 3) mbarrier_wait(&s.barrier, 0);
  s.tile[1][threadIdx.x] = 2 * s.tile[0][threadIdx.x];
  if (bug != 4) fence_proxy_async();
  block_sync();
  if (threadIdx.x == 0) {
    bulk_store(out, s.tile[1], 256);
    if (bug != 5) bulk_commit();
    if (bug != 6) bulk_wait<0>();
    if (bug == 7) out[0] = -1;          // after the wait: its own write, in order
    if (bug == 7) out[64] = 0;          // past the end
  }
}

// Two tiles through two buffers: a group may stay in flight, not two.
HOPPER_KERNEL(32) groups(float* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  for (int i = 0; i < 4; ++i) {
    if (bug == 1)
      bulk_wait_read<2>();
    else
      bulk_wait_read<1>();
    syncwarp();
    s.tile[i % 2][threadIdx.x] = static_cast<float>(i * 32 + threadIdx.x);
    fence_proxy_async();
    syncwarp();
    if (threadIdx.x == 0) {
      bulk_store(out + i * 32, s.tile[i % 2], 128);
      bulk_commit();
    }
  }
  if (threadIdx.x == 0) {
    if (bug == 2)
      bulk_wait_read<0>();   // the sources are free, but nothing is visible yet
    else
      bulk_wait<0>();
    s.tile[0][0] = out[127];
  }
}

HOPPER_KERNEL(32) add_up(float* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  s.tile[0][threadIdx.x] = 1;
  fence_proxy_async();
  syncwarp();
  if (threadIdx.x == 0) {
    bulk_reduce<Reduce::add, Element::f32>(bug == 1 ? out + 2 : out, s.tile[0], 128);
    bulk_commit();
    if (bug == 2) out[0] += 1;   // between two engines' reductions
    bulk_wait<0>();
  }
}

}  // namespace

CASE(bulk_copy, "bulk.arguments", "bulk.arguments", "race|smem.uninitialised", "proxy", "bulk.uncommitted", "bulk.unread_at_exit", "global.bounds") {
  Buffer<float> in(68, "in", false), out(64, "out", true);
  for (int i = 0; i < 68; ++i) in[i] = static_cast<float>(i);
  launch(shape(1, 64, 2048), copy, in.data(), out.data(), bug);
  out.expect([](size_t i) { return 2.0f * static_cast<float>(i); });
}

CASE(bulk_groups, "race", "race") {
  Buffer<float> out(128, "out", true);
  launch(shape(1, 32, 2048), groups, out.data(), bug);
  out.expect([](size_t i) { return static_cast<float>(i); });
}

CASE(bulk_reduce, "bulk.arguments", "race") {
  Buffer<float> out(34, "out", true);
  launch(shape(3, 32, 2048), add_up, out.data(), bug);
  out.expect([](size_t i) { return i < 32 ? 3.0f : 0.0f; });
}
