// What every probe shares: buffers on the device or in the emulator, and the one C function that Python calls.
//
// A probe file defines `void run(const probe::Parameters&, probe::Memory&)` and ends with PROBE(run). It is compiled
// twice (bench/proof/builds.py): by nvcc for silicon's answer, by the host compiler for the emulator's prediction.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/hopper/front.h"

#ifdef HOPPER_EMULATED
#include "../../csrc/emulator/options.h"
#else
#include <cuda_runtime.h>
#endif

namespace probe {

struct Buffer {
  void* data;
  uint64_t bytes;
};

#ifndef HOPPER_EMULATED
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}
#endif

class Parameters {
 public:
  Parameters(const int64_t* values, uint32_t count) : values_(values), count_(count) {}
  int64_t operator[](uint32_t i) const {
    if (i >= count_) throw std::runtime_error("the probe reads parameter " + std::to_string(i) + ", which was not given");
    return values_[i];
  }

 private:
  const int64_t* values_;
  uint32_t count_;
};

// The buffers of a call where the kernel can reach them, with the content that Python gave; everything goes back at the
// end, so that what a kernel must not touch is compared, too.
class Memory {
 public:
  Memory(const Buffer* buffers, uint32_t count) : host_(buffers, buffers + count) {
    for (const Buffer& buffer : host_) {
      const uint64_t room = (buffer.bytes + 255) / 256 * 256 + 256;
      void* p = nullptr;
#ifdef HOPPER_EMULATED
#ifdef PROBE_CHECKED
      emulator::options().check = true;   // hazards are errors: a probe must not ask silicon an undefined question
#endif
      p = std::aligned_alloc(256, room);
      if (p == nullptr) throw std::runtime_error("out of memory");
      std::memcpy(p, buffer.data, buffer.bytes);
      emulator::register_buffer(p, buffer.bytes, "probe buffer", true);
#else
      check(cudaMalloc(&p, room), "cudaMalloc");
      check(cudaMemcpy(p, buffer.data, buffer.bytes, cudaMemcpyHostToDevice), "copy to the device");
#endif
      there_.push_back(p);
    }
  }

  ~Memory() {
#ifdef HOPPER_EMULATED
    emulator::clear_buffers();
    for (void* p : there_) std::free(p);
#else
    for (void* p : there_) cudaFree(p);
#endif
  }

  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T>
  T* at(uint32_t i) const {
    if (i >= there_.size()) throw std::runtime_error("the probe asks for buffer " + std::to_string(i));
    return static_cast<T*>(there_[i]);
  }
  uint64_t bytes(uint32_t i) const { return host_.at(i).bytes; }

  void fetch() {
#ifndef HOPPER_EMULATED
    check(cudaGetLastError(), "launch");
    check(cudaDeviceSynchronize(), "kernel");
#endif
    for (size_t i = 0; i < host_.size(); ++i) {
#ifdef HOPPER_EMULATED
      std::memcpy(host_[i].data, there_[i], host_[i].bytes);
#else
      check(cudaMemcpy(host_[i].data, there_[i], host_[i].bytes, cudaMemcpyDeviceToHost), "copy from the device");
#endif
    }
  }

 private:
  std::vector<Buffer> host_;
  std::vector<void*> there_;
};

inline hopper::LaunchConfig grid(uint32_t blocks, uint32_t threads, size_t smem_bytes, uint32_t cluster = 1) {
  hopper::LaunchConfig config{};
  config.grid = dim3(blocks);
  config.block = dim3(threads);
  config.smem_bytes = smem_bytes;
  config.cluster = cluster;
  return config;
}

// Shared memory, filled and dumped by generic accesses, byte for byte as given. Both ends wait for the block, and the
// fence lets the asynchronous engines see what the threads wrote (PTX ISA, "Async proxy").
HOPPER_DEVICE void fill(uint8_t* to, const uint8_t* from, uint32_t bytes, hopper::Site site = HOPPER_HERE) {
  for (uint32_t i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
  hopper::fence_proxy_async<hopper::Space::shared>(site);
  hopper::block_sync(site);
}
HOPPER_DEVICE void dump(uint8_t* to, const uint8_t* from, uint32_t bytes, hopper::Site site = HOPPER_HERE) {
  hopper::block_sync(site);
  for (uint32_t i = threadIdx.x; i < bytes; i += blockDim.x) to[i] = from[i];
}

// Milliseconds of `launches` calls back to back after one warm-up; 0 in the emulator, which has no time.
template <class Launch>
float milliseconds(int launches, Launch launch) {
  launch();
#ifdef HOPPER_EMULATED
  (void)launches;
  return 0.0f;
#else
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  check(cudaDeviceSynchronize(), "warm-up");
  check(cudaEventRecord(begin), "event");
  for (int i = 0; i < launches; ++i) launch();
  check(cudaEventRecord(end), "event");
  check(cudaEventSynchronize(end), "kernel");
  float result = 0;
  check(cudaEventElapsedTime(&result, begin, end), "event");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return result / static_cast<float>(launches);
#endif
}

}  // namespace probe

// Null when it went well, else what went wrong (valid until the next call).
#define PROBE(run)                                                                                            \
  static std::string probe_error;                                                                             \
  extern "C" __attribute__((visibility("default"))) const char* probe_run(                                    \
      const int64_t* parameters, uint32_t parameter_count, const probe::Buffer* buffers, uint32_t count) {    \
    try {                                                                                                     \
      probe::Memory memory(buffers, count);                                                                   \
      run(probe::Parameters(parameters, parameter_count), memory);                                            \
      memory.fetch();                                                                                         \
      return nullptr;                                                                                         \
    } catch (const std::exception& e) {                                                                       \
      probe_error = e.what();                                                                                 \
      return probe_error.c_str();                                                                             \
    }                                                                                                         \
  }
