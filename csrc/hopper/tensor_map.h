// Tensor maps: what TMA is told about a tensor in global memory. CUDA driver API: cuTensorMapEncodeTiled.
//
// Every limit of the driver is checked here first, on both targets, so that CI refuses what a GPU would refuse, and the
// sentence names argument, rule and value. The driver entry point is fetched at run time; nothing links libcuda.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "types.h"

#ifndef HOPPER_EMULATED
#include <cuda.h>
#include <cuda_runtime.h>
#endif

namespace hopper {

// Dimensions innermost first. Dimension 0 is contiguous; stride_bytes[i] is that of dimension i + 1.
struct TensorMapShape {
  int rank = 0;                                  // 1..5
  int64_t size[5] = {};                          // elements
  int64_t stride_bytes[4] = {};                  // multiples of 16
  int32_t box[5] = {};                           // elements that one copy moves, 1..256
  int32_t element_stride[5] = {1, 1, 1, 1, 1};   // 1..8: every n-th element
  bool fill_nan = false;                         // outside of the tensor: NaN instead of zero (floating point)
};

inline uint32_t tensor_map_element_bytes(Element e) {
  switch (e) {
    case Element::u8: return 1;
    case Element::u16: case Element::f16: case Element::bf16: return 2;
    case Element::u32: case Element::s32: case Element::f32: return 4;
    default: return 8;
  }
}

// Throws std::invalid_argument with the rule that is broken.
inline void check_tensor_map(const void* base, Element element, const TensorMapShape& s, Swizzle swizzle) {
  auto require = [](bool holds, const std::string& what, const char* rule, int64_t value) {
    if (!holds) throw std::invalid_argument("tensor map: " + what + " " + rule + "; got " + std::to_string(value));
  };
  auto named = [](const char* what, int i) { return std::string(what) + "[" + std::to_string(i) + "]"; };
  require(s.rank >= 1 && s.rank <= 5, "rank", "must be 1..5", s.rank);
  require(base != nullptr, "base", "must not be null", 0);
  require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "base", "must be aligned to 16 bytes", static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) % 16));
  const int64_t bytes = tensor_map_element_bytes(element);
  for (int i = 0; i < s.rank; ++i) {
    require(s.size[i] >= 1 && s.size[i] <= int64_t{1} << 32, named("size", i), "must be 1..2^32", s.size[i]);
    require(s.box[i] >= 1 && s.box[i] <= 256, named("box", i), "must be 1..256", s.box[i]);
    require(s.element_stride[i] >= 1 && s.element_stride[i] <= 8, named("element_stride", i), "must be 1..8", s.element_stride[i]);
    if (i + 1 < s.rank) {
      require(s.stride_bytes[i] % 16 == 0, named("stride_bytes", i), "must be a multiple of 16", s.stride_bytes[i]);
      require(s.stride_bytes[i] >= 0 && s.stride_bytes[i] < int64_t{1} << 40, named("stride_bytes", i), "must be in 0..2^40-1", s.stride_bytes[i]);
    }
  }
  const int64_t inner = s.box[0] * bytes;
  require(inner % 16 == 0, "box[0]", "must span a multiple of 16 bytes", inner);
  const int64_t span = swizzle == Swizzle::b128 ? 128 : swizzle == Swizzle::b64 ? 64 : swizzle == Swizzle::b32 ? 32 : 0;
  require(span == 0 || inner <= span, "box[0]", "must span no more bytes than the swizzle", inner);
  const bool floating = element == Element::f16 || element == Element::bf16 || element == Element::f32 || element == Element::f64;
  require(!s.fill_nan || floating, "fill_nan", "needs a floating-point element type", static_cast<int64_t>(element));
}

#ifdef HOPPER_EMULATED

// What the emulator keeps in the 128 bytes. `check` tells a map from other bytes.
struct PackedTensorMap {
  const void* base;
  uint64_t size_rank[5];        // size - 1 in the low 33 bits, box - 1 above, then element stride - 1
  uint64_t stride_bytes[4];
  uint32_t flags;               // rank, element, swizzle, fill_nan: a byte each
  uint32_t check;
};
static_assert(sizeof(PackedTensorMap) <= sizeof(TensorMap));

inline uint32_t tensor_map_check(PackedTensorMap p) {
  p.check = 0;
  uint32_t h = 2166136261u;
  const auto* bytes = reinterpret_cast<const uint8_t*>(&p);
  for (size_t i = 0; i < sizeof p; ++i) h = (h ^ bytes[i]) * 16777619u;
  return h;
}

inline TensorMap make_tensor_map(const void* base, Element element, const TensorMapShape& s, Swizzle swizzle) {
  check_tensor_map(base, element, s, swizzle);
  PackedTensorMap p;
  std::memset(&p, 0, sizeof p);
  p.base = base;
  for (int i = 0; i < s.rank; ++i)
    p.size_rank[i] = static_cast<uint64_t>(s.size[i] - 1) | static_cast<uint64_t>(s.box[i] - 1) << 33 |
                     static_cast<uint64_t>(s.element_stride[i] - 1) << 41;
  for (int i = 0; i + 1 < s.rank; ++i) p.stride_bytes[i] = static_cast<uint64_t>(s.stride_bytes[i]);
  p.flags = static_cast<uint32_t>(s.rank) | static_cast<uint32_t>(element) << 8 | static_cast<uint32_t>(swizzle) << 16 |
            static_cast<uint32_t>(s.fill_nan) << 24;
  p.check = tensor_map_check(p);
  TensorMap map{};
  std::memcpy(&map, &p, sizeof p);
  return map;
}

#else

inline TensorMap make_tensor_map(const void* base, Element element, const TensorMapShape& s, Swizzle swizzle) {
  check_tensor_map(base, element, s, swizzle);
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || !function)
      throw std::runtime_error(std::string("tensor map: no CUDA driver with cuTensorMapEncodeTiled (CUDA 12.0 or newer): ") +
                               cudaGetErrorString(error));
    return reinterpret_cast<Encode>(function);
  }();
  static constexpr CUtensorMapDataType kTypes[] = {
      CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_DATA_TYPE_UINT32, CU_TENSOR_MAP_DATA_TYPE_INT32,
      CU_TENSOR_MAP_DATA_TYPE_UINT64, CU_TENSOR_MAP_DATA_TYPE_INT64, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT64};   // in the order of Element
  static constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B,
                                                     CU_TENSOR_MAP_SWIZZLE_128B};
  cuuint64_t size[5], stride[4];
  cuuint32_t box[5], element_stride[5];
  for (int i = 0; i < s.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(s.size[i]);
    box[i] = static_cast<cuuint32_t>(s.box[i]);
    element_stride[i] = static_cast<cuuint32_t>(s.element_stride[i]);
    if (i + 1 < s.rank) stride[i] = static_cast<cuuint64_t>(s.stride_bytes[i]);
  }
  alignas(64) CUtensorMap encoded;
  const CUresult result =
      encode(&encoded, kTypes[static_cast<int>(element)], static_cast<cuuint32_t>(s.rank), const_cast<void*>(base), size, stride, box,
             element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             s.fill_nan ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("tensor map: cuTensorMapEncodeTiled refused it with error " + std::to_string(static_cast<int>(result)));
  TensorMap map{};
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  std::memcpy(&map, &encoded, sizeof map);
  return map;
}

#endif

}  // namespace hopper
