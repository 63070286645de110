// Host side of bf16_gemm: limits, tile choice, tensor maps, launch. One kernel per tile, pair of majors and cluster size.
#include "bf16_gemm.h"

#include "bf16_gemm.cuh"
#include "host.h"

namespace {

using namespace bf16_gemm_kernels;
using namespace gemm_host;

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

int64_t d_matrices(const Bf16GemmArguments& x) {
  return x.grouping == Grouping::none || x.grouping == Grouping::rows_by_offsets ? 1 : x.groups;
}

void check(const Bf16GemmArguments& x) {
  check_size("m", x.a.rows);
  check_size("n", x.b.rows);
  check_size("k", x.k);
  check_size("groups", x.groups);
  check_knobs(x, kBf16GemmTiles);
  require(x.d_type == Dtype::bf16 || x.d_type == Dtype::f32, "d", "must be bfloat16 or float32", name_of(x.d_type));
  const bool by_index = x.grouping != Grouping::none;
  require(!by_index || x.index != nullptr || x.groups == 0, "index", "must not be null with groups", "a null pointer");
  const int64_t size = size_of(x.d_type), m = x.a.rows, n = x.b.rows;
  if (m == 0 || n == 0 || d_matrices(x) == 0) return;
  const Matrices d{"d", "d_stride", "", x.d, d_matrices(x), m, n, x.d_matrix_stride, m == 1 ? n : x.d_stride, size};
  check_matrix(d, size);
  for (const auto& [name, input] : {std::pair{"a", x.a}, std::pair{"b", x.b}}) {
    if (x.k == 0 || input.matrices == 0) continue;
    require(input.data != nullptr, name, "must not be null unless it is empty", "a null pointer");
    layout_of(name, input, x.k);
    const int64_t last =
        (input.matrices - 1) * input.matrix_stride + (input.rows - 1) * input.row_stride + (x.k - 1) * input.k_stride;
    check_apart(d, name, input.data, (last + 1) * 2);
  }
}

TensorMap map_of_operand(const Bf16Operand& x, const Layout& layout, int64_t k, int32_t box_rows, int32_t box_k) {
  const auto map = [&](int64_t columns, int64_t rows, int32_t box) {
    return map_of(x.data, hopper::Element::bf16, columns, rows, layout.stride, 64, box, Swizzle::b128, x.matrices,
                  layout.matrix_stride);
  };
  return layout.major == Major::k ? map(k, x.rows, box_rows) : map(x.rows, k, box_k);
}

TensorMap map_of_d(const Bf16GemmArguments& x) {
  const int64_t stride = x.a.rows == 1 ? round_up(x.b.rows, 8) : x.d_stride;
  return map_of(x.d, hopper::Element::bf16, x.b.rows, x.a.rows, stride, kPiece, kPiece, Swizzle::b128, d_matrices(x),
                d_matrices(x) == 1 ? 8 : x.d_matrix_stride);
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
    map_a = map_of_operand(x.a, a, x.k, C::kTileRows / share_a, kOperandSlice / share_a);
    map_b = map_of_operand(x.b, b, x.k, C::kTileColumns / share_b, kOperandSlice / share_b);
  }
  if (p.tma_store) map_d = map_of_d(x);
  hopper::launch(launch_config<C>("bf16_gemm", std::min<int64_t>(units_of(x, grid), clusters), x.programmatic, stream),
                 bf16_gemm_kernel<C>, map_a, map_b, map_d, p);
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
  const int32_t sms = usable_sms(x.num_sms);
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
  const int32_t sms = usable_sms(x.num_sms);
  check_cluster(x.multicast, sms);
  const TileChoice choice = bf16_gemm_choice(x);
  with_tile<kBf16GemmTiles>(choice.shape, [&]<int Rows, int Columns>() {
    run_tile<Rows, Columns>(x, choice.multicast, sms, stream);
  });
}
