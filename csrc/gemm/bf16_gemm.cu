// Host side of bf16_gemm: limits, tile choice, tensor maps, launch. One kernel per tile, pair of majors and cluster size.
#include "bf16_gemm.h"

#include <algorithm>
#include <string>

#include "../common/checks.h"
#include "../hopper/tensor_map.h"
#include "bf16_gemm.cuh"

namespace {

using namespace bf16_gemm_kernels;

constexpr int64_t kMaxSize = (int64_t{1} << 31) - 512;   // TMA coordinates are 32-bit, and a tile may reach past the end

std::string tile_text(TileShape tile) {
  return "(" + std::to_string(tile.rows) + ", " + std::to_string(tile.columns) + ")";
}

void check_size(const char* name, int64_t value) {
  require(value >= 0 && value <= kMaxSize, name, "must be in 0..2^31-512, the range of TMA coordinates", value);
}

// How TMA reads an operand. The stride of a dimension of one element means nothing, so that it may be any.
struct Layout {
  Major major;
  int64_t stride;          // between K-major rows, or between k of the other
  int64_t matrix_stride;
};

Layout layout_of(const char* name, const Bf16Operand& x, int64_t k) {
  const auto fits = [](int64_t stride, int64_t length, int64_t count) {
    return count == 1 || (stride % 8 == 0 && stride >= length);
  };
  Layout layout{};
  if ((k == 1 || x.k_stride == 1) && fits(x.row_stride, k, x.rows)) {
    layout = {Major::k, x.rows == 1 ? round_up(k, 8) : x.row_stride, 0};
  } else if ((x.rows == 1 || x.row_stride == 1) && fits(x.k_stride, x.rows, k)) {
    layout = {Major::mn, k == 1 ? round_up(x.rows, 8) : x.k_stride, 0};
  } else {
    const int64_t strides[] = {x.row_stride, x.k_stride};
    fail(name, "must have one of its two dimensions contiguous and the other's stride a multiple of 16 bytes and at least "
               "the length of a row, as TMA asks (copy it)", "strides " + text_of(strides, 2));
  }
  require(is_aligned(x.data, 16), name, "must start at a multiple of 16 bytes, as TMA asks", x.data);
  require(x.matrices == 1 || x.matrix_stride % 8 == 0, name,
          "must have matrices at multiples of 16 bytes, as TMA asks", x.matrix_stride);
  layout.matrix_stride = x.matrices == 1 ? 8 : x.matrix_stride;
  return layout;
}

// Bytes from the first to past the last element.
int64_t span(int64_t matrices, int64_t matrix_stride, int64_t rows, int64_t row_stride, int64_t columns,
             int64_t column_stride, int64_t size) {
  if (matrices == 0 || rows == 0 || columns == 0) return 0;
  return ((matrices - 1) * matrix_stride + (rows - 1) * row_stride + (columns - 1) * column_stride + 1) * size;
}

int64_t d_matrices(const Bf16GemmArguments& x) {
  return x.grouping == Grouping::none || x.grouping == Grouping::rows_by_offsets ? 1 : x.groups;
}

void check_tile(const Bf16GemmArguments& x) {
  require(x.tile || !x.multicast, "multicast", "needs a tile, for the cost model chooses both", "no tile");
  if (!x.tile) return;
  std::string legal;
  for (const TileShape& shape : kBf16GemmTiles) {
    if (shape == *x.tile) return;
    legal += (legal.empty() ? "" : ", ") + tile_text(shape);
  }
  fail("tile", "must be one of " + legal, tile_text(*x.tile));
}

void check(const Bf16GemmArguments& x) {
  check_size("m", x.a.rows);
  check_size("n", x.b.rows);
  check_size("k", x.k);
  check_size("groups", x.groups);
  require(x.num_sms >= 0, "num_sms", "must not be negative (0 means all)", x.num_sms);
  check_tile(x);
  require(x.d_type == Dtype::bf16 || x.d_type == Dtype::f32, "d", "must be bfloat16 or float32", name_of(x.d_type));
  const bool by_index = x.grouping != Grouping::none;
  require(!by_index || x.index != nullptr || x.groups == 0, "index", "must not be null with groups", "a null pointer");
  const int64_t size = size_of(x.d_type), m = x.a.rows, n = x.b.rows;
  if (m == 0 || n == 0 || d_matrices(x) == 0) return;
  require(x.d != nullptr, "d", "must not be null unless it is empty", "a null pointer");
  require(is_aligned(x.d, size), "d", "must be aligned to its elements", x.d);
  require(m == 1 || x.d_stride >= n, "d_stride", "must be at least the length of a row", x.d_stride);
  const auto d = reinterpret_cast<uintptr_t>(x.d);
  const int64_t d_bytes = span(d_matrices(x), x.d_matrix_stride, m, x.d_stride, n, 1, size);
  for (const auto& [name, input] : {std::pair{"a", x.a}, std::pair{"b", x.b}}) {
    if (x.k == 0 || input.matrices == 0) continue;
    require(input.data != nullptr, name, "must not be null unless it is empty", "a null pointer");
    layout_of(name, input, x.k);
    const auto p = reinterpret_cast<uintptr_t>(input.data);
    const int64_t bytes =
        span(input.matrices, input.matrix_stride, input.rows, input.row_stride, x.k, input.k_stride, 2);
    const bool apart = p + bytes <= d || d + d_bytes <= p;
    require(apart, "d", "must not overlap an input, for tiles are written while others are still read", name);
  }
}

int32_t usable_sms(const Bf16GemmArguments& x) {
  const int32_t all = hopper::sm_count();
  return x.num_sms == 0 ? all : std::min(x.num_sms, all);
}

TensorMap map_of(const Bf16Operand& x, const Layout& layout, int64_t k, int32_t box_rows, int32_t box_k) {
  const bool k_inside = layout.major == Major::k;
  hopper::TensorMapShape shape{};
  shape.rank = 3;
  shape.size[0] = k_inside ? k : x.rows;
  shape.size[1] = k_inside ? x.rows : k;
  shape.size[2] = x.matrices;
  shape.stride_bytes[0] = layout.stride * 2;
  shape.stride_bytes[1] = layout.matrix_stride * 2;
  shape.box[0] = 64;
  shape.box[1] = k_inside ? box_rows : box_k;
  shape.box[2] = 1;
  return hopper::make_tensor_map(x.data, hopper::Element::bf16, shape, Swizzle::b128);
}

TensorMap map_of_d(const Bf16GemmArguments& x) {
  hopper::TensorMapShape shape{};
  shape.rank = 3;
  shape.size[0] = x.b.rows;
  shape.size[1] = x.a.rows;
  shape.size[2] = d_matrices(x);
  shape.stride_bytes[0] = (x.a.rows == 1 ? round_up(x.b.rows, 8) : x.d_stride) * 2;
  shape.stride_bytes[1] = (d_matrices(x) == 1 ? 8 : x.d_matrix_stride) * 2;
  shape.box[0] = shape.box[1] = kPiece;
  shape.box[2] = 1;
  return hopper::make_tensor_map(x.d, hopper::Element::bf16, shape, Swizzle::b128);
}

// Rows of one group as the host can know them: the average, of which the last tile is a partial one.
TileProblem problem_of(const Bf16GemmArguments& x, TileShape tile, Multicast multicast, int32_t sms) {
  const int64_t slice = 2;   // the model counts bytes of K
  const int64_t groups = std::max<int64_t>(x.groups, 1), m = x.a.rows, n = x.b.rows;
  const int64_t unit = int64_t{tile.rows} * (multicast == Multicast::b ? 2 : 1);
  switch (x.grouping) {
    case Grouping::none: return {m, n, x.k * slice, sms};
    case Grouping::rows_by_offsets: return {groups * round_up(ceil_div(m, groups), unit), n, x.k * slice, sms};
    case Grouping::k_by_offsets: return {groups * round_up(m, unit), n, ceil_div(x.k, groups) * slice, sms};
    default: return {groups * round_up(m, unit), n, x.k * slice, sms};
  }
}

WorkList work_of(const Bf16GemmArguments& x, const TileGrid& grid, int32_t clusters) {
  WorkList list{};
  list.grouping = x.grouping;
  list.groups = static_cast<int32_t>(x.groups);
  list.k = static_cast<int32_t>(x.k);
  list.dense = dense_tiles(grid, static_cast<int32_t>(x.a.rows), clusters);
  const bool of_k = x.grouping == Grouping::k_by_offsets || x.grouping == Grouping::k_by_mask;
  list.ranges = {x.index, static_cast<int32_t>(of_k ? x.k : x.a.rows),
                 x.grouping == Grouping::rows_by_mask || x.grouping == Grouping::k_by_mask};
  list.grouped = grouped_tiles(grid, list.ranges, list.groups);
  return list;
}

// No more clusters than there can be work for.
int64_t units_of(const Bf16GemmArguments& x, const TileGrid& grid) {
  const int64_t m = x.a.rows;
  int64_t rows = grid.m_units(m);
  if (x.grouping == Grouping::rows_by_offsets) rows += x.groups;
  if (x.grouping != Grouping::none && x.grouping != Grouping::rows_by_offsets) rows *= x.groups;
  return std::max<int64_t>(rows * grid.n_units(), 1);
}

template <class C>
void run(const Bf16GemmArguments& x, const Layout& a, const Layout& b, Multicast multicast, int32_t sms,
         hopper::Stream stream) {
  const TileGrid grid{static_cast<int32_t>(x.b.rows), C::kTileRows, C::kTileColumns, multicast};
  const int32_t clusters = std::max(sms / C::kCluster, 1);
  const int64_t size = size_of(x.d_type), n = x.b.rows;
  const auto strides_divide = [&](int64_t elements) {
    return x.d_stride % elements == 0 && (d_matrices(x) == 1 || x.d_matrix_stride % elements == 0);
  };
  Params p{};
  p.work = work_of(x, grid, clusters);
  p.m = static_cast<int32_t>(x.a.rows);
  p.n = static_cast<int32_t>(n);
  p.matrices = static_cast<int32_t>(d_matrices(x));
  p.d = x.d;
  p.d_stride = x.d_stride;
  p.d_matrix_stride = x.d_matrix_stride;
  p.fp32 = x.d_type == Dtype::f32;
  p.accumulate = x.accumulate;
  p.tma_store = !p.fp32 && is_aligned(x.d, 16) && (x.a.rows == 1 || x.d_stride % 8 == 0) &&
                (d_matrices(x) == 1 || x.d_matrix_stride % 8 == 0);
  p.paired_store = is_aligned(x.d, 2 * size) && strides_divide(2);
  const bool whole = is_aligned(x.d, 16) && strides_divide(16 / size) && n * size % 16 == 0;
  p.clear_bytes = !x.clear_rest ? 0 : whole ? 16 : static_cast<uint8_t>(size);
  p.multicast = multicast;

  // Maps that the kernel will not use stay zero: TMA has no empty tensors.
  TensorMap map_a{}, map_b{}, map_d{};
  const int32_t share_a = multicast == Multicast::a ? 2 : 1, share_b = multicast == Multicast::b ? 2 : 1;
  if (x.k > 0 && x.a.matrices > 0 && x.b.matrices > 0) {
    map_a = map_of(x.a, a, x.k, C::kTileRows / share_a, kOperandSlice / share_a);
    map_b = map_of(x.b, b, x.k, C::kTileColumns / share_b, kOperandSlice / share_b);
  }
  if (p.tma_store) map_d = map_of_d(x);
  hopper::LaunchConfig config{};
  config.grid = dim3(static_cast<uint32_t>(std::min<int64_t>(units_of(x, grid), clusters)) * C::kCluster);
  config.block = dim3(C::Role::kThreads);
  config.smem_bytes = sizeof(typename C::Shared);
  config.cluster = C::kCluster;
  config.programmatic = x.programmatic;
  config.stream = stream;
  config.name = "bf16_gemm";
  hopper::launch(config, bf16_gemm_kernel<C>, map_a, map_b, map_d, p);
}

template <int Rows, int Columns, Major MajorA, Major MajorB>
void run_majors(const Bf16GemmArguments& x, const Layout& a, const Layout& b, Multicast multicast, int32_t sms,
                hopper::Stream stream) {
  multicast != Multicast::none ? run<Config<Rows, Columns, MajorA, MajorB, 2>>(x, a, b, multicast, sms, stream)
                               : run<Config<Rows, Columns, MajorA, MajorB, 1>>(x, a, b, multicast, sms, stream);
}

template <int Rows, int Columns>
void run_tile(const Bf16GemmArguments& x, Multicast multicast, int32_t sms, hopper::Stream stream) {
  const Layout any{Major::k, 8, 8};   // of operands that are not read
  const bool read = x.k > 0 && x.a.matrices > 0 && x.b.matrices > 0;
  const Layout a = read ? layout_of("a", x.a, x.k) : any, b = read ? layout_of("b", x.b, x.k) : any;
  const auto go = [&](auto run_it) { run_it(x, a, b, multicast, sms, stream); };
  if (a.major == Major::k)
    b.major == Major::k ? go(run_majors<Rows, Columns, Major::k, Major::k>)
                        : go(run_majors<Rows, Columns, Major::k, Major::mn>);
  else
    b.major == Major::k ? go(run_majors<Rows, Columns, Major::mn, Major::k>)
                        : go(run_majors<Rows, Columns, Major::mn, Major::mn>);
}

}  // namespace

