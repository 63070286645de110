// Two questions about the SM (research/gemm-quant.md sections 6.2 and 9), asked by timing: bench/proof/micro.py.
//
//   port    math warpgroups multiply from shared memory; a producer meanwhile lets bulk copies write other shared memory.
//           If both share the 128 B/clk port, the copies cost time although nobody waits for them.
//   phase   two math warpgroups multiply 128 of K and promote: in step with each other; one half a slice later; with a
//           second partial buffer, so that the next slice multiplies while this one is promoted.
#include "probe.h"

namespace {

using hopper::Operand;

constexpr int kStages = 4;
constexpr uint32_t kCopyBytes = 16384;

struct Shared {
  alignas(1024) uint8_t a[2][64 * 128];    // one tile of A for each math warpgroup, K-major, 128 B swizzle
  alignas(1024) uint8_t b[256 * 128];
  alignas(1024) uint8_t landing[kStages][kCopyBytes];
  hopper::Mbarrier barrier[kStages];
};

struct Params {
  const uint8_t* source;   // kStages * kCopyBytes, stays in L2
  float* sink;             // so that nothing is optimised away
  uint32_t slices;         // of 128 of K per math warpgroup
  uint32_t copies;         // per slice, 16 KiB each
};

HOPPER_DEVICE uint64_t matrix(const void* start) { return hopper::matrix_descriptor<hopper::Swizzle::b128>(start); }

template <int n>
HOPPER_DEVICE void slice(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {
  using Multiply = hopper::Wgmma<n, Operand::e4m3, Operand::e4m3>;
  HOPPER_UNROLL for (int k = 0; k < 4; ++k) 
    Multiply::issue(d, hopper::advance(a, 32 * k), hopper::advance(b, 32 * k), accumulate || k != 0);
  hopper::wgmma_commit();
}

HOPPER_DEVICE void start(Shared& shared) {
  for (uint32_t i = threadIdx.x; i < sizeof(shared.a) + sizeof(shared.b); i += blockDim.x)
    reinterpret_cast<uint8_t*>(&shared)[i] = static_cast<uint8_t>(i * 37 % 0x70);   // finite numbers, not all alike
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) hopper::mbarrier_init(&shared.barrier[i], 1);
    hopper::fence_mbarrier_init();
  }
  hopper::fence_proxy_async();
  hopper::block_sync();
}

template <int groups, int n>
HOPPER_KERNEL(128 * groups + 128)
port_kernel(HOPPER_GRID_CONSTANT const Params p) {
  auto& shared = *reinterpret_cast<Shared*>(hopper::dynamic_smem());
  start(shared);
  const uint32_t group = threadIdx.x / 128;
  if (group < groups) {
    float d[n / 2];
    HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) d[i] = 0.0f;
    const uint64_t a = matrix(shared.a[group]), b = matrix(shared.b);
    for (uint32_t i = 0; i < p.slices; ++i) {
      hopper::wgmma_fence();
      slice<n>(d, a, b, true);
      hopper::wgmma_wait<0>();
    }
    float total = 0.0f;
    HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) total += d[i];
    p.sink[blockIdx.x * blockDim.x + threadIdx.x] = total;
  } else if (threadIdx.x % 128 == 0) {
    const uint32_t all = p.slices * p.copies;
    for (uint32_t i = 0; i < all + kStages; ++i) {   // kStages copies in flight
      const uint32_t stage = i % kStages;
      if (i >= kStages && i - kStages < all) hopper::mbarrier_wait(&shared.barrier[stage], (i / kStages - 1) & 1);
      if (i < all) {
        hopper::mbarrier_arrive_expect_tx(&shared.barrier[stage], kCopyBytes);
        hopper::bulk_load(shared.landing[stage], p.source + stage * kCopyBytes, kCopyBytes, &shared.barrier[stage]);
      }
    }
  }
}

enum class Phase { together, offset, second_partial };

