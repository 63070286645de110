// Choosing experts within a warp: who holds which score, and the largest of them, again and again.
#pragma once

#include "../common/sums.h"

namespace moe_kernels {

constexpr int kThreads = 128;              // of the kernels with one warp a token
constexpr int kWarps = kThreads / 32;
constexpr float kEpsilon = 1e-20f;         // added to a sum before it divides

HOPPER_DEVICE int64_t token_of_warp() { return int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; }

// Zeros before what others will add to.
HOPPER_KERNEL(kThreads) clear_kernel(uint32_t* words, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  hopper::grid_dependency_wait();
  if (i < count) words[i] = 0;
  hopper::grid_dependency_launch();
}

// Keys order as the floats do, NaN above them all; 0 is below every float, -inf too: nobody.
HOPPER_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = hopper::float_bits(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0xFFFFFFFF;
  return bits ^ (bits >> 31 ? 0xFFFFFFFF : 0x80000000);
}
HOPPER_DEVICE float value_of(uint32_t key) { return hopper::bits_float(key ^ (key >> 31 ? 0x80000000 : 0xFFFFFFFF)); }

HOPPER_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
HOPPER_DEVICE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// How the lanes of a warp are shared out: 32 / 2^ceil(log2 groups) neighbouring lanes for each group of experts.
struct Spread {
  int32_t groups, size;      // experts of a group
  int32_t lane_bits;         // 2^lane_bits lanes hold one group
};

// The experts of one lane, in ascending order: units of kUnit neighbours, dealt out to the lanes of the group.
//
// An expert's tag is (group, unit of the lane, lane, place in the unit): it orders as experts do, and is the sum of a
// number of the lane and a constant of the value, so that choosing needs no arithmetic with the sizes of groups.
template <int kValues_, int kUnit>
struct Place {
  static constexpr int kValues = kValues_;
  static_assert(kValues % kUnit == 0);
  static constexpr uint32_t kNoTag = 1u << 30;
  int32_t group, first, size, lane, lanes;
  uint32_t tag_of_lane;

  HOPPER_DEVICE explicit Place(Spread spread) {
    const auto lane_of_warp = static_cast<int32_t>(threadIdx.x % 32);
    lanes = 1 << spread.lane_bits;
    group = lane_of_warp >> spread.lane_bits;
    lane = lane_of_warp & (lanes - 1);
    first = group * spread.size;
    tag_of_lane = group * 32 * kValues + lane * kUnit;
    size = group < spread.groups ? spread.size : 0;   // lanes that no group needs hold nothing
  }
  HOPPER_DEVICE int32_t within(int v) const { return (v / kUnit * lanes + lane) * kUnit + v % kUnit; }
  HOPPER_DEVICE bool has(int v) const { return within(v) < size; }
  HOPPER_DEVICE int32_t expert(int v) const { return first + within(v); }

  static HOPPER_DEVICE constexpr uint32_t tag_of_value(int v) { return v / kUnit * 32 * kUnit + v % kUnit; }
  // Of a tag that one of the warp's lanes has.
  HOPPER_DEVICE int32_t expert_of(uint32_t tag, int32_t group_size) const {
    const uint32_t of_group = tag % (32 * kValues), unit = of_group / (32 * kUnit), in_unit = of_group % (32 * kUnit);
    return static_cast<int32_t>(tag / (32 * kValues) * group_size + unit * lanes * kUnit + in_unit);
  }

  // Values of a row at the lane's experts; 0 where there is none.
  template <bool kVector>
  HOPPER_DEVICE void load(const float* row, int64_t stride, float (&x)[kValues]) const {
    if constexpr (kVector) {   // size and first are multiples of 4
      HOPPER_UNROLL for (int v = 0; v < kValues; v += 4) {
        const float4 four = has(v) ? hopper::load_vector<float4>(row + expert(v)) : float4{};
        x[v] = four.x, x[v + 1] = four.y, x[v + 2] = four.z, x[v + 3] = four.w;
      }
    } else {
      HOPPER_UNROLL for (int v = 0; v < kValues; ++v) x[v] = has(v) ? row[expert(v) * stride] : 0.0f;
    }
  }

  template <bool kVector>
  HOPPER_DEVICE void store(const float (&x)[kValues], float* row) const {
    if constexpr (kVector) {
      HOPPER_UNROLL for (int v = 0; v < kValues; v += 4)
        if (has(v)) hopper::store_vector(row + expert(v), float4{x[v], x[v + 1], x[v + 2], x[v + 3]});
    } else {
      HOPPER_UNROLL for (int v = 0; v < kValues; ++v)
        if (has(v)) row[expert(v)] = x[v];
    }
  }
};

// The tag of the expert with the largest key of the warp, of equals the lowest; its key becomes 0. Two instructions
// across the warp: lanes need not exchange (key, expert) pairs. Some key must not be 0.
template <class P>
HOPPER_DEVICE uint32_t take_largest(const P& place, uint32_t (&keys)[P::kValues]) {
  uint32_t best = 0;
  HOPPER_UNROLL for (int v = 0; v < P::kValues; ++v) best = larger(best, keys[v]);
  best = hopper::warp_max(best);
  uint32_t mine = P::kNoTag; // of this lane's first value that is it
  HOPPER_UNROLL for (int v = P::kValues - 1; v >= 0; --v) mine = keys[v] == best ? P::tag_of_value(v) : mine;
  const uint32_t chosen = hopper::warp_min(place.tag_of_lane + mine);
  HOPPER_UNROLL for (int v = 0; v < P::kValues; ++v)
    keys[v] = chosen - place.tag_of_lane == P::tag_of_value(v) ? 0 : keys[v];
  return chosen;
}

// Closes all groups but the best `top_groups`: their keys become 0. A group counts the sum of its two best scores.
template <class P>
HOPPER_DEVICE void keep_best_groups(const P& place, int32_t top_groups, uint32_t (&keys)[P::kValues]) {
  uint32_t first = 0, second = 0;
  HOPPER_UNROLL for (int v = 0; v < P::kValues; ++v) {
    second = larger(second, smaller(first, keys[v]));
    first = larger(first, keys[v]);
  }
  for (int bits = 1; bits < place.lanes; bits *= 2) {
    const uint32_t other_first = hopper::shuffle_xor(first, bits), other_second = hopper::shuffle_xor(second, bits);
    second = larger(smaller(first, other_first), larger(second, other_second));
    first = larger(first, other_first);
  }
  const float score = place.size == 1 ? value_of(first) : hopper::add_rn(value_of(first), value_of(second));
  const uint32_t key = place.size == 0 ? 0 : key_of(score);
  bool open = false;
  for (int i = 0; i < top_groups; ++i) {
    const uint32_t best = hopper::warp_max(open ? 0 : key);
    const uint32_t group = hopper::warp_min(!open && key == best ? place.group : 0xFFFFFFFF);
    open = open || place.group == static_cast<int32_t>(group);
  }
  HOPPER_UNROLL for (int v = 0; v < P::kValues; ++v) keys[v] = open ? keys[v] : 0;
}

// The sum over lanes (docs/numerics.md, "Sums"): eight neighbours by a tree in fp32, the four results in fp64.
HOPPER_DEVICE float sum_of_lanes(float x) {
  HOPPER_UNROLL for (int bits = 1; bits < 8; bits *= 2) x = hopper::add_rn(x, hopper::shuffle_xor(x, bits));
  double sum = x;
  sum += hopper::shuffle_xor(sum, 8);
  sum += hopper::shuffle_xor(sum, 16);
  return static_cast<float>(sum);
}

}  // namespace moe_kernels
