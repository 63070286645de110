// Loads, stores and atomics of global memory with order and scope, and hints. PTX ISA: "ld", "ld.global.nc",
// "st", "atom", "red", "Memory Consistency Model".
//
// Flags, and payload that other blocks or ranks read while the kernel runs, go through load, store, reduce
// and atomic only; never poll with a plain load. Each names its order and scope: load<Order::acquire,
// Scope::sys>(flag).
#pragma once

#include <cstring>
#include <type_traits>

#include "address.h"
#include "text.h"

namespace hopper {

// ---- hints, no order: ordinary accesses on the host, so that instrumented code sees them -------------------------

// Read once, past L1. Not through the non-coherent path: under dependent launch the previous kernel may still write what this
// one reads after grid_dependency_wait, and ld.global.nc is for memory that nobody writes while the kernel is resident.
template <class T>
HOPPER_DEVICE T load_stream(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
#ifdef HOPPER_EMULATED
  return *p;
#else
  uint32_t w[sizeof(T) / 4];
  if constexpr (sizeof(T) == 16)
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "l"(p)
                 : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p) : "memory");
  else
    asm volatile("ld.global.L1::no_allocate.b32 %0, [%1];" : "=r"(w[0]) : "l"(p) : "memory");
  T value;
  memcpy(&value, w, sizeof(T));
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
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
  else if constexpr (sizeof(T) == 8)
    asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w[0]), "r"(w[1]) : "memory");
  else
    asm volatile("st.global.cs.b32 [%0], %1;" ::"l"(p), "r"(w[0]) : "memory");
#endif
}

namespace detail {

// The host compiler must not move an access as V past accesses as T: a wrapper that may alias anything.
template <class V>
struct __attribute__((may_alias)) Aliasing {
  V value;
};

}  // namespace detail

// A vector V (uint4, float4, uint2, ...) at a pointer to its elements: one instruction of sizeof(V) bytes,
// any state space. p must be aligned to sizeof(V).
template <class V, class T>
HOPPER_DEVICE V load_vector(const T* p) {
  static_assert(sizeof(V) % sizeof(T) == 0 && alignof(V) == sizeof(V), "V is an aligned vector of Ts");
  const detail::Aliasing<V> loaded = *reinterpret_cast<const detail::Aliasing<V>*>(p);
  return loaded.value;
}
template <class V, class T>
HOPPER_DEVICE void store_vector(T* p, const V& value) {
  static_assert(sizeof(V) % sizeof(T) == 0 && alignof(V) == sizeof(V), "V is an aligned vector of Ts");
  *reinterpret_cast<detail::Aliasing<V>*>(p) = {value};
}

// ---- order and scope ---------------------------------------------------------------------------------------------

// 1 to 16 bytes, read as one: relaxed or acquire.
template <Order order, Scope scope, class T>
HOPPER_DEVICE T load(const T* p, [[maybe_unused]] Site site = HOPPER_HERE) {
  constexpr int bytes = sizeof(T);
  static_assert(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16, "1, 2, 4, 8 or 16 bytes");
  static_assert(order == Order::relaxed || order == Order::acquire, "a load is relaxed or acquire");
  T value;
#ifdef HOPPER_EMULATED
  emulator::load(&value, p, bytes, order, scope, site);
#else
#define HOPPER_NAMES "C"(text::OrderName<order>::text), "C"(text::ScopeName<scope>::text)
  uint64_t w[2];
  uint32_t word;
  if constexpr (bytes == 1) asm volatile("ld.%2.%3.global.b8 %0, [%1];" : "=r"(word) : "l"(p), HOPPER_NAMES : "memory");
  if constexpr (bytes == 2) asm volatile("ld.%2.%3.global.b16 %0, [%1];" : "=r"(word) : "l"(p), HOPPER_NAMES : "memory");
  if constexpr (bytes == 4) asm volatile("ld.%2.%3.global.b32 %0, [%1];" : "=r"(word) : "l"(p), HOPPER_NAMES : "memory");
  if constexpr (bytes == 8) asm volatile("ld.%2.%3.global.b64 %0, [%1];" : "=l"(w[0]) : "l"(p), HOPPER_NAMES : "memory");
  if constexpr (bytes == 16)
    asm volatile("{ .reg .b128 v; ld.%3.%4.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
                 : "=l"(w[0]), "=l"(w[1])
                 : "l"(p), HOPPER_NAMES
                 : "memory");
  if constexpr (bytes <= 4)
    memcpy(&value, &word, bytes);
  else
    memcpy(&value, w, bytes);
#undef HOPPER_NAMES
#endif
  return value;
}

