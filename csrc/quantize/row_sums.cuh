// Sums over rows that lie in patches: one patch is 16 columns of 4 rows, 8 lanes hold 128 columns. The order is that of
// docs/numerics.md, "Elementary functions and sums": 8 neighbours by a tree in fp32, those sums in fp64.
#pragma once

#include "../common/sums.h"
#include "patch.cuh"

namespace quantize_kernels {

// The part of one row's sum that this lane counts. `terms`: of its 16 columns, in the patch's order. A piece of bf16 is
// 8 neighbours; one of fp32 is 4, and lanes 2 m and 2 m + 1 hold the halves: even lanes count pieces 0 and 2, odd 1 and 3.
template <int kPiece>
HOPPER_DEVICE double sum_of_columns(const float (&terms)[kColumns], [[maybe_unused]] int lane) {
  using hopper::add_rn;
  if constexpr (kPiece == 8) {
    const float (&left)[8] = *reinterpret_cast<const float (*)[8]>(&terms[0]);
    const float (&right)[8] = *reinterpret_cast<const float (*)[8]>(&terms[8]);
    return static_cast<double>(sum_of_8(left)) + static_cast<double>(sum_of_8(right));
  } else {
    static_assert(kPiece == 4, "pieces of bf16 or fp32");
    const bool odd = lane & 1;
    double sum = 0;
    HOPPER_UNROLL
    for (int i = 0; i < kColumns; i += 8) {
      const float even_half = add_rn(add_rn(terms[i], terms[i + 1]), add_rn(terms[i + 2], terms[i + 3]));
      const float odd_half = add_rn(add_rn(terms[i + 4], terms[i + 5]), add_rn(terms[i + 6], terms[i + 7]));
      const float other = hopper::shuffle_xor(odd ? even_half : odd_half, 1);
      sum += static_cast<double>(add_rn(odd ? odd_half : even_half, other));
    }
    return sum;
  }
}

// From the lanes' parts of 4 rows to the sums over 8 lanes: lane j gets that of row j % 4. Each of the first two exchanges
// halves the rows that a lane cares for.
HOPPER_DEVICE double group_row_sums(const double (&own)[kRows], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const double a = own[0], b = own[1], c = own[2], d = own[3];   // values: choosing between places would need memory
  const double low_pair = (odd ? b : a) + hopper::shuffle_xor(odd ? a : b, 1);
  const double high_pair = (odd ? d : c) + hopper::shuffle_xor(odd ? c : d, 1);
  const double row = (high ? high_pair : low_pair) + hopper::shuffle_xor(high ? low_pair : high_pair, 2);
  return row + hopper::shuffle_xor(row, 4);
}

// From that to the sums over `warps` warps from `first` on, which share 4 rows: lane l gets that of row l % 4. `room`: kRows
// doubles for each warp of the block, in shared memory, not used again before the block's next barrier but one. A single
// warp needs neither room nor barrier.
HOPPER_DEVICE double team_row_sums(double group_sum, uint32_t first, uint32_t warps, double* room) {
  const uint32_t lane = threadIdx.x % 32;
  double sum = group_sum + hopper::shuffle_xor(group_sum, 8);
  sum += hopper::shuffle_xor(sum, 16);
  if (warps == 1) return sum;
  if (lane < kRows) room[threadIdx.x / 32 * kRows + lane] = sum;
  hopper::barrier_sync<0>(blockDim.x);
  sum = 0;
  for (uint32_t warp = first; warp < first + warps; ++warp) sum += room[warp * kRows + lane % kRows];
  return sum;
}

// A value that lane l has for row l % 4, for all 4 rows.
HOPPER_DEVICE void spread_rows(float mine, float (&rows)[kRows]) {
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    rows[r] = hopper::bits_float(hopper::shuffle(hopper::float_bits(mine), (threadIdx.x & 24) + r));
  }
}

}  // namespace quantize_kernels
