// Host side of fp8_gemm: limits, tile choice, tensor maps, launch. One kernel per tile, output type and cluster size.
#include "fp8_gemm.h"

#include <algorithm>
#include <string>

#include "../common/checks.h"
#include "../hopper/tensor_map.h"
#include "fp8_gemm.cuh"

namespace {

using namespace fp8_gemm_kernels;

constexpr int64_t kMaxSize = (int64_t{1} << 31) - 512;   // TMA coordinates are 32-bit, and a tile may reach past the end

int64_t blocks(int64_t size) { return ceil_div(size, kScaleBlock); }
int64_t bytes_of(OutputType type) { return type == OutputType::bf16 ? 2 : 4; }

struct Range {
  const char* name;
  const void* begin;
  int64_t bytes;
};

Range rows_range(const char* name, const void* p, int64_t rows, int64_t row_bytes, int64_t stride_bytes) {
  return {name, p, rows == 0 || row_bytes == 0 ? 0 : (rows - 1) * stride_bytes + row_bytes};
}

std::string tile_text(TileShape tile) {
  return "(" + std::to_string(tile.rows) + ", " + std::to_string(tile.columns) + ")";
}

void check_size(const char* name, int64_t value) {
  require(value >= 0 && value <= kMaxSize, name, "must be in 0..2^31-512, the range of TMA coordinates", value);
}

void check_rows(const char* name, const char* stride_name, const void* p, int64_t rows, int64_t row, int64_t stride,
                int64_t element_bytes, uintptr_t alignment) {
  if (rows == 0 || row == 0) return;
  require(p != nullptr, name, "must not be null unless it is empty", "a null pointer");
  require(is_aligned(p, alignment), name, alignment == 16 ? "must start at a multiple of 16 bytes, as TMA asks"
                                                       : "must be aligned to its elements", p);
  require(stride >= row, stride_name, "must be at least the length of a row", stride);
  require(alignment != 16 || stride * element_bytes % 16 == 0, stride_name,
          "must be a multiple of 16 bytes, as TMA asks (pad the rows)", stride);
}

// The stride of a matrix of one row means nothing, and frameworks put anything there; TMA wants it in order.
Fp8GemmArguments with_plain_strides(Fp8GemmArguments x) {
  if (x.m == 1) x.a_stride = round_up(x.k, 16), x.d_stride = round_up(x.n, 8);
  if (x.n == 1) x.b_stride = round_up(x.k, 16);
  if (blocks(x.k) == 1) x.scale_a_stride = round_up(x.m, 4);
  if (blocks(x.n) == 1) x.scale_b_stride = blocks(x.k);
  return x;
}

void check_tile(const Fp8GemmArguments& x) {
  require(x.tile || !x.multicast, "multicast", "needs a tile, for the cost model chooses both", "no tile");
  if (!x.tile) return;
  std::string legal;
  for (const TileShape& shape : kFp8GemmTiles) {
    if (shape == *x.tile) return;
    legal += (legal.empty() ? "" : ", ") + tile_text(shape);
  }
  fail("tile", "must be one of " + legal, tile_text(*x.tile));
}

void check(const Fp8GemmArguments& x) {
  check_size("m", x.m);
  check_size("n", x.n);
  check_size("k", x.k);
  require(x.num_sms >= 0, "num_sms", "must not be negative (0 means all)", x.num_sms);
  check_tile(x);
  const int64_t element = bytes_of(x.d_type);
  check_rows("a", "a_stride", x.a, x.m, x.k, x.a_stride, 1, 16);
  check_rows("b", "b_stride", x.b, x.n, x.k, x.b_stride, 1, 16);
  check_rows("scale_a", "scale_a_stride", x.scale_a, blocks(x.k), x.m, x.scale_a_stride, 4, 16);
  check_rows("scale_b", "scale_b_stride", x.scale_b, blocks(x.n), blocks(x.k), x.scale_b_stride, 4, 4);
  check_rows("d", "d_stride", x.d, x.m, x.n, x.d_stride, element, element);
  const Range d = rows_range("d", x.d, x.m, x.n * element, x.d_stride * element);
  for (const Range& input : {rows_range("a", x.a, x.m, x.k, x.a_stride), rows_range("b", x.b, x.n, x.k, x.b_stride),
                             rows_range("scale_a", x.scale_a, blocks(x.k), x.m * 4, x.scale_a_stride * 4),
                             rows_range("scale_b", x.scale_b, blocks(x.n), blocks(x.k) * 4, x.scale_b_stride * 4)}) {
    const auto p = reinterpret_cast<uintptr_t>(input.begin), q = reinterpret_cast<uintptr_t>(d.begin);
    const bool apart = input.bytes == 0 || d.bytes == 0 || p + input.bytes <= q || q + d.bytes <= p;
    require(apart, "d", "must not overlap an input, for tiles are written while others are still read", input.name);
  }
}

int32_t usable_sms(const Fp8GemmArguments& x) {
  const int32_t all = hopper::sm_count();
  return x.num_sms == 0 ? all : std::min(x.num_sms, all);
}

TensorMap map_of(const void* p, hopper::Element element, int64_t columns, int64_t rows, int64_t stride_bytes,
                 int32_t box_columns, int32_t box_rows, Swizzle swizzle) {
  hopper::TensorMapShape shape{};
  shape.rank = 2;
  shape.size[0] = columns;
  shape.size[1] = rows;
  shape.stride_bytes[0] = stride_bytes;
  shape.box[0] = box_columns;
  shape.box[1] = box_rows;
  return hopper::make_tensor_map(p, element, shape, swizzle);
}

template <class C>
void run(const Fp8GemmArguments& x, Multicast multicast, int32_t sms, hopper::Stream stream) {
  const int64_t element = sizeof(typename C::D);
  Params p{};
  const TileGrid grid{static_cast<int32_t>(x.n), C::kTileRows, C::kTileColumns, multicast};
  p.tiles = dense_tiles(grid, static_cast<int32_t>(x.m), std::max(sms / C::kCluster, 1));
  p.scale_b = x.scale_b;
  p.scale_b_stride = x.scale_b_stride;
  p.scale_b_rows = static_cast<int32_t>(blocks(x.n));
  p.n = static_cast<int32_t>(x.n);
  p.slices = static_cast<int32_t>(blocks(x.k));
  p.d = x.d;
  p.d_stride = x.d_stride;
  p.accumulate = x.accumulate;
  p.tma_store = C::kStaged && is_aligned(x.d, 16) && x.d_stride * element % 16 == 0;
  p.paired_store = is_aligned(x.d, 2 * element) && x.d_stride % 2 == 0;

  // Maps that the kernel will not use stay zero: TMA has no empty tensors.
  TensorMap map_a{}, map_b{}, map_scale_a{}, map_d{};
  const int32_t a_rows = C::kTileRows / (multicast == Multicast::a ? 2 : 1);
  const int32_t b_rows = C::kTileColumns / (multicast == Multicast::b ? 2 : 1);
  if (x.k > 0) {
    using hopper::Element;
    map_a = map_of(x.a, Element::u8, x.k, x.m, x.a_stride, kSliceK, a_rows, Swizzle::b128);
    map_b = map_of(x.b, Element::u8, x.k, x.n, x.b_stride, kSliceK, b_rows, Swizzle::b128);
    map_scale_a = map_of(x.scale_a, Element::f32, x.m, blocks(x.k), x.scale_a_stride * 4, a_rows, 1, Swizzle::none);
  }
  if constexpr (C::kStaged) {
    if (p.tma_store)
      map_d = map_of(x.d, hopper::Element::bf16, x.n, x.m, x.d_stride * element, C::Staging::kPanelColumns,
                     C::kGroup.rows, C::kStagingSwizzle);
  }
  const uint32_t clusters = std::min<uint32_t>(p.tiles.raster.count(), std::max(sms / C::kCluster, 1));
  hopper::LaunchConfig config{};
  config.grid = dim3(clusters * C::kCluster);
  config.block = dim3(C::Role::kThreads);
  config.smem_bytes = sizeof(typename C::Shared);
  config.cluster = C::kCluster;
  config.programmatic = x.programmatic;
  config.stream = stream;
  config.name = "fp8_gemm";
  hopper::launch(config, fp8_gemm_kernel<C>, map_a, map_b, map_scale_a, map_d, p);
}

template <int Rows, int Columns>
void run_tile(const Fp8GemmArguments& x, Multicast multicast, int32_t sms, hopper::Stream stream) {
  const bool pair = multicast != Multicast::none;
  if (x.d_type == OutputType::bf16) {
    pair ? run<Config<Rows, Columns, bf16, 2>>(x, multicast, sms, stream)
         : run<Config<Rows, Columns, bf16, 1>>(x, multicast, sms, stream);
  } else {
    pair ? run<Config<Rows, Columns, float, 2>>(x, multicast, sms, stream)
         : run<Config<Rows, Columns, float, 1>>(x, multicast, sms, stream);
  }
}

}  // namespace

