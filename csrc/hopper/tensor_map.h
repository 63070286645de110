// Tensor maps: what TMA is told about a tensor in global memory. CUDA driver API: "cuTensorMapEncodeTiled".
//
// Host code only. Every limit is checked before anything is encoded, by one function for both targets, so
// that CI without a GPU refuses what a GPU would refuse. Messages name argument, rule and value.
#pragma once

#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "types.h"

#ifndef HOPPER_EMULATED
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#endif

namespace hopper {

enum class L2Promotion : uint8_t { none, b64, b128, b256 };  // what a miss in L2 fetches from memory; a hint
enum class Fill : uint8_t { zeros, nan };                    // what loads find outside of the tensor

// Dimensions and coordinates run from the contiguous dimension on, as in the instruction. Interleaved layouts
// and im2col are not described: no kernel has a use for them.
struct TensorMapSpec {
  const void* base = nullptr;
  Element element = Element::u8;                    // see element_of
  int rank = 0;                                     // 1 to 5
  uint64_t sizes[5] = {};                           // elements
  uint64_t strides_bytes[4] = {};                   // [i]: of dimension i + 1; dimension 0 is contiguous
  uint32_t box[5] = {};                             // elements that a copy spans
  uint32_t element_strides[5] = {1, 1, 1, 1, 1};    // n: every n-th element of the box, ceil(box / n) in all
  Swizzle swizzle = Swizzle::none;
  L2Promotion promotion = L2Promotion::b256;
  Fill fill = Fill::zeros;
};

inline uint32_t element_bytes(Element e) {
  switch (e) {
    case Element::u8: return 1;
    case Element::u16: case Element::f16: case Element::bf16: return 2;
    case Element::u32: case Element::s32: case Element::f32: return 4;
    default: return 8;
  }
}

// The element type of a tensor of T. TMA has no 8-bit floating point: copies move e4m3 as bytes.
template <class T>
constexpr Element element_of() {
  if constexpr (std::is_same_v<T, e4m3> || std::is_same_v<T, uint8_t>) return Element::u8;
  else if constexpr (std::is_same_v<T, bf16>) return Element::bf16;
  else if constexpr (std::is_same_v<T, float>) return Element::f32;
  else if constexpr (std::is_same_v<T, double>) return Element::f64;
  else if constexpr (std::is_same_v<T, uint16_t>) return Element::u16;
  else if constexpr (std::is_same_v<T, uint32_t>) return Element::u32;
  else if constexpr (std::is_same_v<T, int32_t>) return Element::s32;
  else if constexpr (std::is_same_v<T, uint64_t>) return Element::u64;
  else {
    static_assert(std::is_same_v<T, int64_t>, "no element type of tensor maps for this type");
    return Element::s64;
  }
}

inline uint32_t swizzle_span(Swizzle s) {  // bytes; 0 without a swizzle
  return s == Swizzle::none ? 0 : 16u << static_cast<uint32_t>(s);
}

// Throws std::invalid_argument "tensor map argument: rule; got value". The rules are those of
// cuTensorMapEncodeTiled for CU_TENSOR_MAP_INTERLEAVE_NONE, except where a comment names another source.
inline void check_tensor_map_spec(const TensorMapSpec& spec) {
  constexpr int kScalar = -1;  // not an item of an array
  const auto refuse = [](const char* argument, int index, const std::string& rule, const auto& value) {
    std::ostringstream text;
    text << "tensor map " << argument;
    if (index != kScalar) text << "[" << index << "]";
    text << ": " << rule << "; got " << value;
    throw std::invalid_argument(text.str());
  };
  const auto require = [&refuse](bool holds, const char* argument, int index, const char* rule, auto value) {
    if (!holds) refuse(argument, index, rule, value);
  };
  const auto number = [](auto member) { return static_cast<int>(member); };

  require(spec.element <= Element::f64, "element", kScalar, "must be a member of Element",
          number(spec.element));
  require(spec.swizzle <= Swizzle::b128, "swizzle", kScalar, "must be a member of Swizzle",
          number(spec.swizzle));
  require(spec.promotion <= L2Promotion::b256, "promotion", kScalar, "must be a member of L2Promotion",
          number(spec.promotion));
  require(spec.fill <= Fill::nan, "fill", kScalar, "must be a member of Fill", number(spec.fill));
  require(spec.rank >= 1 && spec.rank <= 5, "rank", kScalar, "must be 1 to 5", spec.rank);
  require(spec.base != nullptr, "base", kScalar, "must not be null: TMA has no empty tensors",
          "a null pointer");
  require(reinterpret_cast<uintptr_t>(spec.base) % 16 == 0, "base", kScalar, "must be a multiple of 16 bytes",
          spec.base);

  const uint32_t bytes = element_bytes(spec.element);
  uint64_t box_bytes = bytes;
  for (int i = 0; i < spec.rank; ++i) {
    require(spec.sizes[i] >= 1 && spec.sizes[i] <= uint64_t{1} << 32, "sizes", i,
            "must be 1 to 2^32 elements", spec.sizes[i]);
    require(spec.box[i] >= 1 && spec.box[i] <= 256, "box", i, "must be 1 to 256 elements", spec.box[i]);
    require(spec.element_strides[i] >= 1 && spec.element_strides[i] <= 8, "element_strides", i,
            "must be 1 to 8 elements", spec.element_strides[i]);
    box_bytes *= (spec.box[i] + spec.element_strides[i] - 1) / spec.element_strides[i];
  }
  for (int i = 0; i + 1 < spec.rank; ++i) {
    require(spec.strides_bytes[i] % 16 == 0, "strides_bytes", i,
            "must be a multiple of 16 bytes (pad the rows)", spec.strides_bytes[i]);
    require(spec.strides_bytes[i] < uint64_t{1} << 40, "strides_bytes", i, "must be less than 2^40 bytes",
            spec.strides_bytes[i]);
  }
  // The driver ignores it; PTX ISA 5.5.3.2 "Traversal-Stride" asks for 1 unless the layout is interleaved.
  require(spec.element_strides[0] == 1, "element_strides", 0,
          "must be 1: TMA cannot stride along dimension 0", spec.element_strides[0]);

  const uint32_t row = spec.box[0] * bytes, span = swizzle_span(spec.swizzle);
  if (row % 16 != 0 || (span != 0 && row > span)) {
    const std::string rule = row % 16 != 0 ? "must be a multiple of 16 bytes"
                                           : "must be at most the " + std::to_string(span) +
                                                 "-byte span of the swizzle";
    refuse("box", 0, rule, std::to_string(row) + " bytes (" + std::to_string(spec.box[0]) + " elements)");
  }
  // CUDA programming guide, "Compute Capabilities": shared memory of a block on sm_90. The driver's text has
  // no such rule, but no block could receive the box.
  if (box_bytes > 227 << 10)
    refuse("box", kScalar, "must fit the 232448 bytes of shared memory that a block can have",
           std::to_string(box_bytes) + " bytes");
  const bool floating = spec.element == Element::f16 || spec.element == Element::bf16 ||
                        spec.element == Element::f32 || spec.element == Element::f64;
  if (spec.fill == Fill::nan && !floating)
    refuse("fill", kScalar, "can be nan only for floating-point elements",
           "integer elements of " + std::to_string(bytes) + " bytes");
}

}  // namespace hopper

