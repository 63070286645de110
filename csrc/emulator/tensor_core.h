// The arithmetic of one wgmma, bit by bit: the model of deepseek_ops/reference/tensor_core.py.
//
// Every product of a step and the accumulator, as one term more, is aligned to the largest exponent among
// them and cut toward zero to 13 (8-bit formats, k = 32) or 25 (16-bit formats, k = 16) fractional bits; the
// cut terms are added exactly; the sum is cut toward zero to 13 or 23 mantissa bits. Choices where a reader
// could expect another:
//   exponents    those of the significands, ea + eb, of a product that may lie in [1, 4); not normalised
//   subnormals   operands and accumulator keep the smallest exponent of their format and are not flushed;
//                a result below 2^-126 is cut to a multiple of 2^-139 or 2^-149
//   zeros        have no exponent and never decide the alignment; a sum of zero is +0, also of -0 alone
//   NaN          of an operand or the accumulator, 0 times infinity, infinities of both signs: 0x7FFFFFFF
//   infinity     of one sign: that infinity; e4m3 has none (0x7F and 0xFF are NaN)
//   overflow     a sum of 2^128 or more: infinity, although the cut is toward zero
// Sources: arXiv 2511.10909 (MMA-Sim) and 2512.07004. Silicon has not been asked; bench/prove.py does.
#pragma once

#include "twins.h"

namespace emulator {

enum class TensorCoreMode : uint8_t {
  exact,
  fp32,  // d = fl(d + a * b) in fp32, k ascending: faster for some formats, and other bits
};

// d[64][n] = (accumulate ? d : 0) + a b^T. a: 64 rows of 32 bytes; b: n rows of 32 bytes; d contiguous,
// row-major. The formats of a and b are equal, or both 8-bit. Majors do not matter here: the operands have
// been gathered.
void wgmma_product(const WgmmaShape&, const uint8_t* a, const uint8_t* b, float* d, bool accumulate,
                   TensorCoreMode = TensorCoreMode::exact);

// How it is computed; all give the same bits. The best that the machine has is taken unless a test asks for
// another.
enum class TensorCoreLevel : uint8_t {
  scalar,  // 64-bit integers, one output at a time; what the vector code falls back to for rare values
  portable,
  avx2,
  avx512,
};
TensorCoreLevel tensor_core_level();
bool set_tensor_core_level(TensorCoreLevel);  // false, and no change, where the machine does not have it

}  // namespace emulator
