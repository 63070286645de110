// RMSNorm backward. A block takes 8 rows at a time, in two halves of 4 with the thread map of the forward kernel; it goes
// on with the next 8 while its own copies of them are under way (cp.async, each thread for itself: no barrier).
//
//   half h:  wait for own copies -> registers | copies of half h + 1 start | products dy x: with weight and over columns
//            to dot, with rstd and over 4 rows to the quad | one barrier | dx -> store
//   after two halves: quad + quad (in shared memory), the fp32 sum over 8 rows, joins the block's fp64 sums of its columns
//
// Those sums lie in shared memory, or in the workspace where that is full; only their own thread touches them. In the
// end every block leaves one row of the workspace, and a second kernel adds the rows up in order.
#pragma once

#include "../quantize/own_patches.cuh"
#include "../quantize/row_sums.cuh"
#include "weight.cuh"

namespace norm_kernels {

struct NormBackwardParams {
  Source dy, x, dresidual;       // dresidual.data: null without
  int64_t rows, columns;
  uint32_t tiles;
  WeightRow weight;
  float width;
  const float* rstd;
  void* dx;
  double* workspace;             // [gridDim.x, workspace_stride]
  int64_t workspace_stride;
  bool sums_in_shared;
};

constexpr int kBackwardThreads = 512;
constexpr uint32_t kBackwardTiles = kBackwardThreads / 8;
constexpr int kHalves = 2;                        // of 4 rows: 8 rows are the group of docs/numerics.md

// Bytes of shared memory of a block: copies of dy and x, quads of the first half, sums of rows (halves alternate); and, if
// there is room, the sums of columns.
constexpr size_t backward_room(int threads) { return size_t{kHalves} * threads / 32 * kRows * sizeof(double); }
constexpr size_t backward_bytes(int threads) {
  return OwnPatches<bf16>::bytes(2, threads) + size_t{kColumns} * threads * sizeof(float) + backward_room(threads);
}
constexpr size_t backward_sums(int threads) { return size_t{kColumns} * threads * sizeof(double); }

// For 4 of a thread's columns, from `first` on: fours[r], the sum of (dy x) weight along row r, and quad[i], that of
// (dy x) rstd over the 4 rows. No more at a time: both patches lie in registers.
HOPPER_DEVICE void reduce_products(const Patch<bf16>& dy, const Patch<bf16>& x, int first, const float (&w)[4],
                                   const float (&rstd)[kRows], float (&fours)[kRows], float (&quad)[4]) {
  using hopper::add_rn;
  float third[4];
  HOPPER_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float weighted[4];
    HOPPER_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float product = hopper::mul_rn(dy.value(r, first + i), x.value(r, first + i));
      const float term = hopper::mul_rn(product, rstd[r]);
      weighted[i] = hopper::mul_rn(product, w[i]);
      if (r == 0) quad[i] = term;
      if (r == 1) quad[i] = add_rn(quad[i], term);
      if (r == 2) third[i] = term;
      if (r == 3) quad[i] = add_rn(quad[i], add_rn(third[i], term));
    }
    fours[r] = add_rn(add_rn(weighted[0], weighted[1]), add_rn(weighted[2], weighted[3]));
  }
}

// ((dy w) + (x c)) rstd [+ dresidual], c = -(dot rstd^2) / width.
HOPPER_DEVICE float norm_gradient(float dy, float x, float w, float c, float rstd) {
  return hopper::mul_rn(hopper::add_rn(hopper::mul_rn(dy, w), hopper::mul_rn(x, c)), rstd);
}
HOPPER_DEVICE float coefficient(double dot, float rstd, float width) {
  return -hopper::div_rn(hopper::mul_rn(static_cast<float>(dot), hopper::mul_rn(rstd, rstd)), width);
}

