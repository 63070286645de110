// Launching a kernel: `launch({grid, block, smem, ...}, kernel, arguments...)`; the only way kernels are
// started. CUDA runtime: cudaLaunchKernelEx with cluster dimension and programmatic stream serialization.
// Nothing is allocated and nothing waits, so that a launch can be captured in a graph. A grid without blocks
// is an error: check before.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "types.h"

#ifdef HOPPER_EMULATED
#include "../emulator/twins.h"
#else
#include <cuda_runtime.h>
#endif

namespace hopper {

#ifdef HOPPER_EMULATED
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;        // dynamic shared memory; more than 48 KiB is asked for by launch()
  uint32_t cluster = 1;         // CTAs along x that share their memories
  bool programmatic = false;    // may begin before the previous kernel of the stream ends: call grid_dependency_wait
  Stream stream = nullptr;
  const char* name = "kernel";
};

#ifdef HOPPER_EMULATED

template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<std::remove_cv_t<Parameters>> && ...), "kernel parameters are copied as bytes");
  using Values = std::tuple<std::remove_cv_t<Parameters>...>;
  struct Call {
    void (*kernel)(Parameters...);
    Values values;
  };
  static_assert(alignof(Call) <= 128);
  const Call call{kernel, Values(static_cast<Parameters>(arguments)...)};
  emulator::launch({config.grid, config.block, config.smem_bytes, config.cluster, config.programmatic, config.name},
                   [](void* p) {
                     const auto& c = *static_cast<const Call*>(p);
                     std::apply(c.kernel, c.values);
                   },
                   &call, sizeof(Call));
}

inline int sm_count() { return static_cast<int>(emulator::sm_count()); }

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const LaunchConfig& config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (config.smem_bytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(config.smem_bytes)),
          config.name);
  if (config.cluster > 8)   // 16 is the most, and not portable
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), config.name);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t c{};
  c.gridDim = config.grid;
  c.blockDim = config.block;
  c.dynamicSmemBytes = config.smem_bytes;
  c.stream = config.stream;
  c.attrs = attributes;
  if (config.cluster > 1) {
    attributes[c.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[c.numAttrs++].val.clusterDim = {config.cluster, 1, 1};
  }
  if (config.programmatic) {
    attributes[c.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[c.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&c, kernel, static_cast<Parameters>(arguments)...), config.name);
}

inline int sm_count() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
}

#endif

}  // namespace hopper
