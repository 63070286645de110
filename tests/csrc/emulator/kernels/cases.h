// Kernels with planted bugs. Each case is a small kernel that takes a bug number: 0 is the legal pattern, which must be
// accepted on every seed; every other number breaks one rule, and the case says which reports may name it.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../../csrc/emulator/options.h"
#include "../../../../csrc/hopper/front.h"
#include "../../../../csrc/hopper/tensor_map.h"

namespace planted {

using namespace hopper;

struct Case {
  const char* name;
  std::vector<const char*> expected;   // by bug, from 1: rules separated by '|'; "data" for wrong results without a report
  void (*run)(int bug);
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

#define CASE(name, ...)                                                                                            \
  static void run_##name(int bug);                                                                                 \
  [[maybe_unused]] static const bool registered_##name = (cases().push_back({#name, {__VA_ARGS__}, run_##name}), true); \
  static void run_##name(int bug)

struct WrongData : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Global memory that the next launches may touch.
template <class T>
class Buffer {
 public:
  Buffer(size_t count, const char* name, bool writable, int rank = 0) : count_(count) {
    data_ = static_cast<T*>(std::aligned_alloc(1024, (count * sizeof(T) + 1023) / 1024 * 1024));
    for (size_t i = 0; i < count; ++i) data_[i] = T{};
    emulator::register_buffer(data_, count * sizeof(T), name, writable, rank);
  }
  ~Buffer() {
    emulator::clear_buffers();
    std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }

  template <class F>
  void expect(F value) {
    for (size_t i = 0; i < count_; ++i)
      if (!(data_[i] == value(i))) throw WrongData("element " + std::to_string(i) + " is wrong");
  }

 private:
  T* data_;
  size_t count_;
};

inline LaunchConfig shape(uint32_t blocks, uint32_t threads, size_t smem = 16384, uint32_t cluster = 1) {
  LaunchConfig c;
  c.grid = dim3(blocks);
  c.block = dim3(threads);
  c.smem_bytes = smem;
  c.cluster = cluster;
  return c;
}

inline TensorMap bytes_2d(const void* base, int64_t rows, int64_t columns, int32_t box_rows, int32_t box_columns, Swizzle swizzle) {
  TensorMapShape s;
  s.rank = 2;
  s.size[0] = columns;
  s.size[1] = rows;
  s.stride_bytes[0] = columns;
  s.box[0] = box_columns;
  s.box[1] = box_rows;
  return make_tensor_map(base, Element::u8, s, swizzle);
}

}  // namespace planted