#ifdef HOPPER_EMULATED

namespace emulator {
hopper::TensorMap encode_tensor_map(const hopper::TensorMapSpec&);  // of a checked spec; tensor_map.cpp
}

#endif

namespace hopper {

#ifndef HOPPER_EMULATED

// The driver's encoder, asked of the driver that is there: a binary that links libcuda cannot even be loaded
// on a machine without one. A failure throws, and the next call tries again.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("tensor map: no CUDA driver: ") + cudaGetErrorName(error) + ", " +
                               cudaGetErrorString(error));
    if (found != cudaDriverEntryPointSuccess || function == nullptr)
      throw std::runtime_error("tensor map: the CUDA driver is older than CUDA 12.0: it has no "
                               "cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

inline CUtensorMapDataType tensor_map_data_type(Element e) {
  switch (e) {
    case Element::u8: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case Element::u16: return CU_TENSOR_MAP_DATA_TYPE_UINT16;
    case Element::u32: return CU_TENSOR_MAP_DATA_TYPE_UINT32;
    case Element::s32: return CU_TENSOR_MAP_DATA_TYPE_INT32;
    case Element::u64: return CU_TENSOR_MAP_DATA_TYPE_UINT64;
    case Element::s64: return CU_TENSOR_MAP_DATA_TYPE_INT64;
    case Element::f16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case Element::bf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case Element::f32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default: return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
  }
}

inline TensorMap encode_tensor_map(const TensorMapSpec& spec) {
  static_assert(static_cast<int>(Swizzle::none) == CU_TENSOR_MAP_SWIZZLE_NONE);
  static_assert(static_cast<int>(Swizzle::b32) == CU_TENSOR_MAP_SWIZZLE_32B);
  static_assert(static_cast<int>(Swizzle::b64) == CU_TENSOR_MAP_SWIZZLE_64B);
  static_assert(static_cast<int>(Swizzle::b128) == CU_TENSOR_MAP_SWIZZLE_128B);
  static_assert(static_cast<int>(L2Promotion::none) == CU_TENSOR_MAP_L2_PROMOTION_NONE);
  static_assert(static_cast<int>(L2Promotion::b256) == CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  static_assert(static_cast<int>(Fill::zeros) == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  static_assert(static_cast<int>(Fill::nan) == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA);
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5], element_strides[5];
  for (int i = 0; i < spec.rank; ++i) {
    sizes[i] = spec.sizes[i];
    box[i] = spec.box[i];
    element_strides[i] = spec.element_strides[i];
    if (i + 1 < spec.rank) strides[i] = spec.strides_bytes[i];
  }
  CUtensorMap encoded;
  const CUresult result = tensor_map_encoder()(
      &encoded, tensor_map_data_type(spec.element), static_cast<cuuint32_t>(spec.rank),
      const_cast<void*>(spec.base), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      static_cast<CUtensorMapSwizzle>(spec.swizzle), static_cast<CUtensorMapL2promotion>(spec.promotion),
      static_cast<CUtensorMapFloatOOBfill>(spec.fill));
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("tensor map: cuTensorMapEncodeTiled failed with CUresult " +
                             std::to_string(static_cast<int>(result)));
  TensorMap map;
  std::memcpy(&map, &encoded, sizeof map);
  return map;
}

#endif

inline TensorMap make_tensor_map(const TensorMapSpec& spec) {
  check_tensor_map_spec(spec);
#ifdef HOPPER_EMULATED
  return emulator::encode_tensor_map(spec);
#else
  return encode_tensor_map(spec);
#endif
}

// A row-major matrix; a copy moves box_rows x box_cols of it.
inline TensorMap make_tensor_map_2d(const void* base, Element element, uint64_t rows, uint64_t cols,
                                    uint64_t row_stride_bytes, uint32_t box_rows, uint32_t box_cols,
                                    Swizzle swizzle) {
  TensorMapSpec spec;
  spec.base = base;
  spec.element = element;
  spec.rank = 2;
  spec.sizes[0] = cols;
  spec.sizes[1] = rows;
  spec.strides_bytes[0] = row_stride_bytes;
  spec.box[0] = box_cols;
  spec.box[1] = box_rows;
  spec.swizzle = swizzle;
  return make_tensor_map(spec);
}

// The same with signed sizes, for callers that keep the tensor apart from its shape.
struct TensorMapShape {
  int rank = 0;
  int64_t size[5] = {};
  int64_t stride_bytes[4] = {};
  int32_t box[5] = {};
  int32_t element_stride[5] = {1, 1, 1, 1, 1};
  bool fill_nan = false;
};

inline TensorMap make_tensor_map(const void* base, Element element, const TensorMapShape& shape,
                                 Swizzle swizzle) {
  TensorMapSpec spec;
  spec.base = base;
  spec.element = element;
  spec.rank = shape.rank;
  for (int i = 0; i < 5; ++i) {  // what is negative becomes too large, and is refused
    spec.sizes[i] = static_cast<uint64_t>(shape.size[i]);
    spec.box[i] = static_cast<uint32_t>(shape.box[i]);
    spec.element_strides[i] = static_cast<uint32_t>(shape.element_stride[i]);
    if (i < 4) spec.strides_bytes[i] = static_cast<uint64_t>(shape.stride_bytes[i]);
  }
  spec.swizzle = swizzle;
  spec.fill = shape.fill_nan ? Fill::nan : Fill::zeros;
  return make_tensor_map(spec);
}

}  // namespace hopper
