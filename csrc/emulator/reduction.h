// Element-wise reductions of atomics, bulk copies and TMA. PTX ISA: "red", "atom", "cp.reduce.async.bulk",
// "cp.reduce.async.bulk.tensor".
#pragma once

#include <cstddef>
#include <string>

#include "../hopper/tensor_map.h"
#include "twins.h"

namespace emulator {

using hopper::element_bytes;

// Whether the pair of operation and type exists: empty, or text that says what does. and_, or_ and xor_ go by
// width: u32 and s32 stand for .b32, u64 and s64 for .b64.
std::string atomic_legal(Reduce, Element);          // red, atom: scalar forms
std::string bulk_reduce_legal(Reduce, Element);     // cp.reduce.async.bulk to global memory
std::string tensor_reduce_legal(Reduce, Element);   // cp.reduce.async.bulk.tensor, by the map's element type

// What fp32 sums make of subnormal operands and results. The other types keep them everywhere (.noftz).
enum class Subnormals : uint8_t { keep, flush };    // flush: to a zero of the same sign
// PTX ISA "cp.reduce.async.bulk": "flushes subnormal inputs and results to sign-preserving zero".
inline constexpr Subnormals kBulkSubnormals = Subnormals::flush;
// PTX ISA "atom", "red": the same on global memory; shared memory keeps them.
inline constexpr Subnormals kGlobalAtomicSubnormals = Subnormals::flush;
inline constexpr Subnormals kSharedAtomicSubnormals = Subnormals::keep;
// The ISA is silent on tensors; the driver has a data type FLOAT32_FTZ besides, so FLOAT32 should keep them.
inline constexpr Subnormals kTensorSubnormals = Subnormals::keep;

// dst[i] = op(dst[i], src[i]) for a legal pair. Floating-point sums round to nearest even; their NaN is the
// canonical one of the type: 0x7fffffff for f32, 0x7fff for the 16-bit types.
void reduce_elements(Reduce, Element, void* dst, const void* src, size_t bytes,
                     Subnormals = Subnormals::keep);

// One element; `old`, if not null, receives what was there.
void atomic_element(Reduce, Element, void* p, const void* value, void* old, Subnormals = Subnormals::keep);

}  // namespace emulator
