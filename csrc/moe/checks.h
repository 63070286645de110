// Host checks that the kernels of this folder share.
#pragma once

#include <limits>

#include "../common/checks.h"
#include "../common/launch_config.h"
#include "moe.h"

namespace moe {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;   // of a grid

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (low <= value && value <= high) return;
  fail(name, "must be in " + std::to_string(low) + ".." + std::to_string(high) + " for the kernels", value);
}

inline void check_output(const char* name, const void* p, int64_t count, uintptr_t alignment) {
  if (count == 0) return;
  require(p != nullptr, name, "must not be null unless it is empty", "a null pointer");
  require(is_aligned(p, alignment), name, "must be aligned to its elements", p);
}

template <class T>
void check_table(const char* name, const Table<T>& x, int64_t rows, int64_t columns, uintptr_t alignment) {
  check_output(name, x.data, rows * columns, alignment);
  if (rows == 0 || columns == 0) return;
  require(x.row_stride >= 0, name, "must not have a negative row stride", x.row_stride);
  require(x.column_stride >= 0, name, "must not have a negative column stride", x.column_stride);
}

// The rows of a permutation: int32 offsets and row numbers.
inline void check_rows(int64_t tokens, int64_t top_k) {
  require(tokens >= 0, "num_tokens", "must not be negative", tokens);
  require(top_k >= 1, "top_k", "must be at least 1", top_k);
  require(tokens <= kMaxRows / top_k, "topk_idx", "must have fewer than 2^31 elements, for offsets are int32", tokens);
}

// Whether every row can be read 16 bytes at a time: `columns` a whole number of them.
inline bool whole_vectors(const void* p, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                          int64_t element_bytes) {
  return is_aligned(p, 16) && (column_stride == 1 || columns == 1) && columns * element_bytes % 16 == 0 &&
         (rows <= 1 || row_stride * element_bytes % 16 == 0);
}
template <class T>
bool whole_vectors(const Table<T>& x, int64_t rows, int64_t columns, int64_t element_bytes) {
  return whole_vectors(x.data, x.row_stride, x.column_stride, rows, columns, element_bytes);
}

// One warp for each of `count`, `threads` a block.
inline uint32_t warp_blocks(const char* name, int64_t count, int threads) {
  const int64_t blocks = ceil_div(count, threads / 32);
  require(blocks <= kMaxBlocks, name, "must have fewer rows than a grid has warps", count);
  return static_cast<uint32_t>(blocks);
}

}  // namespace moe
