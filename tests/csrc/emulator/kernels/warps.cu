// Collectives of a warp: masks, lanes that have left, and that only syncwarp orders memory.
#include "cases.h"

using namespace planted;

namespace {

HOPPER_KERNEL(32) collectives(uint32_t* out, int bug) {
  const uint32_t lane = threadIdx.x;
  auto* s = reinterpret_cast<uint32_t*>(dynamic_smem());
  s[lane] = lane;
  if (bug == 1)
    (void)ballot(true);   // lanes meet, memory is not ordered
  else
    syncwarp();
  uint32_t sum = s[31 - lane];
  for (uint32_t i = 16; i; i /= 2) sum += shuffle_xor(sum, i);
  uint32_t half = 0;
  if (lane < 16) half = shuffle_down(lane, 8, 16, 0xffffu);
  if (bug == 2 && lane < 16) half = shuffle(lane, 20, 32, 0xffffu);     // a lane outside of the mask
  if (bug == 3) half = lane < 16 ? shuffle(lane, 0, 32, 0xffffu) : shuffle(lane, 16, 32, 0xfffffff0u);   // masks that overlap
  if (bug == 4) half = shuffle(lane, 0, 32, 0xfffffffeu);               // lane 0 is not in its own mask
  if (bug == 5) half = lane % 2 ? ballot(true) : warp_sum(lane);        // two instructions under one mask
  if (lane >= 24 && (bug == 6 || bug == 7)) return;
  if (bug == 6) syncwarp();                                             // names lanes that have ended
  if (bug == 7) half = elect_one();
  if (bug == 0) {
    if (lane < 8) half += ballot(lane % 2, 0xffu) + warp_max(lane, 0xffu);   // lanes apart, each group by its own mask
    else half += any(lane > 30, 0xffffff00u);
  }
  out[lane] = sum + half;
}

}  // namespace

CASE(warp_collectives, "race", "warp.mask", "warp.mask", "warp.mask", "warp.mask", "warp.mask", "warp.mask") {
  Buffer<uint32_t> out(32, "out", true);
  launch(shape(1, 32, 1024), collectives, out.data(), bug);
  out.expect([](size_t l) { return 496 + (l < 16 ? (l % 16 < 8 ? l + 8 : l) : 0) + (l < 8 ? 0xaa + 7 : 1); });
}
