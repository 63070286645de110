// fp8_gemm_masked: an A and a D for every group, of which the first `counts` rows exist; decoding with fixed buffers.
#include "fp8_gemm_grouped_host.h"

using namespace fp8_gemm_kernels;

TileChoice fp8_gemm_masked_choice(const Fp8GroupedGemmArguments& x) {
  return choice_of(x, TileProblem{x.m * x.groups, x.n, x.k, usable_sms(x.num_sms), true, x.groups}, kFp8GroupedTiles);
}

void fp8_gemm_masked(const Fp8GroupedGemmArguments& arguments, hopper::Stream stream) {
  const Fp8GroupedGemmArguments x = with_plain_strides(arguments, true);
  check(x, true);
  if (x.m == 0 || x.n == 0 || x.groups == 0) return;
  GroupedLaunch<RowsByMask>{x, RowsByMask{x.counts}, x.m * x.groups, stream}(fp8_gemm_masked_choice(x));
}
