// Sums of the memory-bound kernels (docs/numerics.md, "Sums"): eight neighbours by a tree in fp32, the rest in fp64.
//
// Why: fp64 sums of fp32 terms differ between orders only below 2^-50, so that the rounded result does not depend on
// how many threads share a row; and eight terms to one conversion keep the fp64 pipe away from the memory's pace.
// The same steps in PyTorch: deepseek_ops/reference/modelled/elementary.py.
#pragma once

#include "../hopper/front.h"

// ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))
HOPPER_DEVICE float sum_of_8(const float (&v)[8]) {
  using hopper::add_rn;
  return add_rn(add_rn(add_rn(v[0], v[1]), add_rn(v[2], v[3])), add_rn(add_rn(v[4], v[5]), add_rn(v[6], v[7])));
}

// The sum over a warp, in every lane.
HOPPER_DEVICE double warp_sum(double value, hopper::Site site = HOPPER_HERE) {
  HOPPER_UNROLL for (int bits = 16; bits > 0; bits /= 2)
    value += hopper::shuffle_xor(value, bits, 32, hopper::kAllLanes, site);
  return value;
}

// The sum over a block of whole warps, in every thread. `room`: a double for each warp, in shared memory; a block that
// sums again before another barrier takes other room for it.
HOPPER_DEVICE double block_sum(double value, double* room, hopper::Site site = HOPPER_HERE) {
  const uint32_t threads = blockDim.x;
  value = warp_sum(value, site);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  hopper::barrier_sync<0>(threads, site);
  double total = 0;
  for (uint32_t warp = 0; warp < threads / 32; ++warp) total += room[warp];
  return total;
}

// x sigmoid(x) is the product of the two; sigmoid(x) = 1 / (1 + e^-x) in fp32 steps.
HOPPER_DEVICE float sigmoid(float x) {
  return hopper::reciprocal_approximate(hopper::add_rn(1.0f, hopper::exp_approximate(-x)));
}
