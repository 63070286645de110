// fp8_gemm_grouped: rows of groups packed in one A and one D, their borders in `offsets` on the device.
#include "fp8_gemm_grouped_host.h"

using namespace fp8_gemm_kernels;

TileChoice fp8_gemm_grouped_choice(const Fp8GroupedGemmArguments& x) {
  return choice_of(x, TileProblem{x.m, x.n, x.k, usable_sms(x.num_sms), true, x.groups}, kFp8GroupedTiles);
}

void fp8_gemm_grouped(const Fp8GroupedGemmArguments& arguments, hopper::Stream stream) {
  const Fp8GroupedGemmArguments x = with_plain_strides(arguments, false);
  check(x, false);
  if (x.m == 0 || x.n == 0 || (x.groups == 0 && !x.clear_rest)) return;
  GroupedLaunch<RowsByOffsets>{x, RowsByOffsets{x.offsets}, x.m, stream}(fp8_gemm_grouped_choice(x));
}