HOPPER_KERNEL(kBackwardThreads) rms_norm_backward_kernel(const NormBackwardParams p) {
  using P = Patch<bf16>;
  constexpr int kPiece = P::kPiece;
  const OwnPatches<bf16> copies{reinterpret_cast<uint4*>(hopper::dynamic_smem())};
  const uint32_t threads = blockDim.x, warps = threads / 32, tile = threadIdx.x / 8;
  // Column sums lie by warps, [warps][16][32], so that a thread's addresses differ by constants.
  const uint32_t own_columns = threadIdx.x / 32 * 32 * kColumns + threadIdx.x % 32;
  auto* quads_of_block = static_cast<float*>(copies.end(2));
  auto* room = reinterpret_cast<double*>(quads_of_block + kColumns * threads);             // [2][warps][4]
  float* quads = quads_of_block + own_columns;
  double* partial = p.workspace + blockIdx.x * p.workspace_stride + own_columns;
  double* sums = p.sums_in_shared ? room + kHalves * warps * kRows + own_columns : partial;
  Place at;
  at.group = 0;
  const int64_t column = int64_t{tile} * kTile;
  const int columns = tile < p.tiles ? static_cast<int>(p.columns - column < kTile ? p.columns - column : kTile) : 0;
  const auto window = [&](int64_t half) {
    const int64_t row = half * kRows, left = p.rows - row;
    return Window{row, column, columns > 0 && left > 0 ? static_cast<int>(left < kRows ? left : kRows) : 0, columns};
  };
  int64_t half = int64_t{blockIdx.x} * kHalves;          // the block's halves: pairs, gridDim.x pairs apart
  const auto start_copies = [&] {
    copies.start_copy(0, p.dy, window(half), at);
    copies.start_copy(1, p.x, window(half), at);
    hopper::cp_async_commit();
  };

  hopper::grid_dependency_wait();
  start_copies();
  for (bool later = false; half * kRows < p.rows; later = true) {
    for (int h = 0; h < kHalves; ++h) {
      const Window here = window(half);
      P dy, x;
      hopper::cp_async_wait<0>();
      copies.take(0, dy);
      copies.take(1, x);
      half += h == 0 ? 1 : int64_t{gridDim.x} * kHalves - 1;
      if (h == 0 || half * kRows < p.rows) start_copies();

      const int64_t row = here.row + at.lane % kRows;
      const float mine = row < p.rows ? p.rstd[row] : 0.0f;
      float rstd[kRows], c[kRows];
      spread_rows(mine, rstd);
      double own[kRows] = {0, 0, 0, 0};
      float left_fours[kRows];
      HOPPER_UNROLL
      for (int first = 0; first < kColumns; first += 4) {
        const int begin = P::column(first, at.lane);
        float w[4], fours[kRows], quad[4];
        load_weight<4, true>(p.weight, column + begin, columns - begin, w);
        reduce_products(dy, x, first, w, rstd, fours, quad);
        HOPPER_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (first % 8 == 0) left_fours[r] = fours[r];
          else own[r] += static_cast<double>(hopper::add_rn(left_fours[r], fours[r]));
        }
        HOPPER_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int index = 32 * (first + i);
          quads[index] = h == 0 ? quad[i] : hopper::add_rn(quads[index], quad[i]);
        }
      }
      const double dot = team_row_sums(group_row_sums(own, at.lane), 0, warps, room + h * warps * kRows);
      spread_rows(coefficient(dot, mine, p.width), c);

      const auto* added = static_cast<const bf16*>(p.dresidual.data) + here.row * p.dresidual.row_stride + column;
      auto* dx = static_cast<bf16*>(p.dx) + here.row * p.columns + column;
      HOPPER_UNROLL
      for (int first = 0; first < kColumns; first += kPiece) {
        const int begin = P::column(first, at.lane);
        if (begin >= columns) continue;
        float w[kPiece];
        load_weight<kPiece, true>(p.weight, column + begin, kPiece, w);
        HOPPER_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (r >= here.rows) continue;
          uint4 old{0, 0, 0, 0};
          if (p.dresidual.data) old = hopper::load_vector<uint4>(added + r * p.dresidual.row_stride + begin);
          const uint32_t olds[4] = {old.x, old.y, old.z, old.w};
          uint32_t words[4];
          HOPPER_UNROLL
          for (int i = 0; i < kPiece; i += 2) {
            float2 g{norm_gradient(dy.value(r, first + i), x.value(r, first + i), w[i], c[r], rstd[r]),
                     norm_gradient(dy.value(r, first + i + 1), x.value(r, first + i + 1), w[i + 1], c[r], rstd[r])};
            if (p.dresidual.data) {
              const float2 more = hopper::bf16x2_to_float2(olds[i / 2]);
              g.x = hopper::add_rn(g.x, more.x), g.y = hopper::add_rn(g.y, more.y);
            }
            words[i / 2] = hopper::pack_bf16(g.x, g.y);
          }
          hopper::store_vector(dx + r * p.columns + begin, uint4{words[0], words[1], words[2], words[3]});
        }
      }
    }
    HOPPER_UNROLL
    for (int i = 0; i < kColumns; ++i) {   // here, where the patches' registers are free again
      const double eight = quads[32 * i];
      sums[32 * i] = later ? sums[32 * i] + eight : eight;
    }
  }
  hopper::grid_dependency_launch();
  if (!p.sums_in_shared) return;
  HOPPER_UNROLL
  for (int i = 0; i < kColumns; ++i) partial[32 * i] = sums[32 * i];
}

// Any type, any row length, any strides: single elements, a thread a column, rows read twice. Right everywhere, fast nowhere.
constexpr int kAnyThreads = 256;

