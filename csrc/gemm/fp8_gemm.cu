// Host side of fp8_gemm: limits, tile choice, launch. One kernel per tile, output type and cluster size.
#include "fp8_gemm_host.h"

namespace {

using namespace fp8_gemm_kernels;

// The stride of a matrix of one row means nothing, and frameworks put anything there; TMA wants it in order.
Fp8GemmArguments with_plain_strides(Fp8GemmArguments x) {
  if (x.m == 1) x.a_stride = round_up(x.k, 16), x.d_stride = round_up(x.n, 8);
  if (x.n == 1) x.b_stride = round_up(x.k, 16);
  if (blocks(x.k) == 1) x.scale_a_stride = round_up(x.m, 4);
  if (blocks(x.n) == 1) x.scale_b_stride = blocks(x.k);
  return x;
}

void check(const Fp8GemmArguments& x) {
  check_size("m", x.m);
  check_size("n", x.n);
  check_size("k", x.k);
  check_knobs(x, kFp8GemmTiles);
  const int64_t element = bytes_of(x.d_type);
  const Matrices a = one_matrix("a", "a_stride", x.a, x.m, x.k, x.a_stride, 1);
  const Matrices b = one_matrix("b", "b_stride", x.b, x.n, x.k, x.b_stride, 1);
  const Matrices scale_a = one_matrix("scale_a", "scale_a_stride", x.scale_a, blocks(x.k), x.m, x.scale_a_stride, 4);
  const Matrices scale_b = one_matrix("scale_b", "scale_b_stride", x.scale_b, blocks(x.n), blocks(x.k), x.scale_b_stride, 4);
  const Matrices d = one_matrix("d", "d_stride", x.d, x.m, x.n, x.d_stride, element);
  check_matrices(a, 16);
  check_matrices(b, 16);
  check_matrices(scale_a, 16);
  check_matrices(scale_b, 4);
  check_matrices(d, element);
  for (const Matrices& input : {a, b, scale_a, scale_b}) check_apart(d, input);
}

template <class C>
void run_dense(const Fp8GemmArguments& x, Multicast multicast, int32_t sms, hopper::Stream stream) {
  const TileGrid grid{static_cast<int32_t>(x.n), C::kTileRows, C::kTileColumns, multicast};
  const DenseTiles tiles = dense_tiles(grid, static_cast<int32_t>(x.m), std::max(sms / C::kCluster, 1));
  Fp8GroupedGemmArguments one{x};
  one.groups = 1;
  run<C>(one, tiles, tiles.raster.count(), sms, stream);
}

}  // namespace

TileChoice fp8_gemm_choice(const Fp8GemmArguments& x) {
  return choice_of(x, TileProblem{x.m, x.n, x.k, usable_sms(x.num_sms)}, kFp8GemmTiles);
}

void fp8_gemm(const Fp8GemmArguments& arguments, hopper::Stream stream) {
  const Fp8GemmArguments x = with_plain_strides(arguments);
  check(x);
  if (x.m == 0 || x.n == 0) return;
  const TileChoice choice = fp8_gemm_choice(x);
  const int32_t sms = usable_sms(x.num_sms);
  check_cluster(choice.multicast, sms);
  with_kernel<kFp8GemmTiles>(choice, x.d_type == OutputType::bf16, [&]<int Rows, int Columns, class D, int Cluster>() {
    run_dense<Config<Rows, Columns, D, Cluster>>(x, choice.multicast, sms, stream);
  });
}
