// Copies of contiguous bytes by the bulk engine (async proxy), and the groups of a thread's stores.
// PTX ISA: "cp.async.bulk", "cp.reduce.async.bulk", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group".
// Sizes and addresses are multiples of 16.
#pragma once

#include "mbarrier.h"

namespace hopper {

// Global to shared; the bytes complete on the barrier.
HOPPER_DEVICE void bulk_load(void* dst, const void* src, uint32_t bytes, Mbarrier* barrier, uint16_t cta_mask = 0,
                             [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_load(dst, src, bytes, barrier, cta_mask, site);
#else
  if (cta_mask == 0)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(dst)),
                 "l"(src), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
  else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared_address(dst)),
                 "l"(src), "r"(bytes), "r"(shared_address(barrier)), "h"(cta_mask)
                 : "memory");
#endif
}

// Shared to global; belongs to the thread's next group.
HOPPER_DEVICE void bulk_store(void* dst, const void* src, uint32_t bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_store(dst, src, bytes, site);
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(shared_address(src)), "r"(bytes) : "memory");
#endif
}

// dst[i] = op(dst[i], src[i]), atomically for each element. Of the pairs that PTX has, those in use here: integer and
// fp32 sums, bf16 sums, unsigned minimum and maximum.
template <Reduce op, Element element>
HOPPER_DEVICE void bulk_reduce(void* dst, const void* src, uint32_t bytes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_reduce(op, element, dst, src, bytes, site);
#else
  const uint32_t s = shared_address(src);
#define HOPPER_BULK_REDUCE(o, e, text)                                                                                        \
  else if constexpr (op == o && element == e) asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group." text         \
                                                           " [%0], [%1], %2;" ::"l"(dst), "r"(s), "r"(bytes) : "memory")
  if constexpr (false) {
  }
  HOPPER_BULK_REDUCE(Reduce::add, Element::f32, "add.f32");
  HOPPER_BULK_REDUCE(Reduce::add, Element::f64, "add.f64");
  HOPPER_BULK_REDUCE(Reduce::add, Element::bf16, "add.noftz.bf16");
  HOPPER_BULK_REDUCE(Reduce::add, Element::f16, "add.noftz.f16");
  HOPPER_BULK_REDUCE(Reduce::min, Element::bf16, "min.bf16");
  HOPPER_BULK_REDUCE(Reduce::max, Element::bf16, "max.bf16");
  HOPPER_BULK_REDUCE(Reduce::add, Element::u32, "add.u32");
  HOPPER_BULK_REDUCE(Reduce::add, Element::s32, "add.s32");
  HOPPER_BULK_REDUCE(Reduce::add, Element::u64, "add.u64");
  HOPPER_BULK_REDUCE(Reduce::min, Element::u32, "min.u32");
  HOPPER_BULK_REDUCE(Reduce::max, Element::u32, "max.u32");
  HOPPER_BULK_REDUCE(Reduce::min, Element::s32, "min.s32");
  HOPPER_BULK_REDUCE(Reduce::max, Element::s32, "max.s32");
  HOPPER_BULK_REDUCE(Reduce::inc, Element::u32, "inc.u32");
  HOPPER_BULK_REDUCE(Reduce::dec, Element::u32, "dec.u32");
  HOPPER_BULK_REDUCE(Reduce::and_, Element::u32, "and.b32");
  HOPPER_BULK_REDUCE(Reduce::or_, Element::u32, "or.b32");
  HOPPER_BULK_REDUCE(Reduce::xor_, Element::u32, "xor.b32");
  else static_assert(op != op, "this reduction is not in the vocabulary");
#undef HOPPER_BULK_REDUCE
#endif
}

// Shared memory of this CTA to that of a peer (`dst` and `remote` from map_shared); completes on the peer's barrier.
HOPPER_DEVICE void bulk_copy_cluster(void* dst, const void* src, uint32_t bytes, Mbarrier* remote, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_copy_cluster(dst, src, bytes, remote, site);
#else
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(dst)),
               "r"(shared_address(src)), "r"(bytes), "r"(shared_address(remote))
               : "memory");
#endif
}

// The thread's stores since the last commit become a group.
HOPPER_DEVICE void bulk_commit([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::bulk_commit(site);
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until at most `pending` groups are in flight: their writes are done and visible to this thread.
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
