// Named barriers and register budgets.
#include "cases.h"

using namespace planted;

namespace {

// Two pairs of warps, each with its own barrier; then producers that arrive and consumers that wait.
HOPPER_KERNEL(128) pairs(uint32_t* out, int bug) {
  auto* s = reinterpret_cast<uint32_t*>(dynamic_smem());
  const uint32_t t = threadIdx.x, pair = t / 64;
  for (int i = 0; i < 4; ++i) {
    s[t] = 10 * i + t;
    if (bug == 1) barrier_sync<1>(64);                       // both pairs
    else if (bug == 2 && t == 5) barrier_sync<1>(96);        // one thread expects more
    else if (bug == 3 && pair == 0) barrier_sync<1>(48);     // one and a half warps
    else if (bug == 4 && pair == 0) barrier_sync<1>(160);    // more than the block has
    else if (bug == 5 && pair == 0) barrier_sync<1>(96);     // a third warp never comes
    else if (bug == 6 && pair == 0) syncwarp();              // not far enough
    else if (pair == 0) barrier_sync<1>(64);
    else barrier_sync<2>(64);
    out[t] += s[t ^ 32];
    if (pair == 0) barrier_sync<3>(64); else barrier_sync<4>(64);
  }
  block_sync();
  if (pair == 0) {
    s[t] = t;
    if (bug != 7) barrier_arrive<5>(128);
  } else {
    if (bug != 7) barrier_sync<5>(128);
    out[t] += s[t - 64];
  }
}

HOPPER_KERNEL(256) budgets(uint32_t* out, int bug) {
  const uint32_t group = threadIdx.x / 128;
  if (group == 0) {
    if (bug == 1) set_max_registers_up<40>();                    // fewer than it has
    else if (bug == 2 && threadIdx.x < 32) set_max_registers_down<48>();   // a warp with another number
    else if (bug == 3 && threadIdx.x < 32) {}                    // a warp that does not take part
    else set_max_registers_down<40>();
  } else {
    if (bug == 4) emulator::set_max_registers(true, 236, HOPPER_HERE);
    else set_max_registers_up<256>();                            // waits for what the others give back
  }
  out[threadIdx.x] = group;
}

}  // namespace

CASE(barrier_pairs, "barrier.members|race", "barrier.count", "barrier.count", "barrier.count", "deadlock|barrier.count|barrier.members|race", "race", "race") {
  Buffer<uint32_t> out(128, "out", true);
  launch(shape(1, 128, 1024), pairs, out.data(), bug);
  out.expect([](size_t t) { return 60 + 4 * (t ^ 32) + (t >= 64 ? t - 64 : 0); });
}

CASE(register_budgets, "registers", "registers", "registers", "registers") {
  Buffer<uint32_t> out(256, "out", true);
  launch(shape(1, 256, 1024), budgets, out.data(), bug);
  out.expect([](size_t t) { return t / 128; });
}
