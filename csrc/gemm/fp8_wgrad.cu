// Host side of fp8_wgrad: limits, tile choice, tensor maps, launch. One kernel per tile, output type and cluster size.
#include "fp8_wgrad.h"

#include <algorithm>
#include <string>

#include "../common/checks.h"
#include "../hopper/tensor_map.h"
#include "fp8_wgrad.cuh"

namespace {

using namespace fp8_wgrad_kernels;

constexpr int64_t kMaxSize = (int64_t{1} << 31) - 512;   // TMA coordinates are 32-bit, and a tile may reach past the end

int64_t slices_of(int64_t tokens) { return ceil_div(tokens, kSlice); }
int64_t bytes_of(OutputType type) { return type == OutputType::bf16 ? 2 : 4; }

std::string tile_text(TileShape tile) {
  return "(" + std::to_string(tile.rows) + ", " + std::to_string(tile.columns) + ")";
}

void check_size(const char* name, int64_t value) {
  require(value >= 0 && value <= kMaxSize, name, "must be in 0..2^31-512, the range of TMA coordinates", value);
}

// `span`: what the stride must not be smaller than.
void check_rows(const char* name, const char* stride_name, const void* p, int64_t rows, int64_t span, int64_t stride,
                int64_t element_bytes, uintptr_t alignment) {
  if (rows == 0 || span == 0) return;
  require(p != nullptr, name, "must not be null unless it is empty", "a null pointer");
  require(is_aligned(p, alignment), name, alignment == 16 ? "must start at a multiple of 16 bytes, as TMA asks"
                                                       : "must be aligned to its elements", p);
  require(stride >= span, stride_name, "must be at least the length of a row", stride);
  require(alignment != 16 || stride * element_bytes % 16 == 0, stride_name,
          "must be a multiple of 16 bytes, as TMA asks (pad the rows)", stride);
}

// The stride of one row or one group means nothing, and frameworks put anything there; TMA wants it in order.
Fp8WgradArguments with_plain_strides(Fp8WgradArguments x) {
  if (x.m == 1) x.a_stride = round_up(x.tokens, 16), x.d_stride = round_up(x.n, 8);
  if (x.n == 1) x.b_stride = round_up(x.tokens, 16);
  if (slices_of(x.tokens) == 1) x.scale_a_stride = round_up(x.m, 4), x.scale_b_stride = round_up(x.n, 4);
  if (x.groups == 1) x.d_group_stride = round_up(x.m * x.d_stride, 8);
  return x;
}

void check_tile(const Fp8WgradArguments& x) {
  require(x.tile || !x.multicast, "multicast", "needs a tile, for the cost model chooses both", "no tile");
  if (!x.tile) return;
  std::string legal;
  for (const TileShape& shape : kFp8WgradTiles) {
    if (shape == *x.tile) return;
    legal += (legal.empty() ? "" : ", ") + tile_text(shape);
  }
  fail("tile", "must be one of " + legal, tile_text(*x.tile));
}

struct Range {
  const char* name;
  const void* begin;
  int64_t bytes;
};

Range rows_range(const char* name, const void* p, int64_t rows, int64_t row_bytes, int64_t stride_bytes) {
  return {name, p, rows == 0 || row_bytes == 0 ? 0 : (rows - 1) * stride_bytes + row_bytes};
}

void check_apart(const Fp8WgradArguments& x) {
  const int64_t element = bytes_of(x.d_type), slices = slices_of(x.tokens);
  const Range d = rows_range("d", x.d, x.groups, ((x.m - 1) * x.d_stride + x.n) * element, x.d_group_stride * element);
  for (const Range& input : {rows_range("a", x.a, x.m, x.tokens, x.a_stride), rows_range("b", x.b, x.n, x.tokens, x.b_stride),
                             rows_range("scale_a", x.scale_a, slices, x.m * 4, x.scale_a_stride * 4),
                             rows_range("scale_b", x.scale_b, slices, x.n * 4, x.scale_b_stride * 4),
                             rows_range("offsets", x.offsets, x.offsets ? 1 : 0, (x.groups + 1) * 4, 0)}) {
    const auto p = reinterpret_cast<uintptr_t>(input.begin), q = reinterpret_cast<uintptr_t>(d.begin);
    const bool apart = input.bytes == 0 || p + input.bytes <= q || q + d.bytes <= p;
    require(apart, "d", "must not overlap an input, for tiles are written while others are still read", input.name);
  }
}

void check(const Fp8WgradArguments& x) {
  check_size("m", x.m);
  check_size("n", x.n);
  check_size("tokens", x.tokens);
  check_size("groups", x.groups);
  require(x.offsets || x.groups == 1, "offsets", "must not be null unless there is one group", "a null pointer");
  require(is_aligned(x.offsets, 4), "offsets", "must be aligned to its elements", x.offsets);
  require(x.num_sms >= 0, "num_sms", "must not be negative (0 means all)", x.num_sms);
  check_tile(x);
  if (x.m == 0 || x.n == 0 || x.groups == 0) return;
  const int64_t element = bytes_of(x.d_type), slices = slices_of(x.tokens);
  check_rows("a", "a_stride", x.a, x.m, x.tokens, x.a_stride, 1, 16);
  check_rows("b", "b_stride", x.b, x.n, x.tokens, x.b_stride, 1, 16);
  check_rows("scale_a", "scale_a_stride", x.scale_a, slices, x.m, x.scale_a_stride, 4, 16);
  check_rows("scale_b", "scale_b_stride", x.scale_b, slices, x.n, x.scale_b_stride, 4, 16);
  check_rows("d", "d_stride", x.d, x.m, x.n, x.d_stride, element, element);
  require(x.d_group_stride >= (x.m - 1) * x.d_stride + x.n, "d_group_stride", "must be at least the length of a group",
          x.d_group_stride);
  const int64_t tiles = ceil_div(x.m, 64) * ceil_div(x.n, 128);   // of the smallest kind
  require(tiles < (int64_t{1} << 31) / x.groups, "groups", "must have fewer than 2^31 tiles in all", x.groups);
  check_apart(x);
}

int32_t usable_sms(const Fp8WgradArguments& x) {
  const int32_t all = hopper::sm_count();
  return x.num_sms == 0 ? all : std::min(x.num_sms, all);
}

// ---- which tile: a cost model in SM clocks, research/gemm-quant.md section 6.2; arithmetic, not measurement --------

constexpr uint64_t kTensorElements = 32;     // of D per clock and slice: 128x128 takes 512 clocks (8192 FLOP/clock)
constexpr uint64_t kPortBytes = 128;         // of the shared memory port per clock; a warp's 16-byte scale loads take one
constexpr uint64_t kL2Bytes = 48;            // that L2 sustains per SM and clock (40-60 in the literature)
constexpr uint64_t kSliceIssue = 40;         // instructions of a math warp per slice besides promotion
constexpr uint64_t kTileClocks = 500;        // barriers and drain of an epilogue that nothing hides
constexpr uint64_t kStoreBytes = 64;         // of D per clock through direct stores
constexpr uint64_t kClusterPercent = 2;      // two CTAs wait for each other

// Clocks of one SM for a slice: the slowest of tensor core, shared memory port, issue slots and L2.
uint64_t slice_clocks_1d1d(TileShape tile, Multicast multicast) {
  const uint64_t rows = tile.rows, columns = tile.columns, part = math_group_shape(tile).wave_columns;
  const uint64_t tensor = rows * columns / kTensorElements;
  // TMA writes both operands; two groups read 64 rows of A and their columns of B; eight warps read column scales.
  const uint64_t port = (rows + columns + 2 * (64 + part)) * kSlice / kPortBytes + 8 * part / 16;
  // Two math warps on each quarter of the SM: FMUL and FFMA for each element, a load of scales for 8.
  const uint64_t issue = 2 * (part + part / 16 + kSliceIssue);
  const uint64_t fetched = rows / (multicast == Multicast::a ? 2 : 1) + columns / (multicast == Multicast::b ? 2 : 1);
  return std::max({tensor, port, issue, fetched * kSlice / kL2Bytes});
}

// Full waves of tiles. What groups own is not known on the host: the model lets each own the same.
uint64_t wgrad_clocks(const Fp8WgradArguments& x, int32_t sms, TileShape tile, Multicast multicast) {
  const uint64_t pair = multicast == Multicast::none ? 1 : 2;
  const TileGrid grid{static_cast<int32_t>(x.n), static_cast<uint32_t>(tile.rows), static_cast<uint32_t>(tile.columns),
                      multicast};
  const uint64_t units = uint64_t{grid.m_units(x.m)} * grid.n_units() * x.groups;
  const uint64_t clusters = std::max<uint64_t>(sms / pair, 1), waves = (units + clusters - 1) / clusters;
  const uint64_t slices = slices_of(ceil_div(x.tokens, std::max<int64_t>(x.groups, 1)));
  const uint64_t main_loop = slices * slice_clocks_1d1d(tile, multicast) * (100 + (pair - 1) * kClusterPercent) / 100;
  const uint64_t bytes = uint64_t(tile.rows) * tile.columns * bytes_of(x.d_type) * (x.accumulate ? 2 : 1);
  return waves * (main_loop + kTileClocks + bytes / kStoreBytes);
}

// ---- launch -------------------------------------------------------------------------------------------------------

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
TensorMap map_of_d(const Fp8WgradArguments& x) {
  hopper::TensorMapShape shape{};
  shape.rank = 3;
  shape.size[0] = x.n;
  shape.size[1] = x.m;
  shape.size[2] = x.groups;
  shape.stride_bytes[0] = x.d_stride * sizeof(typename C::D);
  shape.stride_bytes[1] = x.d_group_stride * sizeof(typename C::D);
  shape.box[0] = C::kBoxColumns;
  shape.box[1] = C::kBoxRows;
  shape.box[2] = 1;
  return hopper::make_tensor_map(x.d, C::kStaged ? hopper::Element::bf16 : hopper::Element::f32, shape,
                                 C::kStaged ? C::kStagingSwizzle : Swizzle::none);
}

template <class C>
void run(const Fp8WgradArguments& x, Multicast multicast, int32_t sms, hopper::Stream stream) {
  const int64_t element = sizeof(typename C::D);
  const uint32_t most = std::max(sms / C::kCluster, 1);
  Params p{};
  const TileGrid grid{static_cast<int32_t>(x.n), C::kTileRows, C::kTileColumns, multicast};
  p.tiles = wgrad_tiles(grid, x.m, x.groups, most);
  p.tiles.offsets = x.offsets;
  p.tiles.slices = static_cast<int32_t>(x.offsets ? x.tokens / kSlice : slices_of(x.tokens));
  p.scale_b = x.scale_b;
  p.scale_b_stride = x.scale_b_stride;
  p.m = static_cast<int32_t>(x.m);
  p.n = static_cast<int32_t>(x.n);
  p.d = x.d;
  p.d_stride = x.d_stride;
  p.d_group_stride = x.d_group_stride;
  p.accumulate = x.accumulate;
  const bool addressable = is_aligned(x.d, 16) && x.d_stride * element % 16 == 0 && x.d_group_stride * element % 16 == 0;
  p.tma_store = C::kStaged && addressable;
  p.prefetch = x.accumulate && addressable;
  p.paired_store = is_aligned(x.d, 2 * element) && x.d_stride % 2 == 0 && x.d_group_stride % 2 == 0;

  // Maps that the kernel will not use stay zero: TMA has no empty tensors.
  TensorMap map_a{}, map_b{}, map_scale_a{}, map_d{};
  const int32_t a_rows = C::kTileRows / (multicast == Multicast::a ? 2 : 1);
  const int32_t b_rows = C::kTileColumns / (multicast == Multicast::b ? 2 : 1);
  if (x.tokens > 0) {
    using hopper::Element;
    map_a = map_of(x.a, Element::u8, x.tokens, x.m, x.a_stride, kSlice, a_rows, Swizzle::b128);
    map_b = map_of(x.b, Element::u8, x.tokens, x.n, x.b_stride, kSlice, b_rows, Swizzle::b128);
    map_scale_a = map_of(x.scale_a, Element::f32, x.m, slices_of(x.tokens), x.scale_a_stride * 4, a_rows, 1, Swizzle::none);
  }
  if (p.tma_store || p.prefetch) map_d = map_of_d<C>(x);
  hopper::LaunchConfig config{};
  config.grid = dim3(std::min(p.tiles.count, most) * C::kCluster);
  config.block = dim3(C::Role::kThreads);
  config.smem_bytes = sizeof(typename C::Shared);
  config.cluster = C::kCluster;
  config.programmatic = x.programmatic;
  config.stream = stream;
  config.name = "fp8_wgrad";
  hopper::launch(config, fp8_wgrad_kernel<C>, map_a, map_b, map_scale_a, map_d, p);
}

template <int Rows, int Columns>
void run_tile(const Fp8WgradArguments& x, Multicast multicast, int32_t sms, hopper::Stream stream) {
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

TileChoice fp8_wgrad_choice(const Fp8WgradArguments& x) {
  const int32_t sms = usable_sms(x);
  if (x.tile && x.multicast) return {*x.tile, *x.multicast, wgrad_clocks(x, sms, *x.tile, *x.multicast)};
  TileChoice best{kFp8WgradTiles[0], Multicast::none, ~uint64_t{0}};
  for (const Multicast multicast : {Multicast::none, Multicast::a, Multicast::b}) {
    if (multicast != Multicast::none && sms < 2) continue;
    for (const TileShape& tile : kFp8WgradTiles) {
      if (x.tile && !(tile == *x.tile)) continue;
      if (multicast == Multicast::a && x.n <= tile.columns) continue;   // no neighbour to share with
      if (multicast == Multicast::b && x.m <= tile.rows) continue;
      const uint64_t clocks = wgrad_clocks(x, sms, tile, multicast);
      if (clocks < best.clocks) best = {tile, multicast, clocks};
    }
  }
  return best;
}

void fp8_wgrad(const Fp8WgradArguments& arguments, hopper::Stream stream) {
  const Fp8WgradArguments x = with_plain_strides(arguments);
  check(x);
  if (x.m == 0 || x.n == 0 || x.groups == 0) return;
  const TileChoice choice = fp8_wgrad_choice(x);
  const int32_t sms = usable_sms(x);
  require(choice.multicast == Multicast::none || sms >= 2, "multicast", "needs at least two multiprocessors", sms);
  const auto is = [&](int32_t rows, int32_t columns) { return choice.shape == TileShape{rows, columns}; };
  const auto go = [&](auto run_it) { run_it(x, choice.multicast, sms, stream); };
  if (is(128, 192)) return go(run_tile<128, 192>);
  if (is(128, 160)) return go(run_tile<128, 160>);
  if (is(128, 128)) return go(run_tile<128, 128>);
  if (is(64, 128)) return go(run_tile<64, 128>);
  fail("tile", "must have a kernel (a pair of kFp8WgradTiles is not listed here)", tile_text(choice.shape));
}
