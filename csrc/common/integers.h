// Integer arithmetic of shapes, on the host.
#pragma once

#include <cstdint>

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline bool is_aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether no byte lies in both; in none of them nothing does.
inline bool are_apart(const void* p, int64_t p_bytes, const void* q, int64_t q_bytes) {
  const auto a = reinterpret_cast<uintptr_t>(p), b = reinterpret_cast<uintptr_t>(q);
  return p_bytes == 0 || q_bytes == 0 || a + p_bytes <= b || b + q_bytes <= a;
}