// 1 to 16 bytes, written as one: relaxed or release.
template <Order order, Scope scope, class T>
HOPPER_DEVICE void store(T* p, std::type_identity_t<T> value, [[maybe_unused]] Site site = HOPPER_HERE) {
  constexpr int bytes = sizeof(T);
  static_assert(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16, "1, 2, 4, 8 or 16 bytes");
  static_assert(order == Order::relaxed || order == Order::release, "a store is relaxed or release");
#ifdef HOPPER_EMULATED
  emulator::store(p, &value, bytes, order, scope, site);
#else
#define HOPPER_NAMES "C"(text::OrderName<order>::text), "C"(text::ScopeName<scope>::text)
  uint64_t w[2] = {};
  memcpy(w, &value, bytes);
  const auto word = static_cast<uint32_t>(w[0]);
  if constexpr (bytes == 1) asm volatile("st.%2.%3.global.b8 [%0], %1;" ::"l"(p), "r"(word), HOPPER_NAMES : "memory");
  if constexpr (bytes == 2) asm volatile("st.%2.%3.global.b16 [%0], %1;" ::"l"(p), "r"(word), HOPPER_NAMES : "memory");
  if constexpr (bytes == 4) asm volatile("st.%2.%3.global.b32 [%0], %1;" ::"l"(p), "r"(word), HOPPER_NAMES : "memory");
  if constexpr (bytes == 8) asm volatile("st.%2.%3.global.b64 [%0], %1;" ::"l"(p), "l"(w[0]), HOPPER_NAMES : "memory");
  if constexpr (bytes == 16)
    asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.%3.%4.global.b128 [%0], v; }" ::"l"(p), "l"(w[0]), "l"(w[1]),
                 HOPPER_NAMES
                 : "memory");
#undef HOPPER_NAMES
#endif
}

namespace detail {

template <class T>
HOPPER_BOTH constexpr Element atomic_element_of() {
  if constexpr (std::is_same_v<T, float>) return Element::f32;
  else if constexpr (std::is_same_v<T, double>) return Element::f64;
  else if constexpr (std::is_integral_v<T> && sizeof(T) == 4) return std::is_signed_v<T> ? Element::s32 : Element::u32;
  else {
    static_assert(std::is_integral_v<T> && sizeof(T) == 8, "atomics take 32- and 64-bit integers, float and double");
    return std::is_signed_v<T> ? Element::s64 : Element::u64;
  }
}

// PTX ISA "atom", "red", scalar forms: as bulk reductions, without 16-bit types here.
HOPPER_BOTH constexpr bool atomic_exists(Reduce op, Element e) {
  if (e == Element::f32 || e == Element::f64) return op == Reduce::add;
  if (op == Reduce::inc || op == Reduce::dec) return e == Element::u32;
  return op != Reduce::add || e != Element::s64;   // add u64: the same bits
}

}  // namespace detail

// *p = op(*p, value), nothing returned (red): relaxed or release. inc: (*p >= value) ? 0 : *p + 1.
// Sums of float and double come in any order: not deterministic.
template <Reduce op, Order order, Scope scope, class T>
HOPPER_DEVICE void reduce(T* p, std::type_identity_t<T> value, [[maybe_unused]] Site site = HOPPER_HERE) {
  constexpr Element element = detail::atomic_element_of<T>();
  static_assert(detail::atomic_exists(op, element), "red has no such operation on this type");
  static_assert(order == Order::relaxed || order == Order::release, "a reduction is relaxed or release");
#ifdef HOPPER_EMULATED
  emulator::atomic(op, element, p, &value, nullptr, order, scope, site);
#else
#define HOPPER_RED(constraint, type)                                                                            \
  {                                                                                                             \
    type bits;                                                                                                  \
    memcpy(&bits, &value, sizeof(T));                                                                           \
    asm volatile("red.%2.%3.global.%4.%5 [%0], %1;" ::"l"(p), constraint(bits),                                 \
                 "C"(text::OrderName<order>::text), "C"(text::ScopeName<scope>::text),                          \
                 "C"(text::ReduceName<op>::text), "C"(text::ReduceType<op, element>::text)                      \
                 : "memory");                                                                                   \
  }
  if constexpr (std::is_same_v<T, float>)
    HOPPER_RED("f", float)
  else if constexpr (std::is_same_v<T, double>)
    HOPPER_RED("d", double)
  else if constexpr (sizeof(T) == 4)
    HOPPER_RED("r", uint32_t)
  else
    HOPPER_RED("l", uint64_t)
#undef HOPPER_RED
#endif
}

