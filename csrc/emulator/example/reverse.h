#pragma once

#include <cstdint>

// out = in with every 256 floats reversed. Throws what launch() throws: CUDA's errors, or the emulator's report.
void reverse(const float* in, float* out, uint32_t blocks);
