// D[64, n] = A[64, K] B[n, K]^T (+ C) by wgmma on shared memory given byte by byte. Cases: bench/proof/probe_wgmma.py.
//
// Offsets and swizzle of the descriptors are given from outside, so that every field is under test (PTX ISA, "Matrix
// descriptor format"): start address, leading and stride byte offset, swizzle.
#include "probe.h"

namespace {

using hopper::Major;
using hopper::Operand;

struct OperandImage {
  uint32_t bytes;            // of one tile's image; registers of A: bytes of all steps
  uint32_t lbo, sbo, step;   // bytes
  uint32_t swizzle;          // hopper::Swizzle
};

struct Params {
  const uint8_t *a, *b;
  const float* c;
  float* d;
  OperandImage a_image, b_image;
  uint32_t steps;
  bool with_c;
};

HOPPER_DEVICE uint64_t descriptor(const void* start, const OperandImage& image) {
  return hopper::matrix_descriptor(start, static_cast<hopper::Swizzle>(image.swizzle), image.lbo, image.sbo);
}

template <int n, Operand form, bool registers, Major a_major, Major b_major>
HOPPER_KERNEL(128)
multiply(HOPPER_GRID_CONSTANT const Params p) {
  using Multiply = hopper::Wgmma<n, form, form, a_major, b_major>;
  uint8_t* smem = hopper::dynamic_smem();
  uint8_t* smem_b = smem + (registers ? 0 : (p.a_image.bytes + 1023) / 1024 * 1024);
  const uint32_t tile = blockIdx.x;
  if constexpr (!registers) probe::fill(smem, p.a + tile * p.a_image.bytes, p.a_image.bytes);
  probe::fill(smem_b, p.b + tile * p.b_image.bytes, p.b_image.bytes);

  float d[n / 2];
  const uint64_t place = (static_cast<uint64_t>(tile) * 128 + threadIdx.x) * (n / 2);
  HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) d[i] = p.c[place + i];
  for (uint32_t step = 0; step < p.steps; ++step) {
    hopper::wgmma_fence();
    const bool accumulate = p.with_c || step != 0;
    const uint64_t b = descriptor(smem_b + step * p.b_image.step, p.b_image);
    if constexpr (registers) {
      const auto* words = reinterpret_cast<const uint32_t*>(p.a + tile * p.a_image.bytes) + (step * 128 + threadIdx.x) * 4;
      uint32_t a[4];
      HOPPER_UNROLL for (int i = 0; i < 4; ++i) a[i] = words[i];
      hopper::wgmma_fence();
      Multiply::issue(d, a, b, accumulate);
      hopper::wgmma_commit();
      hopper::wgmma_wait<0>();   // the next step loads other words into these registers
    } else {
      Multiply::issue(d, descriptor(smem + step * p.a_image.step, p.a_image), b, accumulate);
    }
  }
  if constexpr (!registers) {
    hopper::wgmma_commit();
    hopper::wgmma_wait<0>();
  }
  HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) p.d[place + i] = d[i];
}

struct Wanted {
  int64_t n, form, registers, a_major, b_major, tiles;
};

template <int n, Operand form, bool registers = false, Major a_major = Major::k, Major b_major = Major::k>
bool try_launch(const Wanted& w, const Params& p) {
  if (w.n != n || w.form != static_cast<int64_t>(form) || w.registers != registers ||
      w.a_major != static_cast<int64_t>(a_major) || w.b_major != static_cast<int64_t>(b_major))
    return false;
  const size_t smem = 1024 + (registers ? 0 : (p.a_image.bytes + 1023) / 1024 * 1024) + p.b_image.bytes;
  hopper::launch(probe::grid(static_cast<uint32_t>(w.tiles), 128, smem), multiply<n, form, registers, a_major, b_major>, p);
  return true;
}

// n = 8, 16, .. 256
template <Operand form, int... i>
bool try_every_n(const Wanted& w, const Params& p, std::integer_sequence<int, i...>) {
  return (try_launch<8 * (i + 1), form>(w, p) || ...);
}

template <Operand form>
bool try_16_bit(const Wanted& w, const Params& p) {
  using enum Major;
  return try_launch<8, form>(w, p) || try_launch<32, form>(w, p) || try_launch<64, form>(w, p) ||
         try_launch<128, form>(w, p) || try_launch<256, form>(w, p) || try_launch<16, form, true>(w, p) ||
         try_launch<64, form, false, k, mn>(w, p) || try_launch<128, form, false, k, mn>(w, p) ||
         try_launch<64, form, false, mn, k>(w, p) || try_launch<64, form, false, mn, mn>(w, p);
}

void run(const probe::Parameters& given, probe::Memory& memory) {
  const auto u = [&](uint32_t i) { return static_cast<uint32_t>(given[i]); };
  Params p{};
  p.a = memory.at<uint8_t>(0);
  p.b = memory.at<uint8_t>(1);
  p.c = memory.at<float>(2);
  p.d = memory.at<float>(3);
  p.a_image = {u(16), u(5), u(6), u(7), u(4)};
  p.b_image = {u(17), u(10), u(11), u(12), u(9)};
  p.steps = u(14);
  p.with_c = given[15] != 0;
  const Wanted wanted{given[1], given[0], given[2], given[3], given[8], given[13]};
  using enum Operand;
  const bool known = try_every_n<e4m3>(wanted, p, std::make_integer_sequence<int, 32>()) ||
                     try_launch<32, e4m3, true>(wanted, p) || try_launch<32, e5m2>(wanted, p) ||
                     try_launch<64, e5m2>(wanted, p) || try_launch<32, e5m2, true>(wanted, p) ||
                     try_16_bit<bf16>(wanted, p) || try_16_bit<f16>(wanted, p);
  if (!known) throw std::runtime_error("wgmma.cu has no instance for this case: add it there");
}

}  // namespace

PROBE(run)
