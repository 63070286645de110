// bf16 GEMM with operands of any major: one product, groups of rows, groups of K; persistent, warp-specialised.
// The schedule is drawn in README.md beside this file. Read kernel, producer, math, epilogue in this order.
#pragma once

#include "../common/accumulator.h"
#include "../common/operand_tile.h"
#include "../common/pipeline.h"
#include "../common/roles.h"
#include "../common/shared_tile.h"
#include "bf16_work.h"

namespace bf16_gemm_kernels {

using hopper::bf16;
using hopper::Major;
using hopper::Operand;
using hopper::Swizzle;
using hopper::TensorMap;

constexpr int kSmemLimit = 232448;          // 227 KiB, what a block of sm_90 may use
constexpr int kMaxStages = 8;
constexpr int kPiece = 64;                  // rows and columns of D that leave at a time

template <int TileRows, int TileColumns, Major MajorA, Major MajorB, int Cluster>
struct Config {
  static constexpr int kTileRows = TileRows, kTileColumns = TileColumns, kCluster = Cluster;
  using Role = Roles<2, 56, 224>;   // the walk over groups and the loads by panels want more than 40

  // A math group's part: half of the rows; of a tile that is one wgmma tall, half of the columns. A wave is 64 rows.
  static constexpr int kGroupRows = TileRows == 64 ? 64 : TileRows / 2;
  static constexpr int kGroupColumns = TileRows == 64 ? TileColumns / 2 : TileColumns;
  static constexpr int kWaves = kGroupRows / 64, kWaveRegisters = kGroupColumns / 2;
  using Multiply = hopper::Wgmma<kGroupColumns, Operand::bf16, Operand::bf16, MajorA, MajorB>;
  using Sums = float[kWaves][kWaveRegisters];

  using A = OperandTile<TileRows, MajorA>;
  using B = OperandTile<TileColumns, MajorB>;
  using Staging = SharedTile<bf16, kPiece, kPiece, Swizzle::b128>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kStagingBytes = Role::kMathGroups * 2 * static_cast<int>(sizeof(Staging));
  static constexpr int kFitting = (kSmemLimit - kStagingBytes - 1024) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static_assert(kStages >= 4, "two slices in the tensor core and two on their way");

  struct Shared {
    A a[kStages];
    B b[kStages];
    Staging staging[Role::kMathGroups][2];
    Pipeline<kStages> pipeline;
  };
  static_assert(sizeof(Shared) <= kSmemLimit, "the stages and the staging must fit into shared memory");
  static_assert(kWaves * kWaveRegisters + 48 <= 224, "sums and 48 registers for addresses must fit into a math thread");
};

struct Params {
  WorkList work;
  int32_t m, n;               // of D, or of each D[g]
  int32_t matrices;           // of D
  void* d;
  int64_t d_stride, d_matrix_stride;
  bool fp32;                  // D's type; otherwise bf16
  bool accumulate;
  bool tma_store;             // D is bf16 and aligned for TMA
  bool paired_store;          // D is aligned to pairs of elements
  uint8_t clear_bytes;        // 0: rows that no group owns stay as they are; else they become zero, so many bytes at a time
  Multicast multicast;
};

// The matrix of D that a tile belongs to.
template <class T>
HOPPER_DEVICE GlobalRows<T> rows_of(const Params& p, const Work& work) {
  T* base = static_cast<T*>(p.d) + work.d_matrix * p.d_matrix_stride;
  return {base, p.d_stride, work.tile.row_end, p.n, p.paired_store};
}

// One elected lane keeps the ring full. In a cluster each CTA loads one half of the shared operand into both.
template <class C>
HOPPER_DEVICE void producer(typename C::Shared& shared, const TensorMap& map_a, const TensorMap& map_b, const Params& p) {
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const bool share_a = C::kCluster > 1 && p.multicast == Multicast::a;
  const bool share_b = C::kCluster > 1 && p.multicast == Multicast::b;
  const uint16_t everyone = (1 << C::kCluster) - 1, mask_a = share_a ? everyone : 0, mask_b = share_b ? everyone : 0;
  const int32_t parts_a = share_a ? C::kCluster : 1, parts_b = share_b ? C::kCluster : 1;
  const int32_t part_a = share_a ? rank : 0, part_b = share_b ? rank : 0;
  auto& pipeline = shared.pipeline;
  typename Pipeline<C::kStages>::Cursor cursor;
  WorkList list = p.work;
  Work work;
  for (uint32_t i = blockIdx.x / C::kCluster; list.find(i, rank, work); i += gridDim.x / C::kCluster) {
    for (int32_t k = work.k_begin; k < work.k_end; k += kOperandSlice, cursor.advance()) {
      const uint32_t stage = cursor.stage;
      pipeline.acquire(cursor);
      pipeline.expect(cursor, C::kStageBytes);
      hopper::Mbarrier* full = pipeline.full_barrier(cursor);
      shared.a[stage].load(map_a, full, work.tile.row, k, work.a_matrix, part_a, parts_a, mask_a);
      shared.b[stage].load(map_b, full, work.tile.column, k, work.b_matrix, part_b, parts_b, mask_b);
    }
  }
  // The last loads are on their way: the next kernel may come and set itself up where this one leaves room.
  hopper::grid_dependency_launch();
}

template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const TensorMap& map_d, const Params& p, const Work& work,
                            typename C::Sums& sums, uint32_t group, uint32_t& buffer);

