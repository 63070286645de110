// Host side of fp8_wgrad: limits, tile choice, tensor maps, launch. One kernel per tile, output type and cluster size.
#include "fp8_wgrad.h"

#include "fp8_wgrad.cuh"
#include "host.h"

namespace {

using namespace fp8_wgrad_kernels;
using namespace gemm_host;

int64_t slices_of(int64_t tokens) { return ceil_div(tokens, kSlice); }

// The stride of one row or one group means nothing, and frameworks put anything there; TMA wants it in order.
Fp8WgradArguments with_plain_strides(Fp8WgradArguments x) {
  if (x.m == 1) x.a_stride = round_up(x.tokens, 16), x.d_stride = round_up(x.n, 8);
  if (x.n == 1) x.b_stride = round_up(x.tokens, 16);
  if (slices_of(x.tokens) == 1) x.scale_a_stride = round_up(x.m, 4), x.scale_b_stride = round_up(x.n, 4);
  if (x.groups == 1) x.d_group_stride = round_up(x.m * x.d_stride, 8);
  return x;
}

void check(const Fp8WgradArguments& x) {
  check_size("m", x.m);
  check_size("n", x.n);
  check_size("tokens", x.tokens);
  check_size("groups", x.groups);
  require(x.offsets || x.groups == 1, "offsets", "must not be null unless there is one group", "a null pointer");
  require(is_aligned(x.offsets, 4), "offsets", "must be aligned to its elements", x.offsets);
  check_knobs(x, kFp8WgradTiles);
  if (x.m == 0 || x.n == 0 || x.groups == 0) return;
  const int64_t element = bytes_of(x.d_type), slices = slices_of(x.tokens);
  const Matrices a = one_matrix("a", "a_stride", x.a, x.m, x.tokens, x.a_stride, 1);
  const Matrices b = one_matrix("b", "b_stride", x.b, x.n, x.tokens, x.b_stride, 1);
  const Matrices scale_a = one_matrix("scale_a", "scale_a_stride", x.scale_a, slices, x.m, x.scale_a_stride, 4);
  const Matrices scale_b = one_matrix("scale_b", "scale_b_stride", x.scale_b, slices, x.n, x.scale_b_stride, 4);
  const Matrices offsets = one_matrix("offsets", "", x.offsets, x.offsets ? 1 : 0, x.groups + 1, 0, 4);
  const Matrices d{"d", "d_stride", "d_group_stride", x.d, x.groups, x.m, x.n, x.d_group_stride, x.d_stride, element};
  for (const Matrices& input : {a, b, scale_a, scale_b}) check_matrix(input, 16);
  check_matrix(d, element);
  require(x.d_group_stride >= (x.m - 1) * x.d_stride + x.n, "d_group_stride", "must be at least the length of a group",
          x.d_group_stride);
  const int64_t tiles = ceil_div(x.m, 64) * ceil_div(x.n, 128);   // of the smallest kind
  require(tiles < (int64_t{1} << 31) / x.groups, "groups", "must have fewer than 2^31 tiles in all", x.groups);
  for (const Matrices& input : {a, b, scale_a, scale_b, offsets}) check_apart(d, input);
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
    map_scale_a = map_of(x.scale_a, Element::f32, x.m, slices_of(x.tokens), x.scale_a_stride, a_rows, 1, Swizzle::none);
  }
  if (p.tma_store || p.prefetch)
    map_d = map_of(x.d, hopper::element_of<typename C::D>(), x.n, x.m, x.d_stride, C::kBoxColumns, C::kBoxRows,
                   C::kStaged ? C::kStagingSwizzle : Swizzle::none, x.groups, x.d_group_stride);
  hopper::launch(launch_config<C>("fp8_wgrad", std::min(p.tiles.count, most), x.programmatic, stream), fp8_wgrad_kernel<C>,
                 map_a, map_b, map_scale_a, map_d, p);
}

}  // namespace

TileChoice fp8_wgrad_choice(const Fp8WgradArguments& x) {
  const int32_t sms = usable_sms(x.num_sms);
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
  const int32_t sms = usable_sms(x.num_sms);
  check_cluster(choice.multicast, sms);
  with_kernel<kFp8WgradTiles>(choice, x.d_type == OutputType::bf16, [&]<int Rows, int Columns, class D, int Cluster>() {
    run<Config<Rows, Columns, D, Cluster>>(x, choice.multicast, sms, stream);
  });
}