// The same, returning what was there (atom): any order but weak.
template <Reduce op, Order order, Scope scope, class T>
HOPPER_DEVICE T atomic(T* p, std::type_identity_t<T> value, [[maybe_unused]] Site site = HOPPER_HERE) {
  constexpr Element element = detail::atomic_element_of<T>();
  static_assert(detail::atomic_exists(op, element), "atom has no such operation on this type");
  static_assert(order != Order::weak, "an atomic is relaxed, acquire, release or acq_rel");
  T old;
#ifdef HOPPER_EMULATED
  emulator::atomic(op, element, p, &value, &old, order, scope, site);
#else
#define HOPPER_ATOM(constraint, type)                                                                           \
  {                                                                                                             \
    type bits, was;                                                                                             \
    memcpy(&bits, &value, sizeof(T));                                                                           \
    asm volatile("atom.%3.%4.global.%5.%6 %0, [%1], %2;"                                                        \
                 : "=" constraint(was)                                                                          \
                 : "l"(p), constraint(bits), "C"(text::OrderName<order>::text),                                 \
                   "C"(text::ScopeName<scope>::text), "C"(text::ReduceName<op>::text),                          \
                   "C"(text::ReduceType<op, element>::text)                                                     \
                 : "memory");                                                                                   \
    memcpy(&old, &was, sizeof(T));                                                                              \
  }
  if constexpr (std::is_same_v<T, float>)
    HOPPER_ATOM("f", float)
  else if constexpr (std::is_same_v<T, double>)
    HOPPER_ATOM("d", double)
  else if constexpr (sizeof(T) == 4)
    HOPPER_ATOM("r", uint32_t)
  else
    HOPPER_ATOM("l", uint64_t)
#undef HOPPER_ATOM
#endif
  return old;
}

// Puts a value of 4 or 8 bytes there and returns what was.
template <Order order, Scope scope, class T>
HOPPER_DEVICE T atomic_exchange(T* p, std::type_identity_t<T> value, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  static_assert(order != Order::weak, "an atomic is relaxed, acquire, release or acq_rel");
  T old;
#ifdef HOPPER_EMULATED
  emulator::atomic_exchange(p, &value, &old, sizeof(T), order, scope, site);
#else
#define HOPPER_ORDER "C"(text::OrderName<order>::text), "C"(text::ScopeName<scope>::text)
  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> bits, was;
  memcpy(&bits, &value, sizeof(T));
  if constexpr (sizeof(T) == 4)
    asm volatile("atom.%3.%4.global.exch.b32 %0, [%1], %2;" : "=r"(was) : "l"(p), "r"(bits), HOPPER_ORDER : "memory");
  else
    asm volatile("atom.%3.%4.global.exch.b64 %0, [%1], %2;" : "=l"(was) : "l"(p), "l"(bits), HOPPER_ORDER : "memory");
  memcpy(&old, &was, sizeof(T));
#undef HOPPER_ORDER
#endif
  return old;
}

// Puts `value` there if `expected` was (all bits), and returns what was.
template <Order order, Scope scope, class T>
HOPPER_DEVICE T atomic_compare_exchange(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value,
                                        [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  static_assert(order != Order::weak, "an atomic is relaxed, acquire, release or acq_rel");
  T old;
#ifdef HOPPER_EMULATED
  emulator::atomic_compare_exchange(p, &expected, &value, &old, sizeof(T), order, scope, site);
#else
#define HOPPER_ORDER "C"(text::OrderName<order>::text), "C"(text::ScopeName<scope>::text)
  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> was_expected, bits, was;
  memcpy(&was_expected, &expected, sizeof(T));
  memcpy(&bits, &value, sizeof(T));
  if constexpr (sizeof(T) == 4)
    asm volatile("atom.%4.%5.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(was)
                 : "l"(p), "r"(was_expected), "r"(bits), HOPPER_ORDER
                 : "memory");
  else
    asm volatile("atom.%4.%5.global.cas.b64 %0, [%1], %2, %3;"
                 : "=l"(was)
                 : "l"(p), "l"(was_expected), "l"(bits), HOPPER_ORDER
                 : "memory");
  memcpy(&old, &was, sizeof(T));
#undef HOPPER_ORDER
#endif
  return old;
}

// The usual counters.
template <Order order, Scope scope>
HOPPER_DEVICE void reduce_add(uint32_t* p, uint32_t value, Site site = HOPPER_HERE) {
  reduce<Reduce::add, order, scope>(p, value, site);
}
template <Order order, Scope scope>
HOPPER_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t value, Site site = HOPPER_HERE) {
  return atomic<Reduce::add, order, scope>(p, value, site);
}

}  // namespace hopper