// The last slice of a group of K reaches into the next group's, which may hold anything: 0 * NaN is NaN, so that both
// operands get zeros there. Both math groups work on all of it, for both read B.
template <class C>
HOPPER_DEVICE void clear_tail(typename C::Shared& shared, uint32_t stage, int32_t valid) {
  shared.a[stage].clear_past(valid, threadIdx.x, 32 * C::Role::kMathWarps);
  shared.b[stage].clear_past(valid, threadIdx.x, 32 * C::Role::kMathWarps);
  hopper::fence_proxy_async<hopper::Space::shared>();
  hopper::barrier_sync<3>(32 * C::Role::kMathWarps);
}

// A math group multiplies its part of each tile, one slice in the tensor core while the next is issued.
template <class C>
HOPPER_DEVICE void math(typename C::Shared& shared, const TensorMap& map_d, const Params& p, uint32_t group) {
  const uint32_t rank = C::kCluster == 1 ? 0 : hopper::cluster_rank();
  const int32_t group_row = C::kTileRows == C::kGroupRows ? 0 : group * C::kGroupRows;
  const int32_t group_column = C::kTileColumns == C::kGroupColumns ? 0 : group * C::kGroupColumns;
  auto& pipeline = shared.pipeline;
  typename Pipeline<C::kStages>::Cursor cursor, previous;
  uint32_t buffer = 0;
  WorkList list = p.work;
  Work work;
  for (uint32_t i = blockIdx.x / C::kCluster; list.find(i, rank, work); i += gridDim.x / C::kCluster) {
    if (work.empty_group && p.accumulate) continue;
    typename C::Sums sums;
    HOPPER_UNROLL for (int wave = 0; wave < C::kWaves; ++wave)
      HOPPER_UNROLL for (int j = 0; j < C::kWaveRegisters; ++j) sums[wave][j] = 0.0f;
    for (int32_t k = work.k_begin; k < work.k_end; k += kOperandSlice) {
      pipeline.wait(cursor);
      // Past the end of the whole tensor TMA has filled in zeros already.
      if (k + kOperandSlice > work.k_end && work.k_end < p.work.k) clear_tail<C>(shared, cursor.stage, work.k_end - k);
      const uint64_t b = shared.b[cursor.stage].matrix(group_column);
      hopper::wgmma_fence();
      HOPPER_UNROLL for (int step = 0; step < kOperandSlice / kOperandStep; ++step) {
        HOPPER_UNROLL for (int wave = 0; wave < C::kWaves; ++wave) {
          const uint64_t a = shared.a[cursor.stage].matrix(group_row + 64 * wave);
          C::Multiply::issue(sums[wave], hopper::advance(a, step * C::A::kStepBytes),
                             hopper::advance(b, step * C::B::kStepBytes), true);
        }
      }
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();   // the previous slice is done with its stage
      if (k != work.k_begin) pipeline.template release<C::kCluster>(previous);
      previous = cursor;
      cursor.advance();
    }
    hopper::wgmma_wait<0>();
    HOPPER_UNROLL for (int wave = 0; wave < C::kWaves; ++wave) hopper::register_fence(sums[wave]);
    if (work.k_begin != work.k_end) pipeline.template release<C::kCluster>(previous);
    epilogue<C>(shared, map_d, p, work, sums, group, buffer);
  }
}

// 64 x 64 of D through shared memory: registers, stmatrix, TMA. Two buffers, so that one leaves while the other fills.
template <class C, int First>
HOPPER_DEVICE void store_piece(typename C::Staging& staging, const TensorMap& map_d, const Params& p,
                               const float (&values)[C::kWaveRegisters], uint32_t group, int32_t row, int32_t column,
                               int32_t matrix) {
  const bool storer = threadIdx.x % 128 == 0;
  const uint32_t lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
  if (storer) hopper::bulk_wait_read<1>();   // the piece before the last has left this buffer
  math_group_sync(group);
  HOPPER_UNROLL for (int i = 0; i < kPiece / 8; i += 2) {   // lanes give rows as in Accumulator::stage_bf16
    uint32_t words[4];
    HOPPER_UNROLL for (int j = 0; j < 4; ++j)
      words[j] = hopper::pack_bf16(values[First + 4 * i + 2 * j], values[First + 4 * i + 2 * j + 1]);
    hopper::stmatrix<4>(staging.chunk(warp_row + lane % 16, 8 * i + lane / 16 * 8), words);
  }
  // Each writer: its writes to the staging before the TMA store reads them, its reads of D before it overwrites them.
  if (p.accumulate) {
    hopper::fence_proxy_async<hopper::Space::all>();
  } else {
    hopper::fence_proxy_async<hopper::Space::shared>();
  }
  math_group_sync(group);
  if (storer) {
    hopper::tma_store(map_d, staging.data, {column, row, matrix});
    hopper::bulk_commit();
  }
}

