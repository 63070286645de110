// Where a wrapper was called from, and the macros that let one source compile for Hopper and for the CPU.
//
// HOPPER_EMULATED is defined for the host targets (`emulated`, `checked`), where each wrapper calls its twin in
// csrc/emulator/twins.h; without it the wrapper's body is inline PTX for sm_90a.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef HOPPER_EMULATED

#include <source_location>

#define HOPPER_DEVICE inline             // a device function
#define HOPPER_BOTH inline               // a function for the device and for the host
#define HOPPER_KERNEL(threads) static void  // a kernel of at most `threads` threads a block; always file-local
#define HOPPER_KERNEL_BLOCKS(threads, blocks) static void  // of which `blocks` fit on an SM: bounds its registers
#define HOPPER_GRID_CONSTANT             // a kernel parameter that TMA may read in place
#define HOPPER_UNROLL
#define HOPPER_HERE ::std::source_location::current()

namespace hopper {

// File and line of the kernel's statement. Wrappers end with `Site site = HOPPER_HERE`: the default argument is
// evaluated at the call, so that a report names the kernel's line. Helpers that call wrappers (Pipeline) pass theirs on.
struct Site {
  const char* file = "";
  uint32_t line = 0;
  Site() = default;
  Site(const std::source_location& at) : file(at.file_name()), line(at.line()) {}  // NOLINT: conversion wanted
};

}  // namespace hopper

#else

#define HOPPER_DEVICE __device__ __forceinline__
#define HOPPER_BOTH __host__ __device__ __forceinline__
#define HOPPER_KERNEL(threads) static __global__ void __launch_bounds__(threads, 1)
#define HOPPER_KERNEL_BLOCKS(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define HOPPER_GRID_CONSTANT __grid_constant__
#define HOPPER_UNROLL _Pragma("unroll")
#define HOPPER_HERE ::hopper::Site()

namespace hopper {

struct Site {};  // costs nothing on the device

}  // namespace hopper

#endif
