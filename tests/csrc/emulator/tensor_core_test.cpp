// The arithmetic of wgmma for ctypes.
#include "../../../csrc/emulator/tensor_core.h"

using namespace emulator;

extern "C" void product(int a, int b, int n, const uint8_t* rows_a, const uint8_t* rows_b, float* d,
                        int accumulate, int mode) {
  const WgmmaShape shape{static_cast<uint16_t>(n), static_cast<Operand>(a), static_cast<Operand>(b), Major::k,
                         Major::k};
  wgmma_product(shape, rows_a, rows_b, d, accumulate != 0, static_cast<TensorCoreMode>(mode));
}

extern "C" int set_level(int level) { return set_tensor_core_level(static_cast<TensorCoreLevel>(level)); }
extern "C" int level() { return static_cast<int>(tensor_core_level()); }
