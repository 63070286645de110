// The smallest family: what tests of the bindings and of the build call.
#pragma once

#include <cstdint>

#include "../../../csrc/hopper/launch.h"

namespace toy {

struct AxpyArguments {
  const float* x = nullptr;
  const float* y = nullptr;     // may be null: zero
  float* out = nullptr;
  int64_t n = 0;
  float a = 1;
  bool past_end = false;        // planted: writes one element too many
};
void axpy(const AxpyArguments&, hopper::Stream);

// out[i] = x[n - 1 - i] within each block of 128, through shared memory and one barrier.
void reverse(const float* x, float* out, int64_t n, hopper::Stream);

}  // namespace toy
