// A tensor as kernels see it: where it lies, what it holds, how it is laid out. It owns nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

enum class Dtype : uint8_t {
  boolean, u8, i8, i16, i32, i64, u16, u32, u64, f16, bf16, f32, f64, e4m3, e5m2, e8m0
};

constexpr int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::boolean: case Dtype::u8: case Dtype::i8: case Dtype::e4m3: case Dtype::e5m2: case Dtype::e8m0: return 1;
    case Dtype::i16: case Dtype::u16: case Dtype::f16: case Dtype::bf16: return 2;
    case Dtype::i32: case Dtype::u32: case Dtype::f32: return 4;
    default: return 8;
  }
}

// PyTorch's name of the type: error messages speak the user's language.
constexpr const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32",
                                    "uint64", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn",
                                    "float8_e5m2", "float8_e8m0fnu"};
  return kNames[static_cast<int>(dtype)];
}

constexpr int kMaxRank = 6;
constexpr int kHost = -1;              // TensorView::device of host memory

struct TensorView {
  const char* name = "tensor";         // of the argument, for messages and reports
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int rank = 0;
  int64_t shape[kMaxRank] = {}, stride[kMaxRank] = {};   // elements
  int device = kHost;                  // CUDA device, or kHost

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }

  // Bytes from the first to past the last element; strides of a torch tensor are never negative.
  int64_t span_bytes() const {
    if (numel() == 0) return 0;
    int64_t last = 0;
    for (int i = 0; i < rank; ++i) last += (shape[i] - 1) * stride[i];
    return (last + 1) * size_of(dtype);
  }

  template <class T>
  T* as() const { return static_cast<T*>(data); }
};

using OptionalTensor = std::optional<TensorView>;
using Tensors = std::vector<TensorView>;   // a list argument; element i is named "<list>[i]"
