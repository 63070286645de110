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
  require(x.num_sms >= 0, "num_sms", "must not be negative (0 means all)", x.num_sms);
  check_tile(x, kFp8GemmTiles);
  const int64_t element = bytes_of(x.d_type);
  const auto one = [](const char* name, const char* stride_name, const void* p, int64_t rows, int64_t row,
                      int64_t stride, int64_t bytes) {
    return Matrices{name, stride_name, "", p, 1, rows, row, 0, stride, bytes};
  };
  const Matrices a = one("a", "a_stride", x.a, x.m, x.k, x.a_stride, 1);
  const Matrices b = one("b", "b_stride", x.b, x.n, x.k, x.b_stride, 1);
  const Matrices scale_a = one("scale_a", "scale_a_stride", x.scale_a, blocks(x.k), x.m, x.scale_a_stride, 4);
  const Matrices scale_b = one("scale_b", "scale_b_stride", x.scale_b, blocks(x.n), blocks(x.k), x.scale_b_stride, 4);
  const Matrices d = one("d", "d_stride", x.d, x.m, x.n, x.d_stride, element);
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

template <int Rows, int Columns>
void run_tile(const Fp8GemmArguments& x, Multicast multicast, int32_t sms, hopper::Stream stream) {
  const bool pair = multicast != Multicast::none;
  if (x.d_type == OutputType::bf16) {
    pair ? run_dense<Config<Rows, Columns, bf16, 2>>(x, multicast, sms, stream)
         : run_dense<Config<Rows, Columns, bf16, 1>>(x, multicast, sms, stream);
  } else {
    pair ? run_dense<Config<Rows, Columns, float, 2>>(x, multicast, sms, stream)
         : run_dense<Config<Rows, Columns, float, 1>>(x, multicast, sms, stream);
  }
}

}  // namespace

TileChoice fp8_gemm_choice(const Fp8GemmArguments& x) {
  return choice_of(x, TileProblem{x.m, x.n, x.k, usable_sms(x)}, kFp8GemmTiles);
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
