// 8x8 matrices of 16-bit elements between shared memory and the registers of a warp. PTX ISA: "ldmatrix",
// "stmatrix". Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned). Register r
// of lane l holds row l / 4, columns 2 (l % 4) and +1 of matrix r; transposed: the same of the transposed
// matrix.
#pragma once

#include "address.h"

namespace hopper {

template <int count, bool transposed = false>
HOPPER_DEVICE void ldmatrix(uint32_t (&r)[count], const void* row, [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(count == 1 || count == 2 || count == 4, "ldmatrix moves 1, 2 or 4 matrices");
#ifdef HOPPER_EMULATED
  emulator::ldmatrix(r, count, transposed, row, site);
#else
  const uint32_t a = shared_address(row);
  if constexpr (count == 1 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared::cta.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(a) : "memory");
  if constexpr (count == 1 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared::cta.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(a) : "memory");
  if constexpr (count == 2 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared::cta.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(a) : "memory");
  if constexpr (count == 2 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(a) : "memory");
  if constexpr (count == 4 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
  if constexpr (count == 4 && transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
#endif
}

template <int count, bool transposed = false>
HOPPER_DEVICE void stmatrix(void* row, const uint32_t (&r)[count], [[maybe_unused]] Site site = HOPPER_HERE) {
  static_assert(count == 1 || count == 2 || count == 4, "stmatrix moves 1, 2 or 4 matrices");
#ifdef HOPPER_EMULATED
  emulator::stmatrix(row, r, count, transposed, site);
#else
  const uint32_t a = shared_address(row);
  if constexpr (count == 1 && !transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared::cta.b16 [%0], {%1};" ::"r"(a), "r"(r[0]) : "memory");
  if constexpr (count == 1 && transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared::cta.b16 [%0], {%1};" ::"r"(a), "r"(r[0]) : "memory");
  if constexpr (count == 2 && !transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared::cta.b16 [%0], {%1, %2};" ::"r"(a), "r"(r[0]), "r"(r[1]) : "memory");
  if constexpr (count == 2 && transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 [%0], {%1, %2};" ::"r"(a), "r"(r[0]), "r"(r[1]) : "memory");
  if constexpr (count == 4 && !transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3]) : "memory");
  if constexpr (count == 4 && transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3]) : "memory");
#endif
}

}  // namespace hopper