TileChoice fp8_gemm_choice(const Fp8GemmArguments& x) {
  const TileProblem problem{x.m, x.n, x.k, usable_sms(x)};
  if (!x.tile) return choose_tile(problem, kFp8GemmTiles, kFp8GemmTileCount);
  if (!x.multicast) return choose_tile(problem, &*x.tile, 1);
  return {*x.tile, *x.multicast, gemm_clocks(problem, *x.tile, *x.multicast)};
}

void fp8_gemm(const Fp8GemmArguments& arguments, hopper::Stream stream) {
  const Fp8GemmArguments x = with_plain_strides(arguments);
  check(x);
  if (x.m == 0 || x.n == 0) return;
  const TileChoice choice = fp8_gemm_choice(x);
  const int32_t sms = usable_sms(x);
  require(choice.multicast == Multicast::none || sms >= 2, "multicast", "needs at least two multiprocessors", sms);
  const auto is = [&](int32_t rows, int32_t columns) { return choice.shape == TileShape{rows, columns}; };
  const auto go = [&](auto run_it) { run_it(x, choice.multicast, sms, stream); };
  if (is(256, 128)) return go(run_tile<256, 128>);
  if (is(128, 256)) return go(run_tile<128, 256>);
  if (is(128, 192)) return go(run_tile<128, 192>);
  if (is(128, 160)) return go(run_tile<128, 160>);
  if (is(128, 128)) return go(run_tile<128, 128>);
  if (is(128, 112)) return go(run_tile<128, 112>);
  if (is(128, 96)) return go(run_tile<128, 96>);
  if (is(64, 128)) return go(run_tile<64, 128>);
  if (is(64, 256)) return go(run_tile<64, 256>);
  fail("tile", "must have a kernel (a pair of kFp8GemmTiles is not listed here)", tile_text(choice.shape));
}
