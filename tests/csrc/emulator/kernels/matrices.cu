// ldmatrix and stmatrix, plain and transposed.
#include "cases.h"

using namespace planted;

namespace {

// A 16 x 16 matrix of 16-bit elements goes through registers and comes out transposed twice, so the same.
HOPPER_KERNEL(32) move(const uint16_t* in, uint16_t* out, int bug) {
  auto* a = reinterpret_cast<uint16_t*>(dynamic_smem());
  auto* b = a + 256;
  const uint32_t lane = threadIdx.x;
  for (uint32_t i = lane; i < 256; i += 32) a[i] = in[i];
  if (bug != 1) syncwarp();
  uint32_t r[4];
  const uint32_t row = lane % 16, column = lane / 16 * 8;
  ldmatrix<4, true>(r, a + row * 16 + column + (bug == 2 ? 4 : 0));
  uint16_t* to = b + row * 16 + column;
  if (bug == 3) to += 2;
  if (bug == 4) {
    stmatrix<4>(to, r);
  } else {
    stmatrix<4, true>(to, r);
  }
  if (bug != 5) syncwarp();
  for (uint32_t i = 0; i < 8; ++i) out[lane * 8 + i] = b[lane * 8 + i];
}

}  // namespace

CASE(matrices, "race", "matrix.arguments", "matrix.arguments", "data", "race") {
  Buffer<uint16_t> in(256, "in", false), out(256, "out", true);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i * 257);
  launch(shape(1, 32, 2048), move, in.data(), out.data(), bug);
  out.expect([](size_t i) { return static_cast<uint16_t>(i * 257); });
}
