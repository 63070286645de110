// Operands of wgmma in shared memory: what a matrix descriptor points at. PTX ISA 9.7.15.5.1.2 "Shared Memory
// Matrix Layout" and "Matrix Descriptor Format".
#pragma once

#include <string>

#include "twins.h"

namespace emulator {

struct MatrixDescriptor {
  uint32_t start_address;        // 18 bits of the shared address, a multiple of 16
  uint32_t leading_byte_offset;  // bytes; what it steps over depends on major and swizzle, see gather_operand
  uint32_t stride_byte_offset;   // bytes
  uint32_t base_offset;          // units of 128 bytes by which the swizzle's pattern is displaced
  Swizzle swizzle;
};

MatrixDescriptor decode_descriptor(uint64_t);
uint64_t encode_descriptor(const MatrixDescriptor&);  // inverse for legal values; others lose surplus bits

// Gathers `rows` rows of 32 bytes (64 of A, n of B) with K contiguous. Returns what is wrong, by the rule's
// name, or nothing. `window` is the host address of shared address 0 (it may lie outside of the block's
// memory: only legal addresses, those in [begin, end), are read). touch(context, address, 16) hears of every
// 16-byte chunk before it is read, by its physical address, after the swizzle; it may be null.
//
// Element (row, k) of E bytes lies at the start address plus this, then swizzled. T = 16 / E elements are one
// chunk, S is the swizzle's span (Table "Canonical Layouts"):
//   K-major, no swizzle      row%8 * 16  + row/8 * stride    + k/T * leading          + k%T * E
//   K-major, swizzle         row%8 * S   + row/8 * stride    + k * E                  (leading is not used)
//   MN-major, no swizzle     row%T * E   + row/T * stride    + k%8 * 16  + k/8 * leading
//   MN-major, swizzle        row%(S/E)*E + row/(S/E) * leading + k%8 * S + k/8 * stride
std::string gather_operand(const uint8_t* window, uint32_t begin, uint32_t end, uint64_t descriptor, Operand,
                           Major, uint32_t rows, uint8_t* out,
                           void (*touch)(void* context, uint32_t address, uint32_t bytes), void* context);

}  // namespace emulator
