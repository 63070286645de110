// Copies of contiguous bytes by the bulk engine (async proxy), and the groups of a thread's stores.
// PTX ISA: "cp.async.bulk", "cp.reduce.async.bulk", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group".
// Sizes and addresses are multiples of 16. One thread issues.
#pragma once

#include "cache_hint.h"
#include "mbarrier.h"
#include "text.h"

namespace hopper {

// Global to shared; the bytes complete on the barrier. cta_mask as in tma_load.
template <CacheHint hint = CacheHint::normal>
HOPPER_DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, Mbarrier* barrier, uint16_t cta_mask = 0,
                             [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_load(dst, src, bytes, barrier, cta_mask, site);
#else
  const uint32_t d = shared_address(dst), b = shared_address(barrier);
  const uint64_t policy = detail::cache_policy<hint>();
#define HOPPER_LOAD(flags, tail)                                                                            \
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes" flags                    \
               " [%0], [%1], %2, [%3]" tail ";" ::"r"(d), "l"(src), "r"(bytes), "r"(b), "h"(cta_mask),      \
               "l"(policy)                                                                                  \
               : "memory")
  if (cta_mask == 0) {
    if constexpr (hint == CacheHint::normal)
      HOPPER_LOAD("", "");
    else
      HOPPER_LOAD(".L2::cache_hint", ", %5");
  } else {
    if constexpr (hint == CacheHint::normal)
      HOPPER_LOAD(".multicast::cluster", ", %4");
    else
      HOPPER_LOAD(".multicast::cluster.L2::cache_hint", ", %4, %5");
  }
#undef HOPPER_LOAD
#endif
}

// Shared to global; belongs to the thread's next group. Ordinary writes to `src` need fence_proxy_async
// before.
template <CacheHint hint = CacheHint::normal>
HOPPER_DEVICE void bulk_store(void* dst, const void* src, uint32_t bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_store(dst, src, bytes, site);
#else
  const uint32_t s = shared_address(src);
  if constexpr (hint == CacheHint::normal)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(s), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(dst),
                 "r"(s), "r"(bytes), "l"(detail::cache_policy<hint>())
                 : "memory");
#endif
}

namespace detail {

// PTX ISA "cp.reduce.async.bulk": bitwise on 32 and 64 bits, inc and dec on u32, sums on all but s64 (the
// same bits as u64), minimum and maximum on integers and 16-bit floats.
HOPPER_BOTH constexpr bool bulk_reduce_exists(Reduce op, Element e) {
  const bool wide = e == Element::f32 || e == Element::f64, narrow = e == Element::f16 || e == Element::bf16;
  const bool integer = e == Element::u32 || e == Element::s32 || e == Element::u64 || e == Element::s64;
  switch (op) {
    case Reduce::add: return wide || narrow || (integer && e != Element::s64);
    case Reduce::min: case Reduce::max: return narrow || integer;
    case Reduce::inc: case Reduce::dec: return e == Element::u32;
    default: return integer;
  }
}

}  // namespace detail

// dst[i] = op(dst[i], src[i]) in global memory, atomically for each element (relaxed, gpu scope). Sums of f32
// flush subnormals. Floating-point sums of several blocks come in any order: not deterministic.
template <Reduce op, Element element>
HOPPER_DEVICE void bulk_reduce(void* dst, const void* src, uint32_t bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(detail::bulk_reduce_exists(op, element), "cp.reduce.async.bulk has no such operation on this type");
#ifdef HOPPER_EMULATED
  emulator::bulk_reduce(op, element, dst, src, bytes, site);
#else
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.%3.%4 [%0], [%1], %2;" ::"l"(dst),
               "r"(shared_address(src)), "r"(bytes), "C"(text::ReduceName<op>::text),
               "C"(text::ReduceType<op, element>::text)
               : "memory");
#endif
}

// Shared memory of this CTA to that of a peer (`dst` and `remote` from map_shared); completes on the peer's
// barrier, which the peer must have armed (expect_tx) and initialised before (cluster barrier).
HOPPER_DEVICE void bulk_copy_cluster(void* dst, const void* src, uint32_t bytes, Mbarrier* remote,
                                     [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_copy_cluster(dst, src, bytes, remote, site);
#else
  // shared_address serves mapped pointers too: the shared::cta window lies within the shared::cluster window.
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(dst)),
      "r"(shared_address(src)), "r"(bytes), "r"(shared_address(remote))
      : "memory");
#endif
}

// The thread's stores and reductions (bulk and TMA) since the last commit become a group.
HOPPER_DEVICE void bulk_commit([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_commit(site);
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until at most `pending` groups of this thread are in flight: the writes of the others are done and visible
// to it. What a release flag needs.
template <uint32_t pending>
HOPPER_DEVICE void bulk_wait([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_wait(pending, false, site);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Only until their sources have been read: shared memory may be reused, nothing is visible yet.
template <uint32_t pending>
HOPPER_DEVICE void bulk_wait_read([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_wait(pending, true, site);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace hopper
