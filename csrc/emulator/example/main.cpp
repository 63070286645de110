// Runs the kernel on the CPU under many schedules, with every access checked.
#include <cstdio>
#include <exception>
#include <vector>

#include "../options.h"
#include "reverse.h"

int main() {
  constexpr uint32_t kBlocks = 4, kCount = kBlocks * 256;
  alignas(128) static float in[kCount], out[kCount];
  for (uint32_t i = 0; i < kCount; ++i) in[i] = static_cast<float>(i);
  emulator::register_buffer(in, sizeof in, "in", /*writable=*/false);
  emulator::register_buffer(out, sizeof out, "out", /*writable=*/true);
  try {
    for (uint64_t seed = 0; seed < 30; ++seed) {
      emulator::Options& o = emulator::options();
      o.check = true;
      o.seed = seed;
      o.asynchrony = static_cast<emulator::Asynchrony>(seed % 3);
      o.schedule = static_cast<emulator::Schedule>(seed % 4);
      reverse(in, out, kBlocks);
      for (uint32_t i = 0; i < kCount; ++i)
        if (out[i] != in[i / 256 * 256 + 255 - i % 256]) return std::printf("element %u is wrong\n", i), 1;
    }
  } catch (const std::exception& e) {
    std::printf("%s", e.what());
    return 1;
  }
  std::printf("30 schedules, no hazards\n");
  return 0;
}
