// Collectives of a warp. PTX ISA: "bar.warp.sync", "elect.sync", "shfl.sync", "vote.sync", "redux.sync".
// Only syncwarp orders memory among the lanes.
#pragma once

#include <cstring>
#include <type_traits>

#include "address.h"

namespace hopper {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// The named lanes meet; their memory accesses before it are ordered before those after it.
HOPPER_DEVICE void syncwarp(uint32_t mask = kAllLanes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::syncwarp(mask, site);
#else
  __syncwarp(mask);
#endif
}

// True in one lane, the lowest here and in practice. What the others did before it needs a syncwarp to be
// ordered.
HOPPER_DEVICE bool elect_one(uint32_t mask = kAllLanes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  return emulator::elect_one(mask, site);
#else
  uint32_t elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, %1; selp.u32 %0, 1, 0, p; }" : "=r"(elected) : "r"(mask));
  return elected;
#endif
}

namespace detail {

template <Shuffle mode>
HOPPER_DEVICE uint32_t shuffle_bits(uint32_t value, uint32_t lane, uint32_t width, uint32_t mask, [[maybe_unused]] Site site) {
#ifdef HOPPER_EMULATED
  return emulator::shuffle(mode, value, lane, width, mask, site);
#else
  if constexpr (mode == Shuffle::idx) return __shfl_sync(mask, value, lane, width);
  if constexpr (mode == Shuffle::up) return __shfl_up_sync(mask, value, lane, width);
  if constexpr (mode == Shuffle::down) return __shfl_down_sync(mask, value, lane, width);
  if constexpr (mode == Shuffle::xor_) return __shfl_xor_sync(mask, value, lane, width);
#endif
}

template <Shuffle mode, class T>
HOPPER_DEVICE T shuffle_any(T value, uint32_t lane, uint32_t width, uint32_t mask, Site site) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 16, "a shuffle moves one to four words");
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = shuffle_bits<mode>(bits, lane, width, mask, site);
    memcpy(&value, &bits, 4);
  } else {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    // By index: a range-for over the words left them in local memory (nvcc 13.0).
    HOPPER_UNROLL for (size_t i = 0; i < sizeof(T) / 4; ++i)
      words[i] = shuffle_bits<mode>(words[i], lane, width, mask, site);
    memcpy(&value, words, sizeof(T));
  }
  return value;
}

}  // namespace detail

// The value of lane `lane` of each group of `width` lanes. T: one to four words, an instruction for each.
// Every lane of the mask takes part, also those whose value nobody reads.
template <class T>
HOPPER_DEVICE T shuffle(T value, uint32_t lane, uint32_t width = 32, uint32_t mask = kAllLanes, Site site = HOPPER_HERE) {
  return detail::shuffle_any<Shuffle::idx>(value, lane, width, mask, site);
}
// The value of the lane whose number differs in the bits of `bits`.
template <class T>
HOPPER_DEVICE T shuffle_xor(T value, uint32_t bits, uint32_t width = 32, uint32_t mask = kAllLanes, Site site = HOPPER_HERE) {
  return detail::shuffle_any<Shuffle::xor_>(value, bits, width, mask, site);
}
// The value of the lane whose number is less by `by`; the first lanes keep their own.
template <class T>
HOPPER_DEVICE T shuffle_up(T value, uint32_t by, uint32_t width = 32, uint32_t mask = kAllLanes, Site site = HOPPER_HERE) {
  return detail::shuffle_any<Shuffle::up>(value, by, width, mask, site);
}
// The value of the lane whose number is greater by `by`; the last lanes keep their own.
template <class T>
HOPPER_DEVICE T shuffle_down(T value, uint32_t by, uint32_t width = 32, uint32_t mask = kAllLanes, Site site = HOPPER_HERE) {
  return detail::shuffle_any<Shuffle::down>(value, by, width, mask, site);
}

// Bit l: lane l's predicate.
HOPPER_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kAllLanes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  return emulator::vote(Vote::ballot, predicate, mask, site);
#else
  return __ballot_sync(mask, predicate);
#endif
}
HOPPER_DEVICE bool any(bool predicate, uint32_t mask = kAllLanes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  return emulator::vote(Vote::any, predicate, mask, site);
#else
  return __any_sync(mask, predicate);
#endif
}
HOPPER_DEVICE bool all(bool predicate, uint32_t mask = kAllLanes, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  return emulator::vote(Vote::all, predicate, mask, site);
#else
  return __all_sync(mask, predicate);
#endif
}

// One instruction for 32-bit integers (redux.sync); every lane gets the result. add, min, max of both signs;
// and, or, xor of uint32_t. There is none for float on sm_90.
template <Reduce op, class T>
HOPPER_DEVICE T warp_reduce(T value, uint32_t mask = kAllLanes, [[maybe_unused]] Site site = HOPPER_HERE) {
  constexpr bool is_signed = std::is_same_v<T, int32_t>;
  static_assert(is_signed || std::is_same_v<T, uint32_t>, "redux.sync takes 32-bit integers");
  static_assert(op != Reduce::inc && op != Reduce::dec, "redux.sync has add, min, max, and, or, xor");
  static_assert(!is_signed || op == Reduce::add || op == Reduce::min || op == Reduce::max, "bitwise: uint32_t");
#ifdef HOPPER_EMULATED
  return static_cast<T>(emulator::warp_reduce(op, static_cast<uint32_t>(value), is_signed, mask, site));
#else
  if constexpr (op == Reduce::add) return __reduce_add_sync(mask, value);
  if constexpr (op == Reduce::min) return __reduce_min_sync(mask, value);
  if constexpr (op == Reduce::max) return __reduce_max_sync(mask, value);
  if constexpr (op == Reduce::and_) return __reduce_and_sync(mask, value);
  if constexpr (op == Reduce::or_) return __reduce_or_sync(mask, value);
  if constexpr (op == Reduce::xor_) return __reduce_xor_sync(mask, value);
#endif
}

HOPPER_DEVICE uint32_t warp_max(uint32_t value, uint32_t mask = kAllLanes, Site site = HOPPER_HERE) {
  return warp_reduce<Reduce::max>(value, mask, site);
}
HOPPER_DEVICE uint32_t warp_min(uint32_t value, uint32_t mask = kAllLanes, Site site = HOPPER_HERE) {
  return warp_reduce<Reduce::min>(value, mask, site);
}
HOPPER_DEVICE uint32_t warp_sum(uint32_t value, uint32_t mask = kAllLanes, Site site = HOPPER_HERE) {
  return warp_reduce<Reduce::add>(value, mask, site);
}

}  // namespace hopper
