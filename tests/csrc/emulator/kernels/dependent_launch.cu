// Programmatic dependent launch: the second grid may begin early, and must wait before it touches what the first wrote.
#include "cases.h"

using namespace planted;

namespace {

HOPPER_KERNEL(64) first(uint32_t* data, int bug) {
  auto* s = reinterpret_cast<uint32_t*>(dynamic_smem());
  if (bug != 3) grid_dependency_launch();
  s[threadIdx.x] = blockIdx.x * 64 + threadIdx.x;
  fence_proxy_async();
  block_sync();
  if (threadIdx.x == 0) {   // through the engine, and only waiting for its reads: the end of the grid completes it
    bulk_store(data + blockIdx.x * 64, s, 256);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

HOPPER_KERNEL(64) second(uint32_t* data, uint32_t* out, int bug) {
  if (bug != 1) grid_dependency_wait();
  out[blockIdx.x * 64 + threadIdx.x] = data[(blockIdx.x ^ 1) * 64 + threadIdx.x];
  if (bug == 2) grid_dependency_launch();
}

HOPPER_KERNEL(64) third(const uint32_t* out, uint32_t* copy, int bug) {
  if (bug != 2) grid_dependency_wait();
  copy[blockIdx.x * 64 + threadIdx.x] = out[blockIdx.x * 64 + threadIdx.x];
}

}  // namespace

CASE(dependent_launch, "race|data", "race|data") {
  Buffer<uint32_t> data(256, "data", true), out(256, "out", true), copy(256, "copy", true);
  emulator::begin_world(1);
  LaunchConfig c = shape(4, 64, 1024);
  c.name = "first";
  launch(c, first, data.data(), bug);
  c.programmatic = true;
  c.name = "second";
  launch(c, second, data.data(), out.data(), bug);
  c.name = "third";
  launch(c, third, out.data(), copy.data(), bug);
  emulator::run_world();
  copy.expect([](size_t i) { return i ^ 64; });
}

// Without the attribute the second grid begins when the first has ended: no wait is needed.
CASE(plain_launches) {
  Buffer<uint32_t> data(256, "data", true), out(256, "out", true), copy(256, "copy", true);
  emulator::begin_world(1);
  launch(shape(4, 64, 1024), first, data.data(), bug);
  launch(shape(4, 64, 1024), second, data.data(), out.data(), 1);
  launch(shape(4, 64, 1024), third, out.data(), copy.data(), 2);
  emulator::run_world();
  copy.expect([](size_t i) { return i ^ 64; });
}
