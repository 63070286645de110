// What the ops of the GEMM family have in common: knobs, `accumulation`, blocks of scales.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../common/tile_chooser.h"
#include "kernels.h"

namespace gemm_arguments {

using T = const TensorView&;

// What an op lets its caller decide instead of the cost model; zeros leave it to the model.
struct Knobs {
  int64_t num_sms, tile_rows, tile_columns;
};

inline int32_t narrow(const char* name, int64_t value) {
  require(value >= 0 && value <= INT32_MAX, name, "must be in 0..2^31-1", value);
  return static_cast<int32_t>(value);
}

inline std::optional<TileShape> tile_of(Knobs knobs) {
  if (knobs.tile_rows == 0 && knobs.tile_columns == 0) return std::nullopt;
  return TileShape{narrow("tile_rows", knobs.tile_rows), narrow("tile_columns", knobs.tile_columns)};
}

inline void check_accumulation(const std::string& accumulation) {
  require(accumulation == "exact" || accumulation == "hopper", "accumulation",
          "must be exact or hopper, which kernels compute (only the reference leaves promotion out)", accumulation);
}

inline int64_t blocks(int64_t size) { return ceil_div(size, 128); }

}  // namespace gemm_arguments
