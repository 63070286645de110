// The arithmetic of one wgmma, bit by bit: the model of deepseek_ops/reference/tensor_core.py.
//
// All products of a step and the accumulator are aligned to the largest exponent, cut toward zero to 13 (fp8) or 25 (16-bit)
// fractional bits, added exactly, and the sum is cut to 13 or 23 mantissa bits. An exponent is that of the significands
// (ea + eb, not normalised); zeros have none; subnormals have the smallest of their format. NaN, or infinities of both
// signs, give 0x7FFFFFFF. Published model (arXiv 2511.10909, 2512.07004); golden vectors of bench/prove.py settle it.
#pragma once

#include "twins.h"

namespace emulator {

// d[64][n] = (accumulate ? d : 0) + a b^T; a: 64 rows of 32 bytes, b: n rows of 32 bytes.
// fast: plain fp32 sums instead, for speed where bits do not matter.
void tensor_core_multiply(Operand, uint32_t n, const uint8_t* a, const uint8_t* b, float* d, bool accumulate, bool fast);

// The value of one element of an operand format.
double operand_value(Operand, uint32_t bits);

}  // namespace emulator
