// What a block costs in a grid of any size: the bug number is the number of blocks, all resident.
#include "cases.h"

using namespace planted;

namespace {

HOPPER_KERNEL(128) ring(const uint32_t* in, uint32_t* out) {
  auto* data = reinterpret_cast<uint32_t*>(dynamic_smem());
  auto* full = reinterpret_cast<Mbarrier*>(data + 512);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  block_sync();
  uint32_t sum = 0;
  for (uint32_t i = 0; i < 24; ++i) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(full, 2048);
      bulk_load(data, in, 2048, full);
    }
    mbarrier_wait(full, i & 1);
    for (uint32_t j = 0; j < 4; ++j) sum += data[j * 128 + (threadIdx.x + i) % 128];
    block_sync();
  }
  out[blockIdx.x * 128 + threadIdx.x] = sum;
}

}  // namespace

CASE(cost) {
  const uint32_t blocks = bug ? bug : 2;
  emulator::options().resident_clusters = blocks;
  Buffer<uint32_t> in(512, "in", false), out(128 * blocks, "out", true);
  for (int i = 0; i < 512; ++i) in[i] = 1;
  launch(shape(blocks, 128, 4096), ring, in.data(), out.data());
  out.expect([](size_t) { return 96u; });
}
