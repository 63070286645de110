// Loads, stores and atomics with order and scope, and hints. PTX ISA: "ld", "st", "atom", "red", "Memory Consistency Model".
// Flags and payload that other blocks or ranks read while the kernel runs go through load/store/reduce only; never poll
// with a plain load.
#pragma once

#include "address.h"

namespace hopper {

// Read once, 16 bytes or less, through the non-coherent path and past L1. Only for memory that nobody writes during the kernel.
template <class T>
HOPPER_DEVICE T load_stream(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
#ifdef HOPPER_EMULATED
  return *p;
#else
  T value;
  if constexpr (sizeof(T) == 16) {
    uint32_t w[4];
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
    memcpy(&value, w, 16);
  } else if constexpr (sizeof(T) == 8) {
    uint32_t w[2];
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
    memcpy(&value, w, 8);
  } else {
    uint32_t w;
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(w) : "l"(p));
    memcpy(&value, &w, 4);
  }
  return value;
#endif
}

// Written once and not read again soon: evict first.
template <class T>
HOPPER_DEVICE void store_stream(T* p, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
#ifdef HOPPER_EMULATED
  *p = value;
#else
  uint32_t w[sizeof(T) / 4];
  memcpy(w, &value, sizeof(T));
  if constexpr (sizeof(T) == 16)
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
  else
    asm volatile("st.global.cs.b32 [%0], %1;" ::"l"(p), "r"(w[0]) : "memory");
#endif
}

#ifndef HOPPER_EMULATED
// Expands `what` once for each scope, with the scope's name in the instruction text.
#define HOPPER_FOR_SCOPE(what)                          \
  if constexpr (scope == Scope::cta) { what("cta") }    \
  if constexpr (scope == Scope::cluster) { what("cluster") } \
  if constexpr (scope == Scope::gpu) { what("gpu") }    \
  if constexpr (scope == Scope::sys) { what("sys") }
#endif

// 32- or 64-bit flag: relaxed or acquire.
template <Order order, Scope scope, class T>
HOPPER_DEVICE T load(const T* p, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 32 or 64 bits");
  static_assert(order == Order::relaxed || order == Order::acquire, "a load is relaxed or acquire");
#ifdef HOPPER_EMULATED
  T value;
  emulator::load(&value, p, sizeof(T), order, scope, site);
  return value;
#else
  T value;
#define HOPPER_LOAD(name)                                                                                                          \
  if constexpr (sizeof(T) == 4 && order == Order::relaxed)                                                                         \
    asm volatile("ld.relaxed." name ".global.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "l"(p) : "memory");       \
  if constexpr (sizeof(T) == 4 && order == Order::acquire)                                                                         \
    asm volatile("ld.acquire." name ".global.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "l"(p) : "memory");       \
  if constexpr (sizeof(T) == 8 && order == Order::relaxed)                                                                         \
    asm volatile("ld.relaxed." name ".global.b64 %0, [%1];" : "=l"(reinterpret_cast<uint64_t&>(value)) : "l"(p) : "memory");       \
  if constexpr (sizeof(T) == 8 && order == Order::acquire)                                                                         \
    asm volatile("ld.acquire." name ".global.b64 %0, [%1];" : "=l"(reinterpret_cast<uint64_t&>(value)) : "l"(p) : "memory");
  HOPPER_FOR_SCOPE(HOPPER_LOAD)
#undef HOPPER_LOAD
  return value;
#endif
}

// 32- or 64-bit flag: relaxed or release.
template <Order order, Scope scope, class T>
HOPPER_DEVICE void store(T* p, T value, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "flags have 32 or 64 bits");
  static_assert(order == Order::relaxed || order == Order::release, "a store is relaxed or release");
#ifdef HOPPER_EMULATED
  emulator::store(p, &value, sizeof(T), order, scope, site);
#else
#define HOPPER_STORE(name)                                                                                                       \
  if constexpr (sizeof(T) == 4 && order == Order::relaxed)                                                                       \
    asm volatile("st.relaxed." name ".global.b32 [%0], %1;" ::"l"(p), "r"(reinterpret_cast<uint32_t&>(value)) : "memory");       \
  if constexpr (sizeof(T) == 4 && order == Order::release)                                                                       \
    asm volatile("st.release." name ".global.b32 [%0], %1;" ::"l"(p), "r"(reinterpret_cast<uint32_t&>(value)) : "memory");       \
  if constexpr (sizeof(T) == 8 && order == Order::relaxed)                                                                       \
    asm volatile("st.relaxed." name ".global.b64 [%0], %1;" ::"l"(p), "l"(reinterpret_cast<uint64_t&>(value)) : "memory");       \
  if constexpr (sizeof(T) == 8 && order == Order::release)                                                                       \
    asm volatile("st.release." name ".global.b64 [%0], %1;" ::"l"(p), "l"(reinterpret_cast<uint64_t&>(value)) : "memory");
  HOPPER_FOR_SCOPE(HOPPER_STORE)
#undef HOPPER_STORE
#endif
}

// *p += value without a result (red).
template <Order order, Scope scope>
HOPPER_DEVICE void reduce_add(uint32_t* p, uint32_t value, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(order == Order::relaxed || order == Order::release, "a reduction is relaxed or release");
#ifdef HOPPER_EMULATED
  emulator::atomic(Reduce::add, Element::u32, p, &value, nullptr, order, scope, site);
#else
#define HOPPER_RED(name)                                                                                        \
  if constexpr (order == Order::relaxed)                                                                        \
    asm volatile("red.relaxed." name ".global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");              \
  else                                                                                                          \
    asm volatile("red.release." name ".global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
  HOPPER_FOR_SCOPE(HOPPER_RED)
#undef HOPPER_RED
#endif
}

// Returns the old value.
template <Order order, Scope scope>
HOPPER_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value, [[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  uint32_t old;
  emulator::atomic(Reduce::add, Element::u32, p, &value, &old, order, scope, site);
  return old;
#else
  uint32_t old;
#define HOPPER_ATOM(name)                                                                                                          \
  if constexpr (order == Order::relaxed)                                                                                           \
    asm volatile("atom.relaxed." name ".global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");                \
  else if constexpr (order == Order::acquire)                                                                                      \
    asm volatile("atom.acquire." name ".global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");                \
  else if constexpr (order == Order::release)                                                                                      \
    asm volatile("atom.release." name ".global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");                \
  else                                                                                                                             \
    asm volatile("atom.acq_rel." name ".global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory");
  HOPPER_FOR_SCOPE(HOPPER_ATOM)
#undef HOPPER_ATOM
  return old;
#endif
}

#ifndef HOPPER_EMULATED
#undef HOPPER_FOR_SCOPE
#endif

}  // namespace hopper
