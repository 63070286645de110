// What the launchers of all GEMMs share on the host: rules of arguments, tensor maps, the kernel of a tile, its launch.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "../common/checks.h"
#include "../common/launch_config.h"
#include "../common/tile_chooser.h"
#include "../hopper/tensor_map.h"

namespace gemm_host {

inline constexpr int64_t kMaxSize = (int64_t{1} << 31) - 512;   // TMA coordinates are 32-bit, and a tile may reach past the end

// ---- argument rules ---------------------------------------------------------------------------------------------

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

inline Matrices one_matrix(const char* name, const char* stride_name, const void* p, int64_t rows, int64_t row,
                           int64_t stride, int64_t element_bytes) {
  return {name, stride_name, "", p, 1, rows, row, 0, stride, element_bytes};
}

// Each of them; an alignment of 16 is TMA's.
inline void check_matrix(const Matrices& x, uintptr_t alignment) {
  if (x.empty()) return;
  const bool tma = alignment == 16;
  require(x.p != nullptr, x.name, "must not be null unless it is empty", "a null pointer");
  require(is_aligned(x.p, alignment), x.name, tma ? "must start at a multiple of 16 bytes, as TMA asks"
                                                  : "must be aligned to its elements", x.p);
  require(x.stride >= x.row, x.stride_name, "must be at least the length of a row", x.stride);
  require(!tma || x.stride * x.element_bytes % 16 == 0, x.stride_name,
          "must be a multiple of 16 bytes, as TMA asks (pad the rows)", x.stride);
}

inline void check_apart(const Matrices& d, const char* name, const void* input, int64_t input_bytes) {
  require(are_apart(d.p, d.span_bytes(), input, input_bytes), "d",
          "must not overlap an input, for tiles are written while others are still read", name);
}
inline void check_apart(const Matrices& d, const Matrices& input) { check_apart(d, input.name, input.p, input.span_bytes()); }

// What a caller may decide instead of the cost model. `Arguments`: those of any GEMM, with num_sms, tile and multicast.
template <class Arguments, size_t Count>
void check_knobs(const Arguments& x, const TileShape (&legal)[Count]) {
  const auto text = [](TileShape tile) {
    return "(" + std::to_string(tile.rows) + ", " + std::to_string(tile.columns) + ")";
  };
  require(x.num_sms >= 0, "num_sms", "must not be negative (0 means all)", x.num_sms);
  require(x.tile || !x.multicast, "multicast", "needs a tile, for the cost model chooses both", "no tile");
  if (!x.tile) return;
  std::string names;
  for (const TileShape& shape : legal) {
    if (shape == *x.tile) return;
    names += (names.empty() ? "" : ", ") + text(shape);
  }
  fail("tile", "must be one of " + names, text(*x.tile));
}

inline int32_t usable_sms(int32_t num_sms) {
  const int32_t all = hopper::sm_count();
  return num_sms == 0 ? all : std::min(num_sms, all);
}

inline void check_cluster(const std::optional<Multicast>& multicast, int32_t sms) {
  require(!multicast || *multicast == Multicast::none || sms >= 2, "multicast", "needs at least two multiprocessors", sms);
}

// ---- launch -----------------------------------------------------------------------------------------------------

// groups == 0: a matrix; else that many. Strides and group strides in elements.
inline hopper::TensorMap map_of(const void* p, hopper::Element element, int64_t columns, int64_t rows, int64_t stride,
                                int32_t box_columns, int32_t box_rows, hopper::Swizzle swizzle, int64_t groups = 0,
                                int64_t group_stride = 0) {
  const int64_t bytes = hopper::element_bytes(element);
  hopper::TensorMapShape shape{};
  shape.rank = groups == 0 ? 2 : 3;
  shape.size[0] = columns;
  shape.size[1] = rows;
  shape.size[2] = groups;
  shape.stride_bytes[0] = stride * bytes;
  shape.stride_bytes[1] = group_stride * bytes;
  shape.box[0] = box_columns;
  shape.box[1] = box_rows;
  shape.box[2] = 1;
  return hopper::make_tensor_map(p, element, shape, swizzle);
}

// Calls run<rows, columns>() of that member of `Tiles`: every legal tile has its kernel.
template <const auto& Tiles, class Run>
void with_tile(TileShape shape, Run run) {
  const auto try_each = [&]<size_t... I>(std::index_sequence<I...>) {
    ((shape == Tiles[I] ? run.template operator()<Tiles[I].rows, Tiles[I].columns>() : void()), ...);
  };
  try_each(std::make_index_sequence<std::size(Tiles)>());
}

// Calls run<rows, columns, type of D, CTAs of a cluster>().
template <const auto& Tiles, class Run>
void with_kernel(const TileChoice& choice, bool d_is_bf16, Run run) {
  with_tile<Tiles>(choice.shape, [&]<int Rows, int Columns>() {
    const bool pair = choice.multicast != Multicast::none;
    if (d_is_bf16) {
      pair ? run.template operator()<Rows, Columns, hopper::bf16, 2>()
           : run.template operator()<Rows, Columns, hopper::bf16, 1>();
    } else {
      pair ? run.template operator()<Rows, Columns, float, 2>() : run.template operator()<Rows, Columns, float, 1>();
    }
  });
}

// C: the kernel's Config. `clusters` of its size, a CTA of all its roles each.
template <class C>
hopper::LaunchConfig launch_config(const char* name, int64_t clusters, bool programmatic, hopper::Stream stream) {
  hopper::LaunchConfig config = ::launch_config(name, static_cast<uint32_t>(clusters) * C::kCluster, C::Role::kThreads,
                                                programmatic, stream, sizeof(typename C::Shared));
  config.cluster = C::kCluster;
  return config;
}

}  // namespace gemm_host
