// Conversions between fp32, e4m3 and bf16. Cases: bench/proof/probe_convert.py.
#include "probe.h"

namespace {

using hopper::bf16;
using hopper::e4m3;

enum Mode : int64_t { kToE4m3, kToE4m3Pair, kToBf16, kToBf16Pair, kFromE4m3, kFromBf16 };

template <int64_t mode>
HOPPER_KERNEL(256)
convert_kernel(const void* from, void* to, uint32_t count) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  const auto* x = static_cast<const float*>(from);
  if (i >= count) return;
  if constexpr (mode == kToE4m3) static_cast<e4m3*>(to)[i] = hopper::to_e4m3(x[i]);
  if constexpr (mode == kToBf16) static_cast<bf16*>(to)[i] = hopper::to_bf16(x[i]);
  if constexpr (mode == kFromE4m3) static_cast<float*>(to)[i] = hopper::to_float(static_cast<const e4m3*>(from)[i]);
  if constexpr (mode == kFromBf16) static_cast<float*>(to)[i] = hopper::to_float(static_cast<const bf16*>(from)[i]);
  if (i % 2 == 0) {
    if constexpr (mode == kToE4m3Pair) static_cast<uint16_t*>(to)[i / 2] = hopper::to_e4m3x2(x[i], x[i + 1]);
    if constexpr (mode == kToBf16Pair) static_cast<uint32_t*>(to)[i / 2] = hopper::pack_bf16(x[i], x[i + 1]);
  }
}

template <int64_t... modes>
bool try_launch(int64_t wanted, const void* from, void* to, uint32_t count) {
  const auto config = probe::grid((count + 255) / 256, 256, 0);
  return ((wanted == modes && (hopper::launch(config, convert_kernel<modes>, from, to, count), true)) || ...);
}

void run(const probe::Parameters& given, probe::Memory& memory) {
  const auto count = static_cast<uint32_t>(given[1]);
  if (!try_launch<kToE4m3, kToE4m3Pair, kToBf16, kToBf16Pair, kFromE4m3, kFromBf16>(given[0], memory.at<uint8_t>(0),
                                                                                   memory.at<uint8_t>(1), count))
    throw std::runtime_error("convert.cu has no such conversion");
}

}  // namespace

PROBE(run)
