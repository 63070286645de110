// Tensor copies by the TMA engine (async proxy). PTX ISA: "cp.async.bulk.tensor",
// "cp.reduce.async.bulk.tensor", "cp.async.bulk.prefetch.tensor", "prefetch.tensormap". Coordinates are elements, innermost first; what lies
// outside of the tensor is filled on loads (and counted in the barrier's bytes) and skipped on stores. Shared
// addresses: 128-byte aligned.
//
// One thread issues; `elect_one` picks it. The map is a __grid_constant__ parameter of the kernel.
#pragma once

#include "cache_hint.h"
#include "mbarrier.h"
#include "text.h"

namespace hopper {

// Fetches the descriptor ahead of its first use.
HOPPER_DEVICE void tma_prefetch([[maybe_unused]] const TensorMap& map) {
#ifndef HOPPER_EMULATED
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

#ifndef HOPPER_EMULATED
namespace detail {

template <int i, int rank>
HOPPER_DEVICE int32_t coordinate(const int32_t (&c)[rank]) {
  if constexpr (i < rank) return c[i];
  return 0;  // of an operand that the instruction's text does not name: costs nothing
}

}  // namespace detail

// `what` for the tensor's rank. Each instruction below has its own operands first and then c0 .. c4
// (HOPPER_TMA_C).
#define HOPPER_TMA_RANK(what, c0, c1, c2, c3, c4, ...)                                             \
  if constexpr (rank == 1) what("1", "{%" #c0 "}", __VA_ARGS__);                                   \
  if constexpr (rank == 2) what("2", "{%" #c0 ", %" #c1 "}", __VA_ARGS__);                         \
  if constexpr (rank == 3) what("3", "{%" #c0 ", %" #c1 ", %" #c2 "}", __VA_ARGS__);               \
  if constexpr (rank == 4) what("4", "{%" #c0 ", %" #c1 ", %" #c2 ", %" #c3 "}", __VA_ARGS__);     \
  if constexpr (rank == 5) what("5", "{%" #c0 ", %" #c1 ", %" #c2 ", %" #c3 ", %" #c4 "}", __VA_ARGS__);
#define HOPPER_TMA_C                                                                               \
  "r"(detail::coordinate<0>(c)), "r"(detail::coordinate<1>(c)), "r"(detail::coordinate<2>(c)),     \
      "r"(detail::coordinate<3>(c)), "r"(detail::coordinate<4>(c))
#endif

// The box at `c` to `dst`; its bytes complete on the barrier. cta_mask != 0: to the same place in those CTAs
// of the cluster, each completing on its own barrier at the same address. A constant mask leaves one
// instruction.
template <CacheHint hint = CacheHint::normal, int rank>
HOPPER_DEVICE void tma_load(void* dst, const TensorMap& map, Mbarrier* barrier, const int32_t (&c)[rank],
                            uint16_t cta_mask = 0, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(rank >= 1 && rank <= 5, "tensors of TMA have 1 to 5 dimensions");
#ifdef HOPPER_EMULATED
  emulator::tma_load(dst, &map, barrier, c, rank, cta_mask, site);
#else
  const uint32_t d = shared_address(dst), b = shared_address(barrier);
  const uint64_t policy = detail::cache_policy<hint>();
#define HOPPER_LOAD(dims, list, flags, tail)                                                                        \
  asm volatile("cp.async.bulk.tensor." dims "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes" flags      \
               " [%0], [%1, " list "], [%2]" tail ";" ::"r"(d), "l"(&map), "r"(b), "h"(cta_mask), "l"(policy),      \
               HOPPER_TMA_C                                                                                         \
               : "memory")
  if (cta_mask == 0) {
    if constexpr (hint == CacheHint::normal) {
      HOPPER_TMA_RANK(HOPPER_LOAD, 5, 6, 7, 8, 9, "", "")
    } else {
      HOPPER_TMA_RANK(HOPPER_LOAD, 5, 6, 7, 8, 9, ".L2::cache_hint", ", %4")
    }
  } else {
    if constexpr (hint == CacheHint::normal) {
      HOPPER_TMA_RANK(HOPPER_LOAD, 5, 6, 7, 8, 9, ".multicast::cluster", ", %3")
    } else {
      HOPPER_TMA_RANK(HOPPER_LOAD, 5, 6, 7, 8, 9, ".multicast::cluster.L2::cache_hint", ", %3, %4")
    }
  }
#undef HOPPER_LOAD
#endif
}

// The box at `c` to L2, ahead of ordinary loads or a tma_load; what lies outside of the tensor is left out. A hint:
// nothing waits for it, and nothing depends on it. Next to nothing for the thread, where loads of its own would stall.
template <int rank>
HOPPER_DEVICE void tma_prefetch([[maybe_unused]] const TensorMap& map, [[maybe_unused]] const int32_t (&c)[rank]) {
  static_assert(rank >= 1 && rank <= 5, "tensors of TMA have 1 to 5 dimensions");
#ifndef HOPPER_EMULATED
#define HOPPER_PREFETCH(dims, list, ...) \
  asm volatile("cp.async.bulk.prefetch.tensor." dims "d.L2.global.tile [%0, " list "];" ::"l"(&map), HOPPER_TMA_C : "memory")
  HOPPER_TMA_RANK(HOPPER_PREFETCH, 1, 2, 3, 4, 5)
#undef HOPPER_PREFETCH
#endif
}

// The box at `src` to the tensor; belongs to the thread's next bulk group (bulk.h). Ordinary writes to `src`
// need fence_proxy_async by their threads and a barrier before.
template <CacheHint hint = CacheHint::normal, int rank>
HOPPER_DEVICE void tma_store(const TensorMap& map, const void* src, const int32_t (&c)[rank],
                             [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(rank >= 1 && rank <= 5, "tensors of TMA have 1 to 5 dimensions");
#ifdef HOPPER_EMULATED
  emulator::tma_store(&map, src, c, rank, site);
#else
  const uint32_t s = shared_address(src);
  const uint64_t policy = detail::cache_policy<hint>();
#define HOPPER_STORE(dims, list, flags, tail)                                                                \
  asm volatile("cp.async.bulk.tensor." dims "d.global.shared::cta.tile.bulk_group" flags " [%0, " list       \
               "], [%1]" tail ";" ::"l"(&map), "r"(s), "l"(policy), HOPPER_TMA_C : "memory")
  if constexpr (hint == CacheHint::normal) {
    HOPPER_TMA_RANK(HOPPER_STORE, 3, 4, 5, 6, 7, "", "")
  } else {
    HOPPER_TMA_RANK(HOPPER_STORE, 3, 4, 5, 6, 7, ".L2::cache_hint", ", %2")
  }
#undef HOPPER_STORE
#endif
}

// tensor = op(tensor, box), element by element, atomically. The map's element type must have the operation.
template <Reduce op, CacheHint hint = CacheHint::normal, int rank>
HOPPER_DEVICE void tma_reduce(const TensorMap& map, const void* src, const int32_t (&c)[rank],
                              [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(rank >= 1 && rank <= 5, "tensors of TMA have 1 to 5 dimensions");
#ifdef HOPPER_EMULATED
  emulator::tma_reduce(op, &map, src, c, rank, site);
#else
  const uint32_t s = shared_address(src);
  const uint64_t policy = detail::cache_policy<hint>();
#define HOPPER_REDUCE(dims, list, flags, tail)                                                               \
  asm volatile("cp.reduce.async.bulk.tensor." dims "d.global.shared::cta.%3.tile.bulk_group" flags " [%0, "  \
               list "], [%1]" tail ";" ::"l"(&map), "r"(s), "l"(policy), "C"(text::ReduceName<op>::text),    \
               HOPPER_TMA_C                                                                                  \
               : "memory")
  if constexpr (hint == CacheHint::normal) {
    HOPPER_TMA_RANK(HOPPER_REDUCE, 4, 5, 6, 7, 8, "", "")
  } else {
    HOPPER_TMA_RANK(HOPPER_REDUCE, 4, 5, 6, 7, 8, ".L2::cache_hint", ", %2")
  }
#undef HOPPER_REDUCE
#endif
}

#ifndef HOPPER_EMULATED
#undef HOPPER_TMA_RANK
#undef HOPPER_TMA_C
#endif

}  // namespace hopper
