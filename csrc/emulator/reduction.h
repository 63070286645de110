// Element-wise reductions of atomics, bulk copies and TMA. PTX ISA: "red", "atom", "cp.reduce.async.bulk".
#pragma once

#include <cstddef>
#include <string>

#include "twins.h"

namespace emulator {

uint32_t element_bytes(Element);

// Whether the pair of operation and type exists; the text says what does.
std::string atomic_legal(Reduce, Element);
std::string bulk_reduce_legal(Reduce, Element);

// dst[i] = op(dst[i], src[i]). Floating-point sums round to nearest even and keep denormals.
void reduce_elements(Reduce, Element, void* dst, const void* src, size_t bytes);

}  // namespace emulator
