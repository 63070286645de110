// The accumulators of one math warpgroup: fp32 sums in registers, a partial sum that the tensor core writes, the
// promotion that joins them, and the ways out to memory.
//
// Why promotion: an FP8 wgmma keeps about 14 bits and truncates, so its error grows with K (report 3.3.2). Every 128
// of K the partial sum is multiplied by the scales of its slice and added to the fp32 sums by FFMA, once rounded.
//
// Who owns what (PTX ISA, "wgmma .m64nNk32, accumulator D"): warp w of the group has rows 16w .. 16w+15. Its lane l
// holds, for each 8 columns i,
//
//   register 4i + 0, 4i + 1    row l / 4        columns 8i + 2 (l % 4) + 0, 1
//   register 4i + 2, 4i + 3    row l / 4 + 8    the same columns
#pragma once

#include <type_traits>

#include "../hopper/front.h"
#include "shared_tile.h"

// Scales of one wave for one thread: rows l / 4 and l / 4 + 8, left and right of a border between two scale blocks.
struct WaveScales {
  float left[2], right[2];
  int32_t border;   // column of the wave where the right block begins; anything >= Columns: nowhere
};

// Where the scale of a column lies among those of its 16 columns: the thread l % 4 = q owns columns 2q, 2q + 1 and
// 8 + 2q, 8 + 2q + 1 and finds them side by side from 4q on. Pairs of columns stay pairs.
HOPPER_DEVICE int32_t owner_order(int32_t column) {
  return (column & ~15) | (column & 6) << 1 | (column & 8) >> 2 | (column & 1);
}

template <int Waves, int Columns>
struct Accumulator {
  static_assert(Columns % 16 == 0 && Columns <= 256, "wgmma takes multiples of 8 columns, stmatrix pairs of them");
  static constexpr int kWaves = Waves, kColumns = Columns, kRegisters = Columns / 2;

  float sum[Waves][kRegisters];
  float partial[kRegisters];   // owned by the tensor core from issue to wait

  HOPPER_DEVICE void clear() {
    HOPPER_UNROLL for (int wave = 0; wave < Waves; ++wave)
      HOPPER_UNROLL for (int i = 0; i < kRegisters; ++i) sum[wave][i] = 0.0f;
  }

  // sum = fma(partial, scale, sum). A border can only lie at multiples of BorderStep (0: nowhere), so that choosing
  // the side costs two selects per possible border and nothing per column.
  template <int BorderStep>
  HOPPER_DEVICE void promote(int wave, const WaveScales& scales, hopper::Site site = HOPPER_HERE) {
    if (hopper::dropped("promotion", site)) return;   // a mutation run of the emulator; constant false on Hopper
    float upper = scales.left[0], lower = scales.left[1];
    HOPPER_UNROLL for (int i = 0; i < Columns / 8; ++i) {
      if constexpr (BorderStep != 0) {
        if (i > 0 && 8 * i % BorderStep == 0) {
          upper = 8 * i == scales.border ? scales.right[0] : upper;
          lower = 8 * i == scales.border ? scales.right[1] : lower;
        }
      }
      HOPPER_UNROLL for (int j = 0; j < 4; ++j) {
        const int r = 4 * i + j;
        sum[wave][r] = hopper::fma(partial[r], j < 2 ? upper : lower, sum[wave][r]);
      }
    }
  }

  // sum = fma(partial, row * column, sum) with a scale for each column, which lie in shared memory in the order in which
  // threads own columns (owner_order): a thread reads those of four columns by 16 bytes, and the lanes of a quad read 64
  // bytes without a bank conflict. `columns` is of the thread's first four: row scales of rows l / 4 and l / 4 + 8.
  HOPPER_DEVICE void promote_columns(int wave, float upper, float lower, const float* columns,
                                     hopper::Site site = HOPPER_HERE) {
    if (hopper::dropped("promotion", site)) return;
    HOPPER_UNROLL for (int i = 0; i < Columns / 16; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(columns + 16 * i);
      const float scale[] = {four.x, four.y, four.z, four.w};
      HOPPER_UNROLL for (int j = 0; j < 8; ++j) {
        const int r = 8 * i + j;
        const float s = hopper::mul_rn(j % 4 < 2 ? upper : lower, scale[j / 4 * 2 + j % 2]);
        sum[wave][r] = hopper::fma(partial[r], s, sum[wave][r]);
      }
    }
  }

