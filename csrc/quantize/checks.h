// Host checks that the quantisers share.
#pragma once

#include "../common/checks.h"
#include "../common/launch_config.h"
#include "quantize.h"

namespace quantize {

constexpr int64_t kMaxTiles = (int64_t{1} << 31) - 1;   // blocks of a grid

inline int64_t size_of(Type type) {
  switch (type) {
    case Type::e4m3: case Type::e5m6: return 1;   // e5m6: strides count bytes
    case Type::bf16: return 2;
    case Type::fp32: return 4;
    default: return 8;
  }
}

// Quantised already: comes with scales.
inline bool is_coded(Type type) { return type == Type::e4m3 || type == Type::e5m6; }

inline void check_input(const char* name, const Matrix& x) {
  require(x.rows >= 0, name, "must not have a negative number of rows", x.rows);
  require(x.columns >= 0, name, "must not have a negative number of columns", x.columns);
  if (x.rows == 0 || x.columns == 0) return;
  require(x.data != nullptr, name, "must not be null unless it is empty", "a null pointer");
  require(is_aligned(x.data, size_of(x.type)), name, "must be aligned to its elements", x.data);
  require(x.row_stride >= 0, name, "must not have a negative row stride", x.row_stride);
  require(x.column_stride >= 0, name, "must not have a negative column stride", x.column_stride);
}

// `tiles` of a grid; positive.
inline uint32_t checked_tiles(const char* name, int64_t row_tiles, int64_t column_tiles) {
  require(row_tiles <= kMaxTiles / column_tiles, name, "must have fewer than 2^31 tiles, one block each", row_tiles);
  return static_cast<uint32_t>(row_tiles * column_tiles);
}

inline void check_output(const char* name, const void* p, uintptr_t alignment) {
  require(p != nullptr, name, "must not be null unless it is empty", "a null pointer");
  require(is_aligned(p, alignment), name,
          alignment == 16 ? "must start at a multiple of 16 bytes" : "must be aligned to its elements", p);
}

inline void check_apart(const char* name, const void* output, int64_t output_bytes, const Matrix& x, int64_t batch = 1,
                        int64_t batch_stride = 0) {
  const int64_t last = (batch - 1) * batch_stride + (x.rows - 1) * x.row_stride + (x.columns - 1) * x.column_stride;
  const auto in = reinterpret_cast<uintptr_t>(x.data), out = reinterpret_cast<uintptr_t>(output);
  const bool apart = in + (last + 1) * size_of(x.type) <= out || out + output_bytes <= in;
  require(apart, name, "must not overlap the input, for tiles are written while others are still read", output);
}

// Whether the kernels may use 16-byte loads, and 16-byte stores of codes row by row.
inline bool vectorised(const Matrix& x, const void* q, int64_t batch = 1, int64_t batch_stride = 0) {
  const int64_t bytes = size_of(x.type);
  return is_aligned(x.data, 16) && is_aligned(q, 16) && (x.column_stride == 1 || x.columns == 1) && x.columns % 16 == 0 &&
         (x.rows == 1 || x.row_stride * bytes % 16 == 0) && (batch == 1 || batch_stride * bytes % 16 == 0);
}

}  // namespace quantize
