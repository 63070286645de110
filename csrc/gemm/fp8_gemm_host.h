// What the launchers of the FP8 GEMM family share: argument rules, tensor maps, the launch itself.
#pragma once

#include <algorithm>
#include <string>

#include "../common/checks.h"
#include "../hopper/tensor_map.h"
#include "fp8_gemm.cuh"
#include "fp8_gemm.h"

namespace fp8_gemm_kernels {

inline constexpr int64_t kMaxSize = (int64_t{1} << 31) - 512;   // TMA coordinates are 32-bit, and a tile may reach past the end

inline int64_t blocks(int64_t size) { return ceil_div(size, kScaleBlock); }
inline int64_t bytes_of(OutputType type) { return type == OutputType::bf16 ? 2 : 4; }

// ---- argument rules ---------------------------------------------------------------------------------------------

inline std::string tile_text(TileShape tile) {
  return "(" + std::to_string(tile.rows) + ", " + std::to_string(tile.columns) + ")";
}

inline void check_size(const char* name, int64_t value) {
  require(value >= 0 && value <= kMaxSize, name, "must be in 0..2^31-512, the range of TMA coordinates", value);
}

// `matrices` of `rows` of `row` elements, one after the other or alone.
struct Matrices {
  const char *name, *stride_name, *group_stride_name;
  const void* p;
  int64_t matrices, rows, row, group_stride, stride, element_bytes;

  bool empty() const { return matrices == 0 || rows == 0 || row == 0; }
  int64_t span_bytes() const {
    return empty() ? 0 : ((matrices - 1) * group_stride + (rows - 1) * stride + row) * element_bytes;
  }
};

inline void check_matrices(const Matrices& x, uintptr_t alignment) {
  if (x.empty()) return;
  const bool tma = alignment == 16;
  const char* whole = "must be a multiple of 16 bytes, as TMA asks (pad the rows)";
  require(x.p != nullptr, x.name, "must not be null unless it is empty", "a null pointer");
  require(is_aligned(x.p, alignment), x.name, tma ? "must start at a multiple of 16 bytes, as TMA asks"
                                                  : "must be aligned to its elements", x.p);
  require(x.stride >= x.row, x.stride_name, "must be at least the length of a row", x.stride);
  require(!tma || x.stride * x.element_bytes % 16 == 0, x.stride_name, whole, x.stride);
  if (x.matrices == 1) return;
  require(x.group_stride >= (x.rows - 1) * x.stride + x.row, x.group_stride_name, "must be at least a whole matrix",
          x.group_stride);
  require(!tma || x.group_stride * x.element_bytes % 16 == 0, x.group_stride_name, whole, x.group_stride);
}

inline void check_apart(const Matrices& d, const Matrices& input) {
  const int64_t input_bytes = input.span_bytes(), d_bytes = d.span_bytes();
  const auto p = reinterpret_cast<uintptr_t>(input.p), q = reinterpret_cast<uintptr_t>(d.p);
  const bool apart = input_bytes == 0 || d_bytes == 0 || p + input_bytes <= q || q + d_bytes <= p;
  require(apart, "d", "must not overlap an input, for tiles are written while others are still read", input.name);
}

template <size_t Count>
void check_tile(const Fp8GemmArguments& x, const TileShape (&legal)[Count]) {
  require(x.tile || !x.multicast, "multicast", "needs a tile, for the cost model chooses both", "no tile");
  if (!x.tile) return;
  std::string names;
  for (const TileShape& shape : legal) {
    if (shape == *x.tile) return;
    names += (names.empty() ? "" : ", ") + tile_text(shape);
  }
  fail("tile", "must be one of " + names, tile_text(*x.tile));
}

inline int32_t usable_sms(const Fp8GemmArguments& x) {
  const int32_t all = hopper::sm_count();
  return x.num_sms == 0 ? all : std::min(x.num_sms, all);
}

// The cost model's choice among `legal`, or the caller's.
template <size_t Count>
TileChoice choice_of(const Fp8GemmArguments& x, const TileProblem& problem, const TileShape (&legal)[Count]) {
  if (!x.tile) return choose_tile(problem, legal, Count);
  if (!x.multicast) return choose_tile(problem, &*x.tile, 1);
  return {*x.tile, *x.multicast, gemm_clocks(problem, *x.tile, *x.multicast)};
}

// ---- launch -----------------------------------------------------------------------------------------------------

// groups == 0: a matrix; else that many, `group_stride` elements apart.
inline TensorMap map_of(const void* p, hopper::Element element, int64_t element_bytes, int64_t columns, int64_t rows,
                        int64_t stride, int32_t box_columns, int32_t box_rows, Swizzle swizzle, int64_t groups = 0,
                        int64_t group_stride = 0) {
  hopper::TensorMapShape shape{};
  shape.rank = groups == 0 ? 2 : 3;
  shape.size[0] = columns;
  shape.size[1] = rows;
  shape.size[2] = groups;
  shape.stride_bytes[0] = stride * element_bytes;
  shape.stride_bytes[1] = group_stride * element_bytes;
  shape.box[0] = box_columns;
  shape.box[1] = box_rows;
  shape.box[2] = 1;
  return hopper::make_tensor_map(p, element, shape, swizzle);
}

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
    map_a = map_of(x.a, Element::u8, 1, x.k, x.m, x.a_stride, kSliceK, a_rows, Swizzle::b128, batch, x.a_group_stride);
    map_b = map_of(x.b, Element::u8, 1, x.k, x.n, x.b_stride, kSliceK, b_rows, Swizzle::b128, many, x.b_group_stride);
    map_scale_a = map_of(x.scale_a, Element::f32, 4, x.m, blocks(x.k), x.scale_a_stride, a_rows, 1, Swizzle::none,
                         batch, x.scale_a_group_stride);
  }
  if constexpr (C::kStaged) {
    if (p.aligned_rows && x.groups > 0)
      map_d = map_of(x.d, Element::bf16, element, x.n, x.m, x.d_stride, C::Staging::kPanelColumns, C::kGroup.rows,
                     C::kStagingSwizzle, batch, x.d_group_stride);
  }
  hopper::LaunchConfig config{};
  config.grid = dim3(static_cast<uint32_t>(std::min<int64_t>(units, std::max(sms / C::kCluster, 1))) * C::kCluster);
  config.block = dim3(C::Role::kThreads);
  config.smem_bytes = sizeof(typename C::Shared);
  config.cluster = C::kCluster;
  config.programmatic = x.programmatic;
  config.stream = stream;
  config.name = "fp8_gemm";
  hopper::launch(config, fp8_gemm_kernel<C>, map_a, map_b, map_scale_a, map_d, p);
}

}  // namespace fp8_gemm_kernels
