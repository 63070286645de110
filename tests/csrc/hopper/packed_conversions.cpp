// The host bodies of convert.h that take or give several values, for ctypes. `x` has `count` floats, a multiple of 4.
#include "../../../csrc/hopper/convert.h"

using namespace hopper;

extern "C" {
void to_e4m3x2_all(const float* x, uint16_t* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 2) y[i / 2] = to_e4m3x2(x[i], x[i + 1]);
}
void to_e4m3x4_all(const float* x, uint32_t* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) y[i / 4] = to_e4m3x4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}
void pack_bf16_all(const float* x, uint32_t* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 2) y[i / 2] = pack_bf16(x[i], x[i + 1]);
}
void e4m3x2_all(const uint16_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 2) {
    const float2 pair = e4m3x2_to_float2(x[i / 2]);
    y[i] = pair.x, y[i + 1] = pair.y;
  }
}
void e4m3x4_all(const uint32_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    const float4 four = e4m3x4_to_float4(x[i / 4]);
    y[i] = four.x, y[i + 1] = four.y, y[i + 2] = four.z, y[i + 3] = four.w;
  }
}
void bf16x2_all(const uint32_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 2) {
    const float2 pair = bf16x2_to_float2(x[i / 2]);
    y[i] = pair.x, y[i + 1] = pair.y;
  }
}
}
