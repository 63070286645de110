// How kernels without tensor maps are launched: so many blocks of so many threads.
#pragma once

#include "../hopper/launch.h"

inline hopper::LaunchConfig launch_config(const char* name, uint32_t blocks, int threads, bool programmatic,
                                          hopper::Stream stream, size_t smem_bytes = 0) {
  hopper::LaunchConfig config{};
  config.grid = dim3(blocks);
  config.block = dim3(static_cast<unsigned>(threads));
  config.smem_bytes = smem_bytes;
  config.programmatic = programmatic;
  config.stream = stream;
  config.name = name;
  return config;
}
