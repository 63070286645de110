// What the launchers of the FP8 GEMM family share: rules of many matrices, the choice of a tile, the launch itself.
#pragma once

#include "fp8_gemm.cuh"
#include "fp8_gemm.h"
#include "host.h"

namespace fp8_gemm_kernels {

using namespace gemm_host;

inline int64_t blocks(int64_t size) { return ceil_div(size, kScaleBlock); }

// ---- argument rules ---------------------------------------------------------------------------------------------

inline void check_matrices(const Matrices& x, uintptr_t alignment) {
  check_matrix(x, alignment);
  if (x.empty() || x.matrices == 1) return;
  require(x.group_stride >= (x.rows - 1) * x.stride + x.row, x.group_stride_name, "must be at least a whole matrix",
          x.group_stride);
  require(alignment != 16 || x.group_stride * x.element_bytes % 16 == 0, x.group_stride_name,
          "must be a multiple of 16 bytes, as TMA asks (pad the rows)", x.group_stride);
}

// The cost model's choice among `legal`, or the caller's.
template <size_t Count>
TileChoice choice_of(const Fp8GemmArguments& x, const TileProblem& problem, const TileShape (&legal)[Count]) {
  if (!x.tile) return choose_tile(problem, legal, Count);
  if (!x.multicast) return choose_tile(problem, &*x.tile, 1);
  return {*x.tile, *x.multicast, gemm_clocks(problem, *x.tile, *x.multicast)};
}

// ---- launch -----------------------------------------------------------------------------------------------------

// `tiles`: what the kernel walks. `units`: how many tiles (pairs, in a cluster) there are at most.
template <class C>
void run(const Fp8GroupedGemmArguments& x, const typename C::Tiles& tiles, int64_t units, int32_t sms,
         hopper::Stream stream) {
  using hopper::Element;
  constexpr int64_t element = sizeof(typename C::D);
  const Multicast multicast = tiles.grid.multicast;
  typename C::Params p{};
  p.tiles = tiles;
  p.scale_b = x.scale_b;
  p.scale_b_stride = x.scale_b_stride;
  p.scale_b_group_stride = x.scale_b_group_stride;
  p.scale_b_rows = static_cast<int32_t>(blocks(x.n));
  p.n = static_cast<int32_t>(x.n);
  p.slices = static_cast<int32_t>(blocks(x.k));
  p.rows = static_cast<int32_t>(x.m);
  p.d = x.d;
  p.d_stride = x.d_stride;
  p.d_group_stride = x.d_group_stride;
  p.accumulate = x.accumulate;
  p.aligned_rows = is_aligned(x.d, 16) && x.d_stride * element % 16 == 0 && x.d_group_stride * element % 16 == 0;
  p.paired_store = is_aligned(x.d, 2 * element) && x.d_stride % 2 == 0 && x.d_group_stride % 2 == 0;
  p.clear_rest = x.clear_rest;

  // Maps that the kernel will not use stay zero: TMA has no empty tensors.
  TensorMap map_a{}, map_b{}, map_scale_a{}, map_d{};
  const int32_t a_rows = C::kTileRows / (multicast == Multicast::a ? 2 : 1);
  const int32_t b_rows = C::kTileColumns / (multicast == Multicast::b ? 2 : 1);
  const int64_t many = C::kGrouped ? x.groups : 0, batch = C::kBatched ? x.groups : 0;
  if (x.k > 0 && x.groups > 0) {
    map_a = map_of(x.a, Element::u8, x.k, x.m, x.a_stride, kSliceK, a_rows, Swizzle::b128, batch, x.a_group_stride);
    map_b = map_of(x.b, Element::u8, x.k, x.n, x.b_stride, kSliceK, b_rows, Swizzle::b128, many, x.b_group_stride);
    map_scale_a = map_of(x.scale_a, Element::f32, x.m, blocks(x.k), x.scale_a_stride, a_rows, 1, Swizzle::none,
                         batch, x.scale_a_group_stride);
  }
  if constexpr (C::kStaged) {
    if (p.aligned_rows && x.groups > 0)
      map_d = map_of(x.d, Element::bf16, x.n, x.m, x.d_stride, C::Staging::kPanelColumns, C::kGroup.rows,
                     C::kStagingSwizzle, batch, x.d_group_stride);
  }
  const int64_t clusters = std::min<int64_t>(units, std::max(sms / C::kCluster, 1));
  hopper::launch(launch_config<C>("fp8_gemm", clusters, x.programmatic, stream), fp8_gemm_kernel<C>, map_a, map_b,
                 map_scale_a, map_d, p);
}

}  // namespace fp8_gemm_kernels
