// wgmma on its own: bf16 in both majors, A from registers, and who may touch registers when.
#include "cases.h"

using namespace planted;

namespace {

constexpr int kN = 16;

struct Shared {
  alignas(1024) bf16 a[64 * 64], b[64 * 64];
};

// Writes element (row, column) of a matrix whose rows are 128 bytes, swizzled.
HOPPER_DEVICE void put(bf16* m, uint32_t row, uint32_t column, float value) {
  m[row * 64 + ((column / 8 ^ (row & 7)) * 8 + column % 8)] = to_bf16(value);
}

HOPPER_DEVICE float value_a(uint32_t m, uint32_t k) { return static_cast<float>((m * 3 + k * 5) % 7) - 3.0f; }
HOPPER_DEVICE float value_b(uint32_t n, uint32_t k) { return static_cast<float>((n * 2 + k * 3) % 5) - 2.0f; }

HOPPER_DEVICE uint32_t row_of(uint32_t t, int i) { return t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8; }
HOPPER_DEVICE uint32_t column_of(uint32_t t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// D[64 x 16] = A[64 x 64] B[16 x 64]^T. K-major: rows of K. MN-major: A and B are stored as K rows of M or N.
template <Major major>
HOPPER_KERNEL(128)
multiply(float* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  const uint32_t t = threadIdx.x;
  for (uint32_t i = t; i < 64 * 64; i += 128) {
    const uint32_t r = i / 64, c = i % 64;
    if constexpr (major == Major::k) {
      put(s.a, r, c, value_a(r, c));
      put(s.b, r, c, value_b(r, c));
    } else {
      put(s.a, r, c, value_a(c, r));
      put(s.b, r, c, value_b(c, r));
    }
  }
  fence_proxy_async();
  block_sync();
  float d[kN / 2], e[kN / 2] = {};
  const Swizzle swizzle = Swizzle::b128;
  const uint32_t leading = bug == 1 ? 8 : 1024;
  uint64_t a = matrix_descriptor(s.a, swizzle, 1024, 1024);
  uint64_t b = matrix_descriptor(s.b, swizzle, leading, 1024);
  if (bug == 1) b |= uint64_t{1} << 50;   // a base offset, for a tile that starts on its own pattern
  if (bug == 2) a = matrix_descriptor(s.a + (1 << 16), swizzle, 1024, 1024);
  using M = Wgmma<kN, Operand::bf16, Operand::bf16, major, major>;
  wgmma_fence();
  const auto step = [](uint64_t descriptor, int k) { return advance(descriptor, major == Major::k ? k * 2 : k * 128); };
  for (int k = 0; k < 64; k += 16) {
    if (bug == 3 && t / 32 == 2 && k == 16)
      M::issue(d, step(a, k), step(b, 0), k != 0);      // one warp differs
    else if (k == 48)
      M::issue(e, step(a, k), step(b, k), true);        // legal: cleared before the fence
    else
      M::issue(d, step(a, k), step(b, k), k != 0);
    if (bug == 4 && k == 16) {                          // given back, changed, and passed again without a fence
      wgmma_commit();
      wgmma_wait<0>();
      d[0] *= 1;
    }
    if (bug == 5 && k == 16) d[0] += 1;                 // owned by the tensor core
  }
  if (bug == 6) {                                       // half of the registers of the product in flight
    float(&part)[4] = *reinterpret_cast<float(*)[4]>(&d[2]);
    Wgmma<8, Operand::bf16, Operand::bf16, major, major>::issue(part, a, b, false);
  }
  if (bug != 7) wgmma_commit();
  if (bug == 8) {
    out[t] = d[1];
    wgmma_wait<0>();
  } else if (bug == 9) {
    return;
  } else {
    wgmma_wait<0>();
  }
  for (int i = 0; i < kN / 2; ++i) out[row_of(t, i) * kN + column_of(t, i)] = d[i] + e[i];
}

float expected(size_t i) {
  float sum = 0;
  for (uint32_t k = 0; k < 64; ++k) sum += value_a(static_cast<uint32_t>(i / kN), k) * value_b(i % kN, k);
  return sum;
}

// A from registers, twice with other words.
HOPPER_KERNEL(128) from_registers(float* out, int bug) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  const uint32_t t = threadIdx.x;
  for (uint32_t i = t; i < 64 * 64; i += 128) put(s.b, i / 64, i % 64, value_b(i / 64, i % 64));
  fence_proxy_async();
  block_sync();
  const auto word = [&](uint32_t k0, int w) {
    const uint32_t row = t / 32 * 16 + t % 32 / 4 + w % 2 * 8, k = k0 + t % 4 * 2 + w / 2 * 8;
    return pack_bf16(value_a(row, k), value_a(row, k + 1));
  };
  float d[kN / 2];
  uint32_t a[4][4];
  const uint64_t b = matrix_descriptor<Swizzle::b128>(s.b);
  for (int w = 0; w < 4; ++w) a[0][w] = word(0, w);
  if (bug != 2) wgmma_fence();
  using M = Wgmma<kN, Operand::bf16, Operand::bf16>;
  for (int i = 0; i < 4; ++i) {
    M::issue(d, a[bug == 1 ? 0 : i], advance(b, i * 32), i != 0);
    // The next words while this product is in flight: into other registers.
    if (i < 3)
      for (int w = 0; w < 4; ++w) a[bug == 1 ? 0 : i + 1][w] = word(16 * (i + 1), w);
    if (i < 3) wgmma_fence();
  }
  wgmma_commit();
  if (bug == 3) {
    if (t < 32) wgmma_wait<0>();   // one warp waits
  } else {
    wgmma_wait<0>();
  }
  for (int i = 0; i < kN / 2; ++i) out[row_of(t, i) * kN + column_of(t, i)] = d[i];
}

// A block whose last warps are no whole warpgroup.
HOPPER_KERNEL(192) part_of_a_group(float* out, int bug) {
  if (threadIdx.x < 128 && bug == 1) return;
  wgmma_fence();
  if (bug == 1) {
    wgmma_commit();
    wgmma_wait<0>();
  }
  out[threadIdx.x] = 0;
}

}  // namespace

#define WGMMA_BUGS                                                                                                      \
  "wgmma.descriptor|data", "wgmma.descriptor|smem.bounds", "wgmma.divergent", "wgmma.fence", "wgmma.registers",    \
      "wgmma.registers", "wgmma.unfinished|data|wgmma.registers", "wgmma.registers|data", "wgmma.unfinished"

CASE(wgmma_k_major, WGMMA_BUGS) {
  Buffer<float> out(64 * kN, "out", true);
  launch(shape(1, 128, sizeof(Shared)), multiply<Major::k>, out.data(), bug);
  out.expect(expected);
}

CASE(wgmma_mn_major, WGMMA_BUGS) {
  Buffer<float> out(64 * kN, "out", true);
  launch(shape(1, 128, sizeof(Shared)), multiply<Major::mn>, out.data(), bug);
  out.expect(expected);
}

CASE(wgmma_from_registers, "wgmma.registers", "wgmma.fence", "wgmma.registers|wgmma.unfinished") {
  Buffer<float> out(64 * kN, "out", true);
  launch(shape(1, 128, sizeof(Shared)), from_registers, out.data(), bug);
  out.expect(expected);
}

CASE(wgmma_group, "wgmma.divergent") {
  Buffer<float> out(192, "out", true);
  launch(shape(1, 192, 1024), part_of_a_group, out.data(), bug);
}
