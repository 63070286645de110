// The L2 norm over a list of tensors, and the factor that clips it, in two stages of fixed order.
//
//   grad_norm_kernel    kNormPartials blocks at most, each a fixed set of chunks; one fp64 sum of squares a block
//   clip_scale_kernel   one block: the sum of those, its root, the factor
//
// Squares of fp32 and bf16 are exact in fp64 and cannot overflow there. Nothing depends on the number of SMs.
#pragma once

#include "../common/sums.h"
#include "optimizer.h"
#include "tensor_table.h"

namespace optimizer_kernels {

using hopper::bf16;
using optimizer::Type;

constexpr int kNormThreads = 256;
constexpr int kPieces = 4;                                      // of 16 bytes that a thread loads at once
constexpr int kNormChunkBytes = kNormThreads * kPieces * 16;

struct NormEntry {
  const void* data;
  int64_t count;
  Type type;
};

struct NormParams {
  TensorTable<NormEntry, 144> table;
  double* partials;              // one a block
  bool first;                    // of several launches: overwrites, the others add
};
static_assert(sizeof(NormParams) <= kParameterBytes);

struct NormShared {
  double warps[kNormThreads / 32];
};

// The block's sum, in thread 0: lanes by a tree, then warps in order.
HOPPER_DEVICE double block_sum(double value, hopper::Site site = HOPPER_HERE) {
  auto& shared = *reinterpret_cast<NormShared*>(hopper::dynamic_smem());
  value = warp_sum(value, site);
  if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = value;
  hopper::barrier_sync<0>(kNormThreads, site);
  if (threadIdx.x != 0) return 0;
  double sum = 0;
  HOPPER_UNROLL for (int w = 0; w < kNormThreads / 32; ++w) sum += shared.warps[w];
  return sum;
}

template <class T>
HOPPER_DEVICE double as_double(T x) {
  if constexpr (sizeof(T) == 2) return hopper::to_float(x);
  else return x;
}

// A thread's part of a chunk, elements in ascending order: the same sum with 16-byte loads and without.
template <class T>
HOPPER_DEVICE double add_squares(double sum, const NormEntry& e, uint32_t chunk) {
  constexpr int kElements = 16 / sizeof(T);
  struct alignas(16) Piece { T values[kElements]; };
  const auto* data = static_cast<const T*>(e.data);
  const int64_t first = int64_t{chunk} * (kNormChunkBytes / sizeof(T)) + threadIdx.x * kElements;
  const bool aligned = (reinterpret_cast<uintptr_t>(data) & 15) == 0;

  Piece pieces[kPieces] = {};
  HOPPER_UNROLL for (int k = 0; k < kPieces; ++k) {
    const int64_t index = first + k * kNormThreads * kElements;
    if (aligned && index + kElements <= e.count) {
      pieces[k] = hopper::load_stream(reinterpret_cast<const Piece*>(data + index));
    } else {
      HOPPER_UNROLL for (int i = 0; i < kElements; ++i)
        if (index + i < e.count) pieces[k].values[i] = data[index + i];
    }
  }
  HOPPER_UNROLL for (int k = 0; k < kPieces; ++k)
    HOPPER_UNROLL for (int i = 0; i < kElements; ++i) {
      const double x = as_double(pieces[k].values[i]);
      sum = hopper::fma(x, x, sum);
    }
  return sum;
}

// 40 registers: 6 blocks of 16 KB in flight on an SM. The bound of 5 is the largest that ptxas keeps without a spill.
HOPPER_KERNEL_BLOCKS(kNormThreads, 5) grad_norm_kernel(HOPPER_GRID_CONSTANT const NormParams p) {
  hopper::grid_dependency_wait();
  double sum = 0;
  for (uint32_t chunk = blockIdx.x; chunk < p.table.chunks(); chunk += gridDim.x) {
    const auto place = p.table.find(chunk);
    const NormEntry& e = p.table.entries[place.entry];
    if (e.type == Type::fp32) sum = add_squares<float>(sum, e, place.chunk);
    else if (e.type == Type::bf16) sum = add_squares<bf16>(sum, e, place.chunk);
    else sum = add_squares<double>(sum, e, place.chunk);
  }
  hopper::grid_dependency_launch();
  sum = block_sum(sum);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = p.first ? sum : p.partials[blockIdx.x] + sum;
}

HOPPER_KERNEL(kNormThreads) clip_scale_kernel(const double* partials, int32_t count, float max_norm, float* norm, float* scale) {
  hopper::grid_dependency_wait();
  double sum = 0;
  for (auto i = static_cast<int32_t>(threadIdx.x); i < count; i += kNormThreads) sum += partials[i];
  hopper::grid_dependency_launch();
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const auto root = static_cast<float>(hopper::sqrt_rn(sum));
  const bool finite = (hopper::float_bits(root) & 0x7FFFFFFF) < 0x7F800000;
  *norm = root;
  *scale = !finite ? hopper::bits_float(0x7FC00000) : root > max_norm ? hopper::div_rn(max_norm, root) : 1.0f;
}

}  // namespace optimizer_kernels
