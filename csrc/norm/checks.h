// Host checks that forward and backward share.
#pragma once

#include "../quantize/checks.h"
#include "norm.h"

namespace norms {

inline void check_weight(const Weight& weight, int64_t columns) {
  require(weight.type != Type::e4m3, "weight", "must be bf16 or fp32", "e4m3");
  require(weight.data != nullptr || columns == 0, "weight", "must not be null", "a null pointer");
  require(is_aligned(weight.data, quantize::size_of(weight.type)), "weight", "must be aligned to its elements",
          weight.data);
  require(weight.stride >= 0, "weight", "must not have a negative stride", weight.stride);
}

inline void check_like(const char* name, const Matrix& m, const Matrix& x) {
  quantize::check_input(name, m);
  require(m.type == x.type && m.rows == x.rows && m.columns == x.columns, name, "must have x's type and shape",
          m.columns);
}

inline void check_columns(const Matrix& x) {
  require(x.columns >= 1 || x.rows == 0, "x", "must have at least one column", x.columns);
  require(x.columns <= int64_t{1} << 24, "x", "must have at most 2^24 columns, which fp32 still counts", x.columns);
}

inline bool vectorised(const Weight& weight) { return weight.stride == 1 && is_aligned(weight.data, 16); }

}  // namespace norms
