// mbarrier objects on their own.
#include "cases.h"

using namespace planted;

namespace {

struct Shared {
  Mbarrier barrier;
  uint32_t value[64];
};

HOPPER_KERNEL(64) misuse(uint32_t* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  Mbarrier* b = &s.barrier;
  if (bug == 5) b = reinterpret_cast<Mbarrier*>(dynamic_smem() + 4);
  if (threadIdx.x == 0) {
    if (bug != 4) mbarrier_init(b, bug == 1 ? 0 : bug == 2 ? 63 : bug == 3 ? 1 << 20 : 64);
    if (bug == 6) mbarrier_init(b, 64);
    fence_mbarrier_init();
  }
  block_sync();
  s.value[threadIdx.x] = threadIdx.x;
  mbarrier_arrive(b, bug == 7 ? 65 : 1);
  mbarrier_wait(b, 0);
  out[threadIdx.x] = s.value[63 - threadIdx.x];
  if (bug == 0 || bug == 8) {   // the barrier ends, and its place serves again
    block_sync();
    if (threadIdx.x == 0) {
      mbarrier_invalidate(b);
      if (bug == 0) mbarrier_init(b, 64);
    }
    block_sync();
    mbarrier_arrive(b);
    mbarrier_wait(b, 0);
  }
}

HOPPER_KERNEL(64) wait(uint32_t* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  if (threadIdx.x == 0) {
    mbarrier_init(&s.barrier, 32);
    fence_mbarrier_init();
  }
  block_sync();
  if (threadIdx.x < 32) {
    s.value[threadIdx.x] = 7;
    mbarrier_arrive(&s.barrier);
  } else {
    if (bug == 1) {
      mbarrier_wait(&s.barrier, 1);   // the phase before: done at once
    } else if (bug == 2) {
      mbarrier_wait(&s.barrier, 0);
      mbarrier_wait(&s.barrier, 1);   // a phase that never ends
    } else {
      while (!mbarrier_test_wait(&s.barrier, 0)) {
      }
    }
    out[threadIdx.x - 32] = s.value[threadIdx.x - 32];
  }
}

// Bytes that are expected and never come, and bytes that come unannounced.
HOPPER_KERNEL(32) bytes(const uint32_t* in, uint32_t* out, int bug) {
  auto* data = reinterpret_cast<uint32_t*>(dynamic_smem());
  auto* b = reinterpret_cast<Mbarrier*>(data + 64);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    fence_mbarrier_init();
    if (bug != 3) mbarrier_expect_tx(b, bug == 2 ? 256 : 128);
    if (bug != 1) bulk_load(data, in, 128, b);
    if (bug != 4) mbarrier_arrive(b);
  }
  if (bug == 1 || bug == 2) return;   // nobody waits: only the balance at the end can tell
  syncwarp();
  mbarrier_wait(b, 0);
  out[threadIdx.x] = data[threadIdx.x];
}

}  // namespace

CASE(mbarrier_misuse, "mbarrier.misuse", "race|mbarrier.misuse", "mbarrier.misuse", "mbarrier.uninitialised", "mbarrier.misuse", "mbarrier.misuse",
     "mbarrier.misuse", "mbarrier.uninitialised") {
  Buffer<uint32_t> out(64, "out", true);
  launch(shape(1, 64, 1024), misuse, out.data(), bug);
  out.expect([](size_t i) { return 63 - i; });
}

CASE(mbarrier_wait, "race|smem.uninitialised|deadlock", "deadlock") {
  Buffer<uint32_t> out(32, "out", true);
  launch(shape(1, 64, 1024), wait, out.data(), bug);
  out.expect([](size_t) { return 7u; });
}

CASE(mbarrier_bytes, "mbarrier.unbalanced", "mbarrier.unbalanced", "mbarrier.phase|deadlock|mbarrier.unbalanced", "deadlock") {
  Buffer<uint32_t> in(32, "in", false), out(32, "out", true);
  for (int i = 0; i < 32; ++i) in[i] = i + 1;
  launch(shape(1, 32, 1024), bytes, in.data(), out.data(), bug);
  out.expect([](size_t i) { return i + 1; });
}
