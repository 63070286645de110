// Tensor copies by the TMA engine (async proxy). PTX ISA: "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor",
// "prefetch.tensormap". Coordinates are elements, innermost first; what lies outside of the tensor is filled on loads
// (and counted in the barrier's bytes) and skipped on stores. Shared addresses: 128-byte aligned.
#pragma once

#include "mbarrier.h"

namespace hopper {

// Fetches the descriptor ahead of its first use.
HOPPER_DEVICE void tma_prefetch(const TensorMap& map) {
#ifndef HOPPER_EMULATED
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

#ifndef HOPPER_EMULATED
#define HOPPER_TMA_COORDINATES(rank, text1, text2, text3, text4, text5, ...)                                \
  if constexpr (rank == 1) asm volatile(text1 __VA_ARGS__, "r"(c[0]) : "memory");                           \
  if constexpr (rank == 2) asm volatile(text2 __VA_ARGS__, "r"(c[0]), "r"(c[1]) : "memory");                \
  if constexpr (rank == 3) asm volatile(text3 __VA_ARGS__, "r"(c[0]), "r"(c[1]), "r"(c[2]) : "memory");     \
  if constexpr (rank == 4)                                                                                  \
    asm volatile(text4 __VA_ARGS__, "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]) : "memory");                 \
  if constexpr (rank == 5)                                                                                  \
    asm volatile(text5 __VA_ARGS__, "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]) : "memory");
#endif

// The box at `c` to `dst`; its bytes complete on the barrier. cta_mask != 0: to the same place in those CTAs of the cluster,
// each completing on its own barrier at the same address.
template <int rank>
HOPPER_DEVICE void tma_load(void* dst, const TensorMap& map, Mbarrier* barrier, const int32_t (&c)[rank], uint16_t cta_mask = 0,
                            [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(rank >= 1 && rank <= 5, "tensors of TMA have 1 to 5 dimensions");
#ifdef HOPPER_EMULATED
  emulator::tma_load(dst, &map, barrier, c, rank, cta_mask, site);
#else
  const uint32_t d = shared_address(dst), b = shared_address(barrier);
#define HOPPER_LOAD(dims, list)                                                                                        \
  "cp.async.bulk.tensor." dims "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {" list "}], [%2];"
#define HOPPER_LOAD_MULTICAST(dims, list)                                                                              \
  "cp.async.bulk.tensor." dims                                                                                         \
  "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {" list "}], [%2], %3;"
  if (cta_mask == 0) {
    HOPPER_TMA_COORDINATES(rank, HOPPER_LOAD("1", "%3"), HOPPER_LOAD("2", "%3, %4"), HOPPER_LOAD("3", "%3, %4, %5"),
                           HOPPER_LOAD("4", "%3, %4, %5, %6"), HOPPER_LOAD("5", "%3, %4, %5, %6, %7"), ::"r"(d), "l"(&map), "r"(b))
  } else {
    HOPPER_TMA_COORDINATES(rank, HOPPER_LOAD_MULTICAST("1", "%4"), HOPPER_LOAD_MULTICAST("2", "%4, %5"),
                           HOPPER_LOAD_MULTICAST("3", "%4, %5, %6"), HOPPER_LOAD_MULTICAST("4", "%4, %5, %6, %7"),
                           HOPPER_LOAD_MULTICAST("5", "%4, %5, %6, %7, %8"), ::"r"(d), "l"(&map), "r"(b), "h"(cta_mask))
  }
#undef HOPPER_LOAD
#undef HOPPER_LOAD_MULTICAST
#endif
}

// The box at `src` to the tensor; belongs to the thread's next bulk group (bulk.h). Ordinary writes to `src` need
// fence_proxy_async by their threads and a barrier before.
template <int rank>
HOPPER_DEVICE void tma_store(const TensorMap& map, const void* src, const int32_t (&c)[rank], [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(rank >= 1 && rank <= 5, "tensors of TMA have 1 to 5 dimensions");
#ifdef HOPPER_EMULATED
  emulator::tma_store(&map, src, c, rank, site);
#else
  const uint32_t s = shared_address(src);
#define HOPPER_STORE(dims, list) "cp.async.bulk.tensor." dims "d.global.shared::cta.tile.bulk_group [%0, {" list "}], [%1];"
  HOPPER_TMA_COORDINATES(rank, HOPPER_STORE("1", "%2"), HOPPER_STORE("2", "%2, %3"), HOPPER_STORE("3", "%2, %3, %4"),
                         HOPPER_STORE("4", "%2, %3, %4, %5"), HOPPER_STORE("5", "%2, %3, %4, %5, %6"), ::"l"(&map), "r"(s))
#undef HOPPER_STORE
#endif
}

// tensor = op(tensor, box), element by element, atomically.
template <Reduce op, int rank>
HOPPER_DEVICE void tma_reduce(const TensorMap& map, const void* src, const int32_t (&c)[rank], [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(rank >= 1 && rank <= 5, "tensors of TMA have 1 to 5 dimensions");
#ifdef HOPPER_EMULATED
  emulator::tma_reduce(op, &map, src, c, rank, site);
#else
  const uint32_t s = shared_address(src);
#define HOPPER_REDUCE(dims, op, list) "cp.reduce.async.bulk.tensor." dims "d.global.shared::cta." op ".tile.bulk_group [%0, {" list "}], [%1];"
#define HOPPER_REDUCE_OP(name, text)                                                                                             \
  if constexpr (op == name) {                                                                                                    \
    HOPPER_TMA_COORDINATES(rank, HOPPER_REDUCE("1", text, "%2"), HOPPER_REDUCE("2", text, "%2, %3"),                             \
                           HOPPER_REDUCE("3", text, "%2, %3, %4"), HOPPER_REDUCE("4", text, "%2, %3, %4, %5"),                   \
                           HOPPER_REDUCE("5", text, "%2, %3, %4, %5, %6"), ::"l"(&map), "r"(s))                                  \
  }
  HOPPER_REDUCE_OP(Reduce::add, "add")
  HOPPER_REDUCE_OP(Reduce::min, "min")
  HOPPER_REDUCE_OP(Reduce::max, "max")
  HOPPER_REDUCE_OP(Reduce::inc, "inc")
  HOPPER_REDUCE_OP(Reduce::dec, "dec")
  HOPPER_REDUCE_OP(Reduce::and_, "and")
  HOPPER_REDUCE_OP(Reduce::or_, "or")
  HOPPER_REDUCE_OP(Reduce::xor_, "xor")
#undef HOPPER_REDUCE
#undef HOPPER_REDUCE_OP
#endif
}

#undef HOPPER_TMA_COORDINATES

}  // namespace hopper