template <class C, int Piece = 0>
HOPPER_DEVICE void store_pieces(typename C::Shared& shared, const TensorMap& map_d, const Params& p,
                                const float (&values)[C::kWaveRegisters], uint32_t group, int32_t row, int32_t column,
                                int32_t matrix, uint32_t& buffer) {
  if constexpr (Piece * kPiece < C::kGroupColumns) {
    store_piece<C, Piece * kPiece / 2>(shared.staging[group][buffer], map_d, p, values, group, row,
                                       column + Piece * kPiece, matrix);
    buffer ^= 1;
    store_pieces<C, Piece + 1>(shared, map_d, p, values, group, row, column, matrix, buffer);
  }
}

// D leaves while the next tile's slices are already landing.
template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const TensorMap& map_d, const Params& p, const Work& work,
                            typename C::Sums& sums, uint32_t group, uint32_t& buffer) {
  constexpr int kColumns = C::kGroupColumns;
  const int32_t column = work.tile.column + (C::kTileColumns == kColumns ? 0 : group * kColumns);
  HOPPER_UNROLL for (int wave = 0; wave < C::kWaves; ++wave) {
    const int32_t row = work.tile.row + (C::kTileRows == C::kGroupRows ? 0 : group * C::kGroupRows) + 64 * wave;
    if (p.fp32) {
      const GlobalRows<float> d = rows_of<float>(p, work);
      if (p.accumulate) d.template add_to<kColumns>(sums[wave], row, column);
      d.template store<kColumns>(sums[wave], row, column);
      continue;
    }
    const GlobalRows<bf16> d = rows_of<bf16>(p, work);
    if (p.accumulate) d.template add_to<kColumns>(sums[wave], row, column);
    // TMA clips at the end of the matrix; the end of a group of rows is none to it.
    if (p.tma_store && (work.tile.row_end == p.m || row + 64 <= work.tile.row_end)) {
      store_pieces<C>(shared, map_d, p, sums[wave], group, row, column, work.d_matrix, buffer);
    } else {
      d.template store<kColumns>(sums[wave], row, column);
    }
  }
}

template <class Unit>
HOPPER_DEVICE void clear_row(uint8_t* row, int64_t bytes, uint32_t thread, uint32_t threads) {
  for (int64_t i = thread * sizeof(Unit); i < bytes; i += threads * sizeof(Unit)) *reinterpret_cast<Unit*>(row + i) = Unit{};
}

// Rows of a fresh D that no group owns, by the producer's idle warps.
template <class C>
HOPPER_DEVICE void clear_rest(const Params& p) {
  const uint32_t threads = 96, thread = threadIdx.x - (C::Role::kThreads - threads);
  const int64_t size = p.fp32 ? 4 : 2, rows = int64_t{p.m} * p.matrices;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const auto matrix = static_cast<int32_t>(i / p.m), row = static_cast<int32_t>(i % p.m);
    if (p.work.owned(matrix, row)) continue;
    uint8_t* at = static_cast<uint8_t*>(p.d) + (matrix * p.d_matrix_stride + row * p.d_stride) * size;
    if (p.clear_bytes == 16) clear_row<uint4>(at, p.n * size, thread, threads);
    else if (p.clear_bytes == 4) clear_row<uint32_t>(at, p.n * size, thread, threads);
    else clear_row<uint16_t>(at, p.n * size, thread, threads);
  }
}

template <class C>
HOPPER_KERNEL(C::Role::kThreads)
bf16_gemm_kernel(HOPPER_GRID_CONSTANT const TensorMap map_a, HOPPER_GRID_CONSTANT const TensorMap map_b,
                 HOPPER_GRID_CONSTANT const TensorMap map_d, HOPPER_GRID_CONSTANT const Params p) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(hopper::dynamic_smem());
  const uint32_t warp = C::Role::warp(), group = warp / 4;
  if (threadIdx.x == 0) shared.pipeline.init(C::Role::kMathWarps * C::kCluster);
  if constexpr (C::kCluster > 1) {
    hopper::cluster_sync();
  } else {
    hopper::block_sync();
  }
  hopper::grid_dependency_wait();   // before the first global access: the previous kernel may have written A or read D

  if (group == C::Role::kMathGroups) {
    C::Role::become_producer();
    if (warp != C::Role::kMathWarps) {
      if (p.clear_bytes != 0) clear_rest<C>(p);
    } else if (hopper::elect_one()) {
      producer<C>(shared, map_a, map_b, p);
    }
  } else {
    C::Role::become_math();
    math<C>(shared, map_d, p, group);
    if (threadIdx.x % 128 == 0) hopper::bulk_wait<0>();   // the last store still reads shared memory
  }
  drain_cluster<C::kCluster>();
}

}  // namespace bf16_gemm_kernels
