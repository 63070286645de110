// A kernel outside of any Python package: each block reverses 256 floats with TMA's bulk engine.
#include "reverse.h"

#include "../../hopper/front.h"

using namespace hopper;

namespace {

constexpr uint32_t kFloats = 256;

struct Shared {
  alignas(128) float in[kFloats], out[kFloats];
  Mbarrier full;
};

HOPPER_KERNEL(kFloats) reverse_kernel(const float* in, float* out) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  const uint32_t t = threadIdx.x;
  if (t == 0) {
    mbarrier_init(&s.full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&s.full, sizeof s.in);
    bulk_load(s.in, in + blockIdx.x * kFloats, sizeof s.in, &s.full);
  }
  block_sync();
  mbarrier_wait(&s.full, 0);
  s.out[t] = s.in[kFloats - 1 - t];
#ifndef WITHOUT_FENCE
  fence_proxy_async();   // what was just written is for the copy engine
#endif
  block_sync();
  if (t == 0) {
    bulk_store(out + blockIdx.x * kFloats, s.out, sizeof s.out);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

}  // namespace

void reverse(const float* in, float* out, uint32_t blocks) {
  LaunchConfig c;
  c.grid = dim3(blocks);
  c.block = dim3(kFloats);
  c.smem_bytes = sizeof(Shared);
  c.name = "reverse";
  launch(c, reverse_kernel, in, out);
}
