// Vector and storage types that both targets share. The host targets need no CUDA header: a machine without the
// toolkit still builds and runs every kernel.
#pragma once

#include <cstdint>

#include "site.h"

#ifdef HOPPER_EMULATED

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };

#endif

namespace hopper {

// Storage of the low-precision formats; arithmetic goes through convert.h.
struct bf16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };

// One 64-bit barrier object in shared memory (PTX ISA "mbarrier"); use it through mbarrier.h.
struct alignas(8) Mbarrier { uint64_t word; };

// 128 opaque bytes that describe a tensor to TMA (PTX ISA "Tensor-map"); made by tensor_map.h.
struct alignas(128) TensorMap { uint64_t words[16]; };

// Memory order and scope of loads, stores, atomics and fences (PTX ISA "Memory Consistency Model").
enum class Order : uint8_t { weak, relaxed, acquire, release, acq_rel };
enum class Scope : uint8_t { cta, cluster, gpu, sys };

enum class Space : uint8_t { all, shared, global };             // state space of fence.proxy.async
enum class Reduce : uint8_t { add, min, max, inc, dec, and_, or_, xor_ };  // .redOp of bulk reductions and red
enum class Element : uint8_t { u8, u16, u32, s32, u64, s64, f16, bf16, f32, f64 };  // element type of TMA and bulk reductions
enum class Swizzle : uint8_t { none, b32, b64, b128 };          // shared-memory pattern, by span in bytes
enum class Operand : uint8_t { e4m3, e5m2, bf16, f16 };         // wgmma operand formats (fp32 accumulator)
enum class Major : uint8_t { k, mn };                           // which axis of an operand is contiguous
enum class Shuffle : uint8_t { idx, up, down, xor_ };
enum class Vote : uint8_t { ballot, any, all };

}  // namespace hopper
