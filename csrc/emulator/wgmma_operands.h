// Operands of wgmma in shared memory: what a matrix descriptor points at.
#pragma once

#include <string>

#include "twins.h"

namespace emulator {

struct MatrixDescriptor {
  uint32_t start, leading_bytes, stride_bytes, base_offset;
  Swizzle swizzle;
};

MatrixDescriptor decode_descriptor(uint64_t);

// Gathers `rows` rows of 32 bytes (64 of A, n of B), K contiguous in the result. `window` is the host address of shared
// address 0; legal addresses lie in [begin, end). touch(context, address, bytes) hears of every piece that is read.
// Returns what is wrong with the descriptor, or nothing.
std::string gather_operand(const uint8_t* window, uint32_t begin, uint32_t end, uint64_t descriptor, Operand, Major, uint32_t rows,
                           uint8_t* out, void (*touch)(void*, uint32_t, uint32_t), void* context);

}  // namespace emulator
