// What the two grouped launchers share: limits, the choice of a kernel, its launch.
#pragma once

#include "fp8_gemm_host.h"

namespace fp8_gemm_kernels {

// The strides of one group, one row or one block mean nothing, and frameworks put anything there; TMA wants them in
// order. Matrices that all groups share have a group stride of 0.
inline Fp8GroupedGemmArguments with_plain_strides(Fp8GroupedGemmArguments x, bool batched) {
  if (x.m == 1) x.a_stride = round_up(x.k, 16), x.d_stride = round_up(x.n, 8);
  if (x.n == 1) x.b_stride = round_up(x.k, 16);
  if (blocks(x.k) == 1) x.scale_a_stride = round_up(x.m, 4);
  if (blocks(x.n) == 1) x.scale_b_stride = blocks(x.k);
  if (x.groups == 1) {
    x.b_group_stride = x.n * x.b_stride;
    x.scale_b_group_stride = blocks(x.n) * x.scale_b_stride;
    x.a_group_stride = x.m * x.a_stride;
    x.scale_a_group_stride = blocks(x.k) * x.scale_a_stride;
    x.d_group_stride = x.m * x.d_stride;
  }
  if (!batched) x.a_group_stride = x.scale_a_group_stride = x.d_group_stride = 0;
  return x;
}

inline void check(const Fp8GroupedGemmArguments& x, bool batched) {
  check_size("m", x.m);
  check_size("n", x.n);
  check_size("k", x.k);
  require(x.groups >= 0 && x.groups <= kFp8GemmMaxGroups, "groups",
          "must be in 0..512, for their table lies in shared memory", x.groups);
  require(!x.accumulate, "accumulate", "must be false, for grouped products have no such kernels", x.accumulate);
  check_knobs(x, kFp8GroupedTiles);
  const char* name = batched ? "counts" : "offsets";
  const int32_t* rows = batched ? x.counts : x.offsets;
  require(rows != nullptr || (batched && x.groups == 0), name, "must not be null", "a null pointer");
  require(is_aligned(rows, 4), name, "must be aligned to its elements", rows);
  const int64_t element = bytes_of(x.d_type), many = x.groups, batch = batched ? many : 1;
  const Matrices a{"a", "a_stride", "a_group_stride", x.a, batch, x.m, x.k, x.a_group_stride, x.a_stride, 1};
  const Matrices b{"b", "b_stride", "b_group_stride", x.b, many, x.n, x.k, x.b_group_stride, x.b_stride, 1};
  const Matrices scale_a{"scale_a", "scale_a_stride", "scale_a_group_stride", x.scale_a, batch, blocks(x.k), x.m,
                         x.scale_a_group_stride, x.scale_a_stride, 4};
  const Matrices scale_b{"scale_b", "scale_b_stride", "scale_b_group_stride", x.scale_b, many, blocks(x.n),
                         blocks(x.k), x.scale_b_group_stride, x.scale_b_stride, 4};
  const Matrices index{name, "", "", rows, 1, 1, many + (batched ? 0 : 1), 0, 0, 4};
  const Matrices d{"d", "d_stride", "d_group_stride", x.d, batch, x.m, x.n, x.d_group_stride, x.d_stride, element};
  check_matrices(a, 16);
  check_matrices(b, 16);
  check_matrices(scale_a, 16);
  check_matrices(scale_b, 4);
  check_matrices(d, element);
  for (const Matrices& input : {a, b, scale_a, scale_b, index}) check_apart(d, input);
}

// Rows: RowsByOffsets or RowsByMask. `rows` of all groups together: what the tiles are counted from.
template <class Rows>
struct GroupedLaunch {
  const Fp8GroupedGemmArguments& x;
  Rows rows;
  int64_t total_rows;
  hopper::Stream stream;

  template <class C>
  void run_config(Multicast multicast, int32_t sms) const {
    const TileGrid grid{static_cast<int32_t>(x.n), C::kTileRows, C::kTileColumns, multicast};
    const int64_t unit_rows = int64_t{C::kTileRows} * grid.m_pair();
    // Each group has at most one tile (pair) that is not full. One CTA at least: there may be rows to clear.
    const int64_t units = (total_rows / unit_rows + std::min<int64_t>(x.groups, total_rows)) * grid.n_units();
    run<C>(x, grouped_tiles(grid, rows, x.groups), std::max<int64_t>(units, 1), sms, stream);
  }

  void operator()(const TileChoice& choice) const {
    const int32_t sms = usable_sms(x.num_sms);
    check_cluster(choice.multicast, sms);
    with_kernel<kFp8GroupedTiles>(choice, x.d_type == OutputType::bf16, [&]<int R, int C, class D, int Cluster>() {
      run_config<Config<R, C, D, Cluster, GroupedTiles<Rows>>>(choice.multicast, sms);
    });
  }
};

}  // namespace fp8_gemm_kernels
