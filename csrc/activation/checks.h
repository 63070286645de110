// Host checks that SwiGLU's launchers share.
#pragma once

#include "../quantize/checks.h"
#include "activation.h"

namespace activation {

inline void check_gate_up(const Matrix& x) {
  quantize::check_input("gate_up", x);
  require(x.columns % 2 == 0, "gate_up", "must have an even number of columns, gate and up", x.columns);
}

inline void check_weight(const RowWeight& weight) {
  require(is_aligned(weight.data, sizeof(float)), "weight", "must be aligned to its elements", weight.data);
  require(weight.stride >= 0, "weight", "must not have a negative stride", weight.stride);
}

inline void check_dy(const Matrix& dy, const Matrix& gate_up) {
  quantize::check_input("dy", dy);
  require(dy.rows == gate_up.rows && dy.columns == gate_up.columns / 2, "dy", "must have the shape of one half of gate_up",
          dy.columns);
}

// Both halves of gate_up by 16-byte pieces.
inline bool vectorised(const Matrix& gate_up) {
  return quantize::vectorised(gate_up, nullptr) && gate_up.columns % 32 == 0;
}

}  // namespace activation
