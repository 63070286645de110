// Asynchronous matrix multiply of a warpgroup. PTX ISA: "wgmma.mma_async", "wgmma.fence",
// "wgmma.commit_group", "wgmma.wait_group".
//
// D[64 x n] (fp32, registers) = A[64 x k] B[k x n] (+ D), k = 32 for 8-bit and 16 for 16-bit formats. A and B
// lie in shared memory (descriptor.h), or A in registers. The accumulators belong to the tensor core from
// issue to wait: do not touch or copy them in between, and issue chains on the same array. FP8 keeps 14 bits
// of the sum and truncates: promote.
#pragma once

#include "descriptor.h"

namespace hopper {

// Before the first wgmma, and after registers of accumulators (or of A) were written by other instructions.
HOPPER_DEVICE void wgmma_fence([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::wgmma_fence(site);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// What the thread has issued since the last commit becomes a group.
HOPPER_DEVICE void wgmma_commit([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::wgmma_commit(site);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most `pending` committed groups are in flight: the accumulators of the others may be read, A in
// registers and shared memory that they read may be written. Follow it by register_fence of those
// accumulators.
template <uint32_t pending>
HOPPER_DEVICE void wgmma_wait([[maybe_unused]] Site site = HOPPER_HERE) {
#ifdef HOPPER_EMULATED
  emulator::wgmma_wait(pending, site);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}

// Keeps the compiler from moving uses of accumulators over a wait.
template <int count>
HOPPER_DEVICE void register_fence([[maybe_unused]] float (&d)[count]) {
#ifndef HOPPER_EMULATED
  HOPPER_UNROLL for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#ifdef HOPPER_EMULATED

template <int n, Operand a, Operand b, Major a_major = Major::k, Major b_major = Major::k>
struct Wgmma {
  static constexpr bool k8bit = a == Operand::e4m3 || a == Operand::e5m2;
  static_assert(n >= 8 && n <= 256 && n % 8 == 0, "wgmma has n = 8, 16, ... 256");
  static_assert(a == b, "mixed operand formats are not instantiated");
  static_assert(!k8bit || (a_major == Major::k && b_major == Major::k), "8-bit operands are K-major");
  static constexpr emulator::WgmmaShape kShape{n, a, b, a_major, b_major};
  static void issue(float (&d)[n / 2], uint64_t a_matrix, uint64_t b_matrix, bool accumulate,
                    Site site = HOPPER_HERE) {
    emulator::wgmma(kShape, d, a_matrix, b_matrix, accumulate, site);
  }
  static void issue(float (&d)[n / 2], const uint32_t (&a_words)[4], uint64_t b_matrix, bool accumulate,
                    Site site = HOPPER_HERE) requires(a_major == Major::k) {
    emulator::wgmma(kShape, d, a_words, b_matrix, accumulate, site);
  }
};

#else

template <int n, Operand a, Operand b, Major a_major = Major::k, Major b_major = Major::k>
struct Wgmma;

// One instruction: types and k in the text, the accumulate switch as a predicate, scales of A and B 1, then -
// only for 16-bit formats - whether A (from shared memory) and B are MN-major.
#define HOPPER_WGMMA_ISSUE(n, places, what, a_text, a_operand, x1, x2, tail, tail_operands, ...)                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " x2 ", 0; wgmma.mma_async.sync.aligned.m64n" #n what " " places ", " a_text \
               ", " x1 ", p, 1, 1" tail "; }"                                                                             \
               : __VA_ARGS__                                                                                              \
               : a_operand, "l"(b_matrix), "r"(static_cast<uint32_t>(accumulate)) tail_operands                           \
               : "memory")
#define HOPPER_COMMA ,

#define HOPPER_WGMMA_SHAPE(n, places, x0, x1, x2, x3, x4, x5, x6, ...)                                                      \
  template <Operand a, Operand b, Major a_major, Major b_major>                                                           \
  struct Wgmma<n, a, b, a_major, b_major> {                                                                               \
    static constexpr bool k8bit = a == Operand::e4m3 || a == Operand::e5m2;                                               \
    static_assert(a == b, "mixed operand formats are not instantiated");                                                  \
    static_assert(!k8bit || (a_major == Major::k && b_major == Major::k), "8-bit operands are K-major");                  \
    static HOPPER_DEVICE void issue(float (&d)[n / 2], uint64_t a_matrix, uint64_t b_matrix, bool accumulate,             \
                                    Site = {}) {                                                                          \
      constexpr int ta = a_major == Major::mn, tb = b_major == Major::mn;                                                 \
      if constexpr (a == Operand::e4m3)                                                                                   \
        HOPPER_WGMMA_ISSUE(n, places, "k32.f32.e4m3.e4m3", x0, "l"(a_matrix), x1, x2, , , __VA_ARGS__);                   \
      else if constexpr (a == Operand::e5m2)                                                                              \
        HOPPER_WGMMA_ISSUE(n, places, "k32.f32.e5m2.e5m2", x0, "l"(a_matrix), x1, x2, , , __VA_ARGS__);                   \
      else if constexpr (a == Operand::bf16)                                                                              \
        HOPPER_WGMMA_ISSUE(n, places, "k16.f32.bf16.bf16", x0, "l"(a_matrix), x1, x2, ", " x3 ", " x4,                    \
                           HOPPER_COMMA "n"(ta) HOPPER_COMMA "n"(tb), __VA_ARGS__);                                       \
      else                                                                                                                \
        HOPPER_WGMMA_ISSUE(n, places, "k16.f32.f16.f16", x0, "l"(a_matrix), x1, x2, ", " x3 ", " x4,                      \
                           HOPPER_COMMA "n"(ta) HOPPER_COMMA "n"(tb), __VA_ARGS__);                                       \
    }                                                                                                                     \
    static HOPPER_DEVICE void issue(float (&d)[n / 2], const uint32_t (&w)[4], uint64_t b_matrix, bool accumulate,        \
                                    Site = {}) requires(a_major == Major::k) {                                            \
      constexpr int tb = b_major == Major::mn;                                                                            \
      if constexpr (a == Operand::e4m3)                                                                                   \
        HOPPER_WGMMA_ISSUE(n, places, "k32.f32.e4m3.e4m3", "{" x0 ", " x1 ", " x2 ", " x3 "}", HOPPER_A_WORDS, x4, x5, ,  \
                           , __VA_ARGS__);                                                                                \
      else if constexpr (a == Operand::e5m2)                                                                              \
        HOPPER_WGMMA_ISSUE(n, places, "k32.f32.e5m2.e5m2", "{" x0 ", " x1 ", " x2 ", " x3 "}", HOPPER_A_WORDS, x4, x5, ,  \
                           , __VA_ARGS__);                                                                                \
      else if constexpr (a == Operand::bf16)                                                                              \
        HOPPER_WGMMA_ISSUE(n, places, "k16.f32.bf16.bf16", "{" x0 ", " x1 ", " x2 ", " x3 "}", HOPPER_A_WORDS, x4, x5,    \
                           ", " x6, HOPPER_COMMA "n"(tb), __VA_ARGS__);                                                   \
      else                                                                                                                \
        HOPPER_WGMMA_ISSUE(n, places, "k16.f32.f16.f16", "{" x0 ", " x1 ", " x2 ", " x3 "}", HOPPER_A_WORDS, x4, x5,      \
                           ", " x6, HOPPER_COMMA "n"(tb), __VA_ARGS__);                                                   \
    }                                                                                                                     \
  };
#define HOPPER_A_WORDS "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])

#include "wgmma_shapes.h"

#undef HOPPER_WGMMA_SHAPE
#undef HOPPER_WGMMA_ISSUE
#undef HOPPER_COMMA
#undef HOPPER_A_WORDS

#endif

}  // namespace hopper