TileChoice bf16_gemm_choice(const Bf16GemmArguments& x) {
  const int32_t sms = usable_sms(x);
  TileChoice best{kBf16GemmTiles[0], Multicast::none, ~uint64_t{0}};
  for (const Multicast multicast : {Multicast::none, Multicast::a, Multicast::b}) {
    if ((multicast != Multicast::none && sms < 2) || (x.multicast && *x.multicast != multicast)) continue;
    for (const TileShape& tile : kBf16GemmTiles) {
      if (x.tile && !(*x.tile == tile)) continue;
      const uint64_t clocks = gemm_clocks(problem_of(x, tile, multicast, sms), tile, multicast);
      if (clocks < best.clocks) best = {tile, multicast, clocks};
    }
  }
  return best;
}

void bf16_gemm(const Bf16GemmArguments& x, hopper::Stream stream) {
  check(x);
  if (x.a.rows == 0 || x.b.rows == 0 || d_matrices(x) == 0) return;
  const int32_t sms = usable_sms(x);
  require(!x.multicast || *x.multicast == Multicast::none || sms >= 2, "multicast",
          "needs at least two multiprocessors", sms);
  const TileChoice choice = bf16_gemm_choice(x);
  const auto is = [&](int32_t rows, int32_t columns) { return choice.shape == TileShape{rows, columns}; };
  const auto go = [&](auto run_it) { run_it(x, choice.multicast, sms, stream); };
  if (is(256, 128)) return go(run_tile<256, 128>);
  if (is(128, 256)) return go(run_tile<128, 256>);
  if (is(128, 192)) return go(run_tile<128, 192>);
  if (is(128, 128)) return go(run_tile<128, 128>);
  if (is(64, 256)) return go(run_tile<64, 256>);
  if (is(64, 128)) return go(run_tile<64, 128>);
  fail("tile", "must have a kernel (a pair of kBf16GemmTiles is not listed here)", tile_text(choice.shape));
}