template <class T>
HOPPER_KERNEL(kAnyThreads) rms_norm_backward_any_kernel(const NormBackwardParams p) {
  constexpr int kEight = kHalves * kRows;
  const auto load = [&](const Source& s, int64_t row, int64_t c) {
    const T value = static_cast<const T*>(s.data)[row * s.row_stride + c * s.column_stride];
    if constexpr (sizeof(T) == 2) return hopper::to_float(value);
    else return value;
  };
  const auto weight = [&](int64_t c) {
    float w[1];
    load_weight<1, false>(p.weight, c, 1, w);
    return w[0];
  };
  auto* room = reinterpret_cast<double*>(hopper::dynamic_smem());   // [8][warps]
  const int64_t padded = (p.columns + 31) / 32 * 32;               // whole warps: neighbours are summed by shuffles
  double* sums = p.workspace + blockIdx.x * p.workspace_stride;

  hopper::grid_dependency_wait();
  for (int64_t row = int64_t{blockIdx.x} * kEight; row < p.rows; row += int64_t{gridDim.x} * kEight) {
    double own[kEight] = {};
    for (int64_t c = threadIdx.x; c < padded; c += blockDim.x) {
      float terms[kEight];
      HOPPER_UNROLL
      for (int r = 0; r < kEight; ++r) {
        const bool exists = row + r < p.rows && c < p.columns;
        const float product = exists ? hopper::mul_rn(load(p.dy, row + r, c), load(p.x, row + r, c)) : 0.0f;
        terms[r] = exists ? hopper::mul_rn(product, p.rstd[row + r]) : 0.0f;
        float eight = exists ? hopper::mul_rn(product, weight(c)) : 0.0f;
        HOPPER_UNROLL
        for (int bits = 1; bits < 8; bits *= 2) eight = hopper::add_rn(eight, hopper::shuffle_xor(eight, bits));
        if (threadIdx.x % 8 == 0) own[r] += eight;
      }
      if (c >= p.columns) continue;
      const double eight = sum_of_8(terms);
      sums[c] = row < int64_t{gridDim.x} * kEight ? eight : sums[c] + eight;
    }
    float c_of[kEight];
    HOPPER_UNROLL
    for (int r = 0; r < kEight; ++r) {
      const double dot = block_sum(own[r], room + r * (blockDim.x / 32));
      c_of[r] = row + r < p.rows ? coefficient(dot, p.rstd[row + r], p.width) : 0.0f;
    }
    for (int64_t c = threadIdx.x; c < p.columns; c += blockDim.x) {
      HOPPER_UNROLL
      for (int r = 0; r < kEight; ++r) {
        if (row + r >= p.rows) continue;
        float value = norm_gradient(load(p.dy, row + r, c), load(p.x, row + r, c), weight(c), c_of[r], p.rstd[row + r]);
        if (p.dresidual.data) value = hopper::add_rn(value, load(p.dresidual, row + r, c));
        T* to = static_cast<T*>(p.dx) + (row + r) * p.columns + c;
        if constexpr (sizeof(T) == 2) *to = hopper::to_bf16(value);
        else *to = value;
      }
    }
    hopper::block_sync();        // before the room is written again
  }
  hopper::grid_dependency_launch();
}

// ---- the second stage ------------------------------------------------------------------------------------------------

struct WeightSumParams {
  const double* workspace;       // [parts, stride]
  int64_t parts, stride, columns;
  bool by_patches;               // in which order a row of the workspace lies: by columns, or as patches hold them
  void* dweight;
  bool bf16;
};

constexpr int kSumLanes = 8;     // rows of the workspace that are read at the same time

HOPPER_KERNEL(32 * kSumLanes) sum_weight_gradient_kernel(const WeightSumParams p) {
  auto* room = reinterpret_cast<double*>(hopper::dynamic_smem());   // [kSumLanes][32]
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t index = int64_t{blockIdx.x} * 32 + lane;
  hopper::grid_dependency_wait();
  double sum = 0;
  if (index < p.stride) {
    HOPPER_UNROLL
    for (int64_t part = warp; part < p.parts; part += kSumLanes) sum += p.workspace[part * p.stride + index];
  }
  hopper::grid_dependency_launch();
  room[threadIdx.x] = sum;
  hopper::barrier_sync<0>(32 * kSumLanes);
  if (warp != 0) return;
  sum = 0;
  HOPPER_UNROLL
  for (int w = 0; w < kSumLanes; ++w) sum += room[w * 32 + lane];
  int64_t column = index;
  if (p.by_patches) {            // [warps][16][32]: the thread's i-th column
    const auto i = static_cast<int>(index / 32 % kColumns), thread = static_cast<int>(lane);
    column = (index / (32 * kColumns) * 4 + thread / 8) * kTile + Patch<bf16>::column(i, thread % 8);
  }
  if (column >= p.columns) return;
  const auto value = static_cast<float>(sum);
  if (p.bf16) {
    static_cast<hopper::bf16*>(p.dweight)[column] = hopper::to_bf16(value);
  } else {
    static_cast<float*>(p.dweight)[column] = value;
  }
}

}  // namespace norm_kernels