  // bf16, to a tile in shared memory that TMA stores: four 8x8 matrices of 16 rows and 16 columns at a time. Lane l
  // gives the address of row l % 8 of matrix l / 8: bit 3 picks the lower 8 rows, bit 4 the right 8 columns.
  template <class Tile>
  HOPPER_DEVICE void stage_bf16(int wave, Tile& tile, uint32_t row, uint32_t column, hopper::Site site = HOPPER_HERE) {
    const uint32_t lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
    const float* values = sum[wave];
    HOPPER_UNROLL for (int i = 0; i < Columns / 8; i += 2) {
      uint32_t words[4];
      HOPPER_UNROLL for (int j = 0; j < 4; ++j)
        words[j] = hopper::pack_bf16(values[4 * i + 2 * j], values[4 * i + 2 * j + 1]);
      hopper::stmatrix<4>(tile.chunk(row + warp_row + lane % 16, column + 8 * i + lane / 16 * 8), words, site);
    }
  }
};

// A matrix in global memory that threads read and write themselves: any stride, any alignment, ragged edges.
// Each quad of lanes covers 8 neighbouring columns, for fp32 one full 32-byte sector.
template <class T>
struct GlobalRows {
  T* base;
  int64_t stride;          // elements between rows
  int32_t rows, columns;   // that exist
  bool paired;             // every (row, even column) is aligned to two elements

  static HOPPER_DEVICE float to_float(float x) { return x; }
  static HOPPER_DEVICE float to_float(hopper::bf16 x) { return hopper::to_float(x); }
  static HOPPER_DEVICE void set(float& to, float x) { to = x; }
  static HOPPER_DEVICE void set(hopper::bf16& to, float x) { to = hopper::to_bf16(x); }

  // values += the old content
  template <int Columns>
  HOPPER_DEVICE void add_to(float (&values)[Columns / 2], int32_t row, int32_t column) const {
    each<Columns>(
        row, column,
        [&](int i, const T* at) {
          const Pair old = *reinterpret_cast<const Pair*>(at);
          values[i] = to_float(old.x) + values[i];
          values[i + 1] = to_float(old.y) + values[i + 1];
        },
        [&](int i, const T* at) { values[i] = to_float(*at) + values[i]; });
  }

  template <int Columns>
  HOPPER_DEVICE void store(const float (&values)[Columns / 2], int32_t row, int32_t column) const {
    each<Columns>(
        row, column,
        [&](int i, T* at) {
          Pair pair;
          set(pair.x, values[i]);
          set(pair.y, values[i + 1]);
          *reinterpret_cast<Pair*>(at) = pair;
        },
        [&](int i, T* at) { set(*at, values[i]); });
  }

 private:
  struct alignas(2 * sizeof(T)) Pair { T x, y; };

  // Calls pair(register, pointer) for the pairs of a thread's columns where all Columns exist and are aligned, and
  // element(register, pointer) for each element that exists otherwise: at the right edge, or in a matrix of odd stride.
  template <int Columns, class PairVisit, class ElementVisit>
  HOPPER_DEVICE void each(int32_t row, int32_t column, PairVisit pair, ElementVisit element) const {
    const int32_t lane = threadIdx.x % 32, first = column + lane % 4 * 2;
    const bool whole = paired && column + Columns <= columns;
    HOPPER_UNROLL for (int half = 0; half < 2; ++half) {
      const int32_t r = row + static_cast<int32_t>(threadIdx.x % 128 / 32 * 16) + lane / 4 + 8 * half;
      if (r >= rows) continue;
      T* at = base + r * stride + first;
      if (whole) {
        HOPPER_UNROLL for (int i = 0; i < Columns / 8; ++i) pair(4 * i + 2 * half, at + 8 * i);
      } else {
        HOPPER_UNROLL for (int i = 0; i < Columns / 4; ++i) {
          const int offset = i / 2 * 8 + i % 2;
          if (first + offset < columns) element(i / 2 * 4 + 2 * half + i % 2, at + offset);
        }
      }
    }
  }
};