template <Phase phase>
HOPPER_KERNEL(256)
phase_kernel(HOPPER_GRID_CONSTANT const Params p) {
  constexpr int n = 128;
  auto& shared = *reinterpret_cast<Shared*>(hopper::dynamic_smem());
  start(shared);
  const uint32_t group = threadIdx.x / 128;
  const uint64_t a = matrix(shared.a[group]), b = matrix(shared.b);
  float sum[n / 2], first[n / 2], second[n / 2];
  HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) sum[i] = first[i] = second[i] = 0.0f;
  const float scale = 0.5f + static_cast<float>(blockIdx.x);
  const auto promote = [&](const float (&from)[n / 2]) {
    HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) sum[i] = from[i] * scale + sum[i];
  };
  if constexpr (phase == Phase::second_partial) {   // one slice multiplies while the one before is promoted
    const auto begin = [&](float (&to)[n / 2]) {
      hopper::register_fence(to);
      hopper::wgmma_fence();
      slice<n>(to, a, b, false);
    };
    const auto finish = [&](float (&from)[n / 2]) {
      hopper::register_fence(from);
      promote(from);
    };
    // ptxas serialises a wgmma that is in flight over the back edge of a loop (C7514), so eight slices are written out.
    for (uint32_t i = 0; i < p.slices; i += 8) {
      begin(first);
      HOPPER_UNROLL for (int j = 0; j < 3; ++j) {
        begin(second);
        hopper::wgmma_wait<1>();
        finish(first);
        begin(first);
        hopper::wgmma_wait<1>();
        finish(second);
      }
      begin(second);
      hopper::wgmma_wait<1>();
      finish(first);
      hopper::wgmma_wait<0>();
      finish(second);
    }
  } else {
    if (phase == Phase::offset && group == 1) {   // half a slice of work before the first
      using Half = hopper::Wgmma<n, Operand::e4m3, Operand::e4m3>;
      hopper::wgmma_fence();
      Half::issue(first, a, b, false);
      Half::issue(first, hopper::advance(a, 32), hopper::advance(b, 32), true);
      hopper::wgmma_commit();
      hopper::wgmma_wait<0>();
    }
    for (uint32_t i = 0; i < p.slices; ++i) {
      hopper::wgmma_fence();
      slice<n>(first, a, b, false);
      hopper::wgmma_wait<0>();
      promote(first);
    }
  }
  float total = 0.0f;
  HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) total += sum[i];
  p.sink[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

// Parameters: variant, blocks, slices, copies a slice, launches. Buffers: source, sink, milliseconds.
void run(const probe::Parameters& given, probe::Memory& memory) {
  const Params p{memory.at<const uint8_t>(0), memory.at<float>(1), static_cast<uint32_t>(given[2]),
                 static_cast<uint32_t>(given[3])};
  const auto blocks = static_cast<uint32_t>(given[1]);
  const auto time = [&](uint32_t threads, auto kernel) {
    const float ms = probe::milliseconds(static_cast<int>(given[4]), [&] {
      hopper::launch(probe::grid(blocks, threads, sizeof(Shared)), kernel, p);
    });
#ifdef HOPPER_EMULATED
    *memory.at<float>(2) = ms;
#else
    probe::check(cudaMemcpy(memory.at<float>(2), &ms, sizeof(ms), cudaMemcpyHostToDevice), "result");
#endif
  };
  switch (given[0]) {
    case 0: return time(256, port_kernel<1, 128>);
    case 1: return time(256, port_kernel<1, 256>);
    case 2: return time(384, port_kernel<2, 128>);
    case 3: return time(384, port_kernel<2, 192>);
    case 4: return time(384, port_kernel<2, 256>);
    case 5: return time(256, phase_kernel<Phase::together>);
    case 6: return time(256, phase_kernel<Phase::offset>);
    case 7: return time(256, phase_kernel<Phase::second_partial>);
    default: throw std::runtime_error("micro.cu has no such variant");
  }
}

}  // namespace

PROBE(run)
