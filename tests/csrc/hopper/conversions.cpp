// The host bodies of convert.h, for ctypes.
#include "../../../csrc/hopper/convert.h"

extern "C" {
void to_e4m3(const float* x, uint8_t* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = hopper::to_e4m3(x[i]).bits;
}
void to_bf16(const float* x, uint16_t* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = hopper::to_bf16(x[i]).bits;
}
void from_e4m3(const uint8_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = hopper::to_float(hopper::e4m3{x[i]});
}
void from_bf16(const uint16_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = hopper::to_float(hopper::bf16{x[i]});
}
}
