// cp.async: its groups, its arrivals, and that it writes through the generic proxy.
#include "cases.h"

using namespace planted;

namespace {

struct Shared {
  alignas(1024) uint8_t matrix[64 * 128];
  alignas(128) float4 tile[2][128];
  Mbarrier barrier;
};

HOPPER_KERNEL(128) pipeline(const float4* in, float* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  const uint32_t t = threadIdx.x;
  cp_async<16>(&s.tile[0][t], bug == 4 ? reinterpret_cast<const float*>(in + t) + 1 : reinterpret_cast<const float*>(in + t));
  if (bug != 1) cp_async_commit();
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    if (i + 1 < 4) {
      cp_async<16>(&s.tile[(i + 1) % 2][t], in + (i + 1) * 128 + t, i == 2 ? 4 : 16);   // the last one: 4 bytes, zeros after them
      cp_async_commit();
    }
    if (i + 1 == 4)
      cp_async_wait<0>();
    else if (bug == 2)
      cp_async_wait<2>();
    else
      cp_async_wait<1>();
    if (bug != 3) block_sync();
    const float4 v = s.tile[i % 2][(t + 37) % 128];
    sum += v.x + v.y + v.z + v.w;
    block_sync();
  }
  out[t] = sum;
}

// Arrivals on an mbarrier instead of a wait: 128 threads, each counted by init (no_increment) or not.
HOPPER_KERNEL(128) arrive(const float4* in, float* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  const uint32_t t = threadIdx.x;
  if (t == 0) {
    mbarrier_init(&s.barrier, bug == 2 ? 1 : 128);
    fence_mbarrier_init();
  }
  block_sync();
  cp_async<16>(&s.tile[0][t], in + t);
  if (bug == 1) {
    mbarrier_arrive(&s.barrier);   // the thread arrives, its copy may not have
  } else if (bug == 3) {
    cp_async_mbarrier_arrive<false>(&s.barrier);   // adds an arrival for itself, and nobody makes the first 128
  } else {
    cp_async_mbarrier_arrive<true>(&s.barrier);
  }
  mbarrier_wait(&s.barrier, 0);
  const float4 v = s.tile[0][127 - t];
  out[t] = v.x + v.y + v.z + v.w;
}

// What cp.async wrote, read by wgmma: needs a proxy fence, as any generic write does.
HOPPER_KERNEL(128) to_wgmma(const uint8_t* in, float* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  const uint32_t t = threadIdx.x;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t row = i * 16 + t / 8, chunk = t % 8;
    cp_async<16>(s.matrix + row * 128 + (chunk ^ (row & 7)) * 16, in + row * 128 + chunk * 16);
  }
  cp_async_commit();
  cp_async_wait<0>();
  if (bug != 1) fence_proxy_async();
  block_sync();
  float d[4] = {};
  const uint64_t m = matrix_descriptor<Swizzle::b128>(s.matrix);
  wgmma_fence();
  for (int k = 0; k < 128; k += 32) Wgmma<8, Operand::e4m3, Operand::e4m3>::issue(d, advance(m, k), advance(m, k), true);
  wgmma_commit();
  wgmma_wait<0>();
  out[t] = d[0];
}

}  // namespace

CASE(cp_async_pipeline, "race|data|smem.uninitialised", "race|smem.uninitialised", "race|smem.uninitialised", "cp_async.arguments") {
  Buffer<float4> in(4 * 128, "in", false);
  Buffer<float> out(128, "out", true);
  for (int i = 0; i < 4 * 128; ++i) in[i] = {static_cast<float>(i), 1, 2, 3};
  launch(shape(1, 128, sizeof(Shared)), pipeline, in.data(), out.data(), bug);
  out.expect([](size_t t) { return static_cast<float>(4 * ((t + 37) % 128) + 128 * 6 + 18); });
}

CASE(cp_async_arrive, "race|smem.uninitialised", "race|mbarrier.misuse|smem.uninitialised|deadlock", "deadlock") {
  Buffer<float4> in(128, "in", false);
  Buffer<float> out(128, "out", true);
  for (int i = 0; i < 128; ++i) in[i] = {static_cast<float>(i), 0, 0, 1};
  launch(shape(1, 128, sizeof(Shared)), arrive, in.data(), out.data(), bug);
  out.expect([](size_t t) { return static_cast<float>(128 - t); });
}

CASE(cp_async_to_wgmma, "proxy") {
  Buffer<uint8_t> in(64 * 128, "in", false);
  Buffer<float> out(128, "out", true);
  for (int i = 0; i < 64 * 128; ++i) in[i] = 0x38;
  launch(shape(1, 128, sizeof(Shared)), to_wgmma, in.data(), out.data(), bug);
  out.expect([](size_t) { return 128.0f; });
}
