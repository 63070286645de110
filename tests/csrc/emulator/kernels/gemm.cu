// The eighteen GEMM bugs of research/emulator.md section 5, in a two-consumer pipelined wgmma kernel small enough to run
// by the thousand: D[128 x 64] = A[128 x 384] B[64 x 384]^T twice. Rows of A and of B are constant, so that every element is
// 384 times a product and a value in the wrong place shows.
#include "cases.h"

using namespace planted;

namespace {

constexpr int kSlices = 3, kStages = 2, kRows = 64, kColumns = 64;

struct Shared {
  alignas(1024) uint8_t a[kStages][2][kRows * 128];
  alignas(1024) uint8_t b[kStages][kColumns * 128];
  alignas(1024) uint8_t staging[2][kRows * 128];   // 64 bf16 a row
  alignas(16) float scale[kStages][4];
  Mbarrier full[kStages], empty[kStages];
};

struct Params {
  int bug;
  const float* scale;
};

HOPPER_KERNEL(288)
gemm(HOPPER_GRID_CONSTANT const TensorMap map_a, HOPPER_GRID_CONSTANT const TensorMap map_b, HOPPER_GRID_CONSTANT const TensorMap map_d,
     HOPPER_GRID_CONSTANT const Params p) {
  auto& s = *reinterpret_cast<Shared*>(dynamic_smem());
  const int bug = p.bug;
  const uint32_t warp = threadIdx.x / 32, group = warp / 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], 8);
    }
    fence_mbarrier_init();
  }
  if (bug != 13) block_sync();
  constexpr uint32_t kBytes = 2 * kRows * 128 + kColumns * 128 + 16;

  if (warp == 8) {
    if (elect_one()) {
      for (int i = 0; i < kSlices; ++i) {
        const int stage = i % kStages;
        const uint32_t phase = i / kStages & 1;
        if (bug != 4) mbarrier_wait(&s.empty[stage], bug == 18 ? phase : phase ^ 1);
        if (bug == 1)
          mbarrier_arrive(&s.full[stage]);
        else
          mbarrier_arrive_expect_tx(&s.full[stage], bug == 6 ? kBytes - 16 : kBytes);
        for (int g = 0; g < 2; ++g) tma_load(s.a[stage][g], map_a, &s.full[stage], {i * 128, g * kRows});
        tma_load(bug == 11 ? s.b[stage] + (1 << 18) : s.b[stage], map_b, &s.full[stage], {i * 128, 0});
        bulk_load(s.scale[stage], p.scale, 16, &s.full[stage]);
      }
    }
    return;
  }

  float d[kColumns / 2], sum[kColumns / 2] = {};
  for (int i = 0; i < kSlices; ++i) {
    const int stage = i % kStages;
    if (bug == 12 && i == 0) {
      mbarrier_wait(&s.full[0], 0);
      sum[0] += s.scale[1][3] * 0.0f + *reinterpret_cast<float*>(&s.staging[group][threadIdx.x % 128 * 4]);
    }
    mbarrier_wait(&s.full[stage], i / kStages & 1);
    const float scale = s.scale[stage][threadIdx.x % 4];
    const uint64_t a = bug == 2 ? matrix_descriptor<Swizzle::b64>(s.a[stage][group]) : matrix_descriptor<Swizzle::b128>(s.a[stage][group]);
    const uint64_t b = matrix_descriptor<Swizzle::b128>(s.b[stage]);
    if (bug != 7) wgmma_fence();
    for (int k = 0; k < 128; k += 32) Wgmma<kColumns, Operand::e4m3, Operand::e4m3>::issue(d, advance(a, k), advance(b, k), k != 0);
    wgmma_commit();
    if (bug == 3)
      wgmma_wait<1>();
    else
      wgmma_wait<0>();
    for (int j = 0; j < kColumns / 2; ++j) sum[j] += scale * d[j];
    if (bug != 8) syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&s.empty[stage]);
  }

  // Twice through one staging buffer, as two tiles in a row would.
  for (int round = 0; round < 2; ++round) {
    const bool storer = threadIdx.x % 128 == 0;
    if (storer && bug != 15) bulk_wait_read<0>();
    if (group == 0 || bug == 17) barrier_sync<1>(128); else barrier_sync<2>(128);
    const uint32_t row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, lane = threadIdx.x % 32;
    for (int i = 0; i < kColumns / 8; i += 2) {
      uint32_t words[4];
      for (int j = 0; j < 4; ++j) words[j] = pack_bf16(sum[4 * i + 2 * j], sum[4 * i + 2 * j + 1]);
      uint32_t chunk = i + lane / 16;
      if (bug != 14) chunk ^= row & 7;
      stmatrix<4>(s.staging[group] + row * 128 + chunk * 16, words);
    }
    if (bug != 5) fence_proxy_async();
    if (bug == 16) {
    } else if (group == 0 || bug == 17) {
      barrier_sync<1>(128);
    } else {
      barrier_sync<2>(128);
    }
    if (storer) {
      tma_store(map_d, s.staging[group], {0, static_cast<int32_t>((2 * round + group) * kRows)});
      bulk_commit();
    }
  }
  if (threadIdx.x % 128 == 0) bulk_wait<0>();
}

}  // namespace

CASE(gemm, "mbarrier.phase|race|deadlock|mbarrier.unbalanced", "wgmma.swizzle", "wgmma.registers|data", "race|mbarrier.phase|mbarrier.misuse", "proxy",
     "mbarrier.phase|deadlock|race|mbarrier.unbalanced", "wgmma.fence", "race", "", "", "smem.bounds|tma.arguments|smem.dead_block", "smem.uninitialised",
     "mbarrier.uninitialised", "data", "race", "race|proxy", "barrier.members|race|barrier.count|proxy", "deadlock|mbarrier.misuse|race|mbarrier.phase") {
  Buffer<uint8_t> a(128 * 384, "a", false), b(64 * 384, "b", false);
  Buffer<float> scale(4, "scale", false);
  Buffer<bf16> d(256 * 64, "d", true);
  for (int i = 0; i < 128 * 384; ++i) a[i] = 0x38 + 8 * (i / 384 % 2);   // e4m3: 1 in even rows, 2 in odd ones
  for (int i = 0; i < 64 * 384; ++i) b[i] = 0x38 + i / 384 / 8;          // 1 + k/8 in the k-th eight columns
  for (int i = 0; i < 4; ++i) scale[i] = 1.0f;
  TensorMapShape shape_d;
  shape_d.rank = 2;
  shape_d.size[0] = 64;
  shape_d.size[1] = 256;
  shape_d.stride_bytes[0] = 128;
  shape_d.box[0] = 64;
  shape_d.box[1] = 64;
  launch(shape(1, 288, sizeof(Shared)), gemm, bytes_2d(a.data(), 128, 384, 64, 128, Swizzle::b128),
         bytes_2d(b.data(), 64, 384, 64, 128, Swizzle::b128), make_tensor_map(d.data(), Element::bf16, shape_d, Swizzle::b128), Params{bug, scale.data()});
  for (int i = 0; i < 256 * 64; ++i)
    if (d[i].bits != to_bf16(384.0f * static_cast<float>(1 + i / 64 % 2) * (1.0f + static_cast<float>(i % 64 / 8) / 8.0f)).bits) throw WrongData("element " + std::to_string(i) + " is " + std::to_string(to_float(d[i])));
}
