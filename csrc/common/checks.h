// Argument checks of the host side. A message has three parts, as in deepseek_ops/_checks.py, so that a user can act
// without reading source: the argument, the rule it broke, and the value it had. Nothing has been launched by then.
#pragma once

#include <initializer_list>
#include <sstream>
#include <string>
#include <type_traits>

#include "integers.h"
#include "status.h"
#include "tensor.h"

template <class Value>
[[noreturn]] void fail(const char* argument, const std::string& rule, const Value& value) {
  std::ostringstream text;
  text << std::boolalpha << argument << ": " << rule << "; got " << value;
  throw ArgumentError(text.str());
}

template <class Value>
void require(bool holds, const char* argument, const char* rule, const Value& value) {
  if (!holds) fail(argument, rule, value);
}

inline std::string text_of(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}
inline std::string shape_text(const TensorView& x) { return "shape " + text_of(x.shape, x.rank); }
inline std::string stride_text(const TensorView& x) {
  return "strides " + text_of(x.stride, x.rank) + " of " + shape_text(x);
}

// ---- one tensor -------------------------------------------------------------------------------------------------

inline void check_dtype(const TensorView& x, std::initializer_list<Dtype> allowed) {
  std::string names;
  for (Dtype dtype : allowed) {
    if (x.dtype == dtype) return;
    names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
  }
  fail(x.name, "must be " + names, name_of(x.dtype));
}

inline void check_rank(const TensorView& x, int rank) {
  if (x.rank != rank) fail(x.name, "must have " + std::to_string(rank) + " dimension(s)", shape_text(x));
}

// -1 leaves a dimension free.
inline void check_shape(const TensorView& x, std::initializer_list<int64_t> wanted) {
  bool fits = x.rank == static_cast<int>(wanted.size());
  int axis = 0;
  for (int64_t size : wanted) {
    fits = fits && (size < 0 || x.shape[axis] == size);
    ++axis;
  }
  if (fits) return;
  std::string text;
  for (int64_t size : wanted) text += (text.empty() ? "" : ", ") + (size < 0 ? std::string("*") : std::to_string(size));
  fail(x.name, "must have shape [" + text + "]", shape_text(x));
}

// Elements next to each other along `axis` (negative counts from the end). The stride of one element says nothing.
inline void check_unit_stride(const TensorView& x, int axis = -1) {
  const int a = axis < 0 ? axis + x.rank : axis;
  if (x.numel() == 0 || x.shape[a] == 1 || x.stride[a] == 1) return;
  fail(x.name, "must have stride 1 along dimension " + std::to_string(a) + " (use .contiguous())", stride_text(x));
}

inline bool is_contiguous(const TensorView& x) {
  int64_t dense = 1;
  for (int i = x.rank - 1; i >= 0; --i) {
    if (x.shape[i] != 1 && x.stride[i] != dense) return x.numel() == 0;
    dense *= x.shape[i];
  }
  return true;
}

inline void check_contiguous(const TensorView& x) {
  if (!is_contiguous(x)) fail(x.name, "must be contiguous (use .contiguous())", stride_text(x));
}

// Every row starts at a multiple of `bytes` as the first one does; TMA asks for 16.
inline void check_stride_bytes(const TensorView& x, int axis, int64_t bytes = 16) {
  const int a = axis < 0 ? axis + x.rank : axis;
  if (x.numel() == 0 || x.shape[a] == 1 || x.stride[a] * size_of(x.dtype) % bytes == 0) return;
  fail(x.name, "must have a stride of a multiple of " + std::to_string(bytes) + " bytes along dimension " +
       std::to_string(a) + " (pad the rows)", std::to_string(x.stride[a] * size_of(x.dtype)) + " bytes");
}

inline void check_aligned(const TensorView& x, uintptr_t bytes = 16) {
  if (x.numel() == 0 || reinterpret_cast<uintptr_t>(x.data) % bytes == 0) return;
  fail(x.name, "must start at a multiple of " + std::to_string(bytes) + " bytes (a view may not; use .clone())",
       x.data);
}

// ---- several tensors --------------------------------------------------------------------------------------------

inline std::string device_text(int device) { return device == kHost ? "cpu" : "cuda:" + std::to_string(device); }

inline void check_same_device(const TensorView& x, const TensorView& first) {
  if (x.device == first.device) return;
  fail(x.name, "must be on " + device_text(first.device) + " as " + first.name, device_text(x.device));
}

// An output may not lie in the span of anything else that the kernel touches: tiles are written while others are read.
// Spans are compared, so that two views which interleave count as overlapping.
inline void check_apart(const TensorView& output, const TensorView& other) {
  const int64_t size = output.span_bytes(), other_size = other.span_bytes();
  if (output.device != other.device || are_apart(output.data, size, other.data, other_size)) return;
  std::ostringstream value;
  value << size << " bytes at " << output.data << " and " << other_size << " bytes at " << other.data;
  fail(output.name, std::string("must not overlap ") + other.name, value.str());
}
