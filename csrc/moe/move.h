// Rows to the places that row_of_slot names: the last step of a permutation, and the whole gradient of `unpermute`
// without weights.
#pragma once

#include "moe.h"

namespace moe {

struct MoveArguments {
  Table<const void> x;                    // [tokens, columns], strides in elements
  int64_t element_bytes = 2, tokens = 0, columns = 0, top_k = 1;
  const int32_t* row_of_slot = nullptr;
  void* out = nullptr;
  bool programmatic = true;
};
void move_rows(const char* name, const MoveArguments& arguments, hopper::Stream stream);

}  // namespace moe
