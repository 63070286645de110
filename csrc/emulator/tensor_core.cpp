#include "tensor_core.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

// One source, compiled for what the machine has: every operation below is exact or IEEE, so that the results are equal.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EMULATOR_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3")))
#else
#define EMULATOR_VECTOR
#endif

namespace emulator {
namespace {

struct Form {
  int bytes, mantissa, bias, fraction_bits, result_bits;
  bool has_infinity;
};

constexpr Form form_of(Operand o) {
  switch (o) {
    case Operand::e4m3: return {1, 3, 7, 13, 13, false};
    case Operand::e5m2: return {1, 2, 15, 13, 13, true};
    case Operand::bf16: return {2, 7, 127, 25, 23, true};
    default: return {2, 10, 15, 25, 23, true};
  }
}

// An element as its value and the power of two of its exponent (0 for zero: it never decides the alignment).
struct Element64 { double value, power; };

Element64 decode(const Form& f, uint32_t bits) {
  const int width = f.bytes * 8, exponent_bits = width - 1 - f.mantissa;
  const double sign = bits >> (width - 1) & 1 ? -1.0 : 1.0;
  const int exponent = static_cast<int>(bits >> f.mantissa & ((1u << exponent_bits) - 1));
  const uint32_t fraction = bits & ((1u << f.mantissa) - 1);
  const int top = (1 << exponent_bits) - 1;
  if (f.has_infinity && exponent == top)
    return {fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity(), 1.0};
  if (!f.has_infinity && exponent == top && fraction == (1u << f.mantissa) - 1) return {std::numeric_limits<double>::quiet_NaN(), 1.0};
  if (exponent == 0)
    return {sign * std::ldexp(fraction, 1 - f.bias - f.mantissa), fraction ? std::ldexp(1.0, 1 - f.bias) : 0.0};
  return {sign * std::ldexp((1u << f.mantissa) + fraction, exponent - f.bias - f.mantissa), std::ldexp(1.0, exponent - f.bias)};
}

struct Table8 {
  std::array<float, 256> value, power;
  explicit Table8(Operand o) {
    for (uint32_t i = 0; i < 256; ++i) {
      const Element64 e = decode(form_of(o), i);
      value[i] = static_cast<float>(e.value);
      power[i] = static_cast<float>(e.power);
    }
  }
};

const Table8& table(Operand o) {
  static const Table8 e4m3(Operand::e4m3), e5m2(Operand::e5m2);
  return o == Operand::e4m3 ? e4m3 : e5m2;
}

// Every code of a format in float64; decoding one by one would cost more than multiplying.
struct Table {
  std::vector<Element64> of;
  explicit Table(Operand o) : of(size_t{1} << (8 * form_of(o).bytes)) {
    for (uint32_t i = 0; i < of.size(); ++i) of[i] = decode(form_of(o), i);
  }
};

const Table& table64(Operand o) {
  static const Table e4m3(Operand::e4m3), e5m2(Operand::e5m2), bf16(Operand::bf16), f16(Operand::f16);
  return o == Operand::e4m3 ? e4m3 : o == Operand::e5m2 ? e5m2 : o == Operand::bf16 ? bf16 : f16;
}

constexpr uint32_t kMaxN = 256;

// One row of d for an 8-bit format, all values finite and no accumulator below 2^-100: fp32 holds every product exactly,
// scaling by a power of two is exact, and the conversion to an integer is the cut.
EMULATOR_VECTOR void row_of_fp8(uint32_t n, const float* a, const float* a_power, const float* b, const float* b_power, float* d) {
  alignas(64) float largest[kMaxN], scale[kMaxN];
  alignas(64) int32_t total[kMaxN];
  for (uint32_t j = 0; j < n; ++j) {
    uint32_t bits;
    std::memcpy(&bits, &d[j], 4);
    bits &= 0x7f800000;                     // the power of two of the accumulator; 0 for zero
    float power;
    std::memcpy(&power, &bits, 4);
    largest[j] = power > 0x1p-100f ? power : 0x1p-100f;
  }
  for (uint32_t k = 0; k < 32; ++k) {
    const float p = a_power[k];
    const float* q = b_power + k * kMaxN;
    for (uint32_t j = 0; j < n; ++j) {
      const float e = p * q[j];
      largest[j] = e > largest[j] ? e : largest[j];
    }
  }
  for (uint32_t j = 0; j < n; ++j) {        // 2^13 / largest, by exponent arithmetic
    uint32_t bits;
    std::memcpy(&bits, &largest[j], 4);
    bits = ((127u + 127u + 13u) << 23) - bits;
    std::memcpy(&scale[j], &bits, 4);
    total[j] = static_cast<int32_t>(d[j] * scale[j]);
  }
  for (uint32_t k = 0; k < 32; ++k) {
    const float x = a[k];
    const float* y = b + k * kMaxN;
    for (uint32_t j = 0; j < n; ++j) total[j] += static_cast<int32_t>(x * y[j] * scale[j]);
  }
  for (uint32_t j = 0; j < n; ++j) {
    const float sum = static_cast<float>(total[j]);   // exact: below 2^24
    uint32_t bits;
    std::memcpy(&bits, &sum, 4);
    bits &= ~0x3ffu;                                  // 13 bits of the mantissa remain
    float cut;
    std::memcpy(&cut, &bits, 4);
    d[j] = cut * (largest[j] * 0x1p-13f);
  }
}

// One row of any format in float64; every operation is exact, and infinities and NaN find their way alone.
EMULATOR_VECTOR void row_in_double(uint32_t n, uint32_t steps, const double* a, const double* a_power, const double* b,
                                   const double* b_power, float* d, int fraction_bits, int result_bits) {
  alignas(64) double largest[kMaxN], scale[kMaxN], total[kMaxN];
  for (uint32_t j = 0; j < n; ++j) {
    const double c = d[j];
    uint64_t bits;
    std::memcpy(&bits, &c, 8);
    bits &= 0x7ff0000000000000ull;
    double power;
    std::memcpy(&power, &bits, 8);
    power = power > 0 && power < 0x1p-126 ? 0x1p-126 : power;
    power = power > 0x1p200 ? 0x1p0 : power;          // infinity and NaN: any exponent will do
    largest[j] = power > 0x1p-600 ? power : 0x1p-600;
  }
  for (uint32_t k = 0; k < steps; ++k) {
    const double p = a_power[k];
    const double* q = b_power + k * kMaxN;
    for (uint32_t j = 0; j < n; ++j) {
      const double e = p * q[j];
      largest[j] = e > largest[j] ? e : largest[j];
    }
  }
  const double unit = std::ldexp(1.0, fraction_bits);
  for (uint32_t j = 0; j < n; ++j) {
    scale[j] = unit / largest[j];
    total[j] = std::trunc(d[j] * scale[j]);
  }
  for (uint32_t k = 0; k < steps; ++k) {
    const double x = a[k];
    const double* y = b + k * kMaxN;
    for (uint32_t j = 0; j < n; ++j) total[j] += std::trunc(x * y[j] * scale[j]);
  }
  const double finest = std::ldexp(1.0, -126 - result_bits), down = std::ldexp(1.0, -result_bits);
  for (uint32_t j = 0; j < n; ++j) {
    const double sum = total[j] / scale[j];
    uint64_t bits;
    std::memcpy(&bits, &sum, 8);
    bits &= 0x7ff0000000000000ull;
    double power;                                     // of the result: how fine its last kept bit is
    std::memcpy(&power, &bits, 8);
    const double fine = power * down > finest ? power * down : finest;
    double cut = std::trunc(sum / fine) * fine + 0.0;
    cut = std::isfinite(sum) ? cut : sum;
    d[j] = static_cast<float>(cut);
  }
  for (uint32_t j = 0; j < n; ++j)
    if (d[j] != d[j]) {
      const uint32_t canonical = 0x7fffffff;
      std::memcpy(&d[j], &canonical, 4);
    }
}

EMULATOR_VECTOR void row_in_fp32(uint32_t n, uint32_t steps, const double* a, const double* b, float* d) {
  for (uint32_t k = 0; k < steps; ++k) {
    const auto x = static_cast<float>(a[k]);
    const double* y = b + k * kMaxN;
    for (uint32_t j = 0; j < n; ++j) d[j] += x * static_cast<float>(y[j]);
  }
}

}  // namespace

double operand_value(Operand o, uint32_t bits) { return decode(form_of(o), bits).value; }

void tensor_core_multiply(Operand o, uint32_t n, const uint8_t* a, const uint8_t* b, float* d, bool accumulate, bool fast) {
  const Form f = form_of(o);
  if (!accumulate) std::fill(d, d + 64 * n, 0.0f);
  if (f.bytes == 1 && !fast) {
    const Table8& t = table(o);
    alignas(64) static thread_local float y[32 * kMaxN], y_power[32 * kMaxN];
    bool special = false;
    for (uint32_t j = 0; j < n; ++j)
      for (uint32_t k = 0; k < 32; ++k) {
        const uint8_t code = b[j * 32 + k];
        y[k * kMaxN + j] = t.value[code];
        y_power[k * kMaxN + j] = t.power[code];
        special |= !std::isfinite(t.value[code]);
      }
    for (uint32_t i = 0; i < 64 * 32; ++i) special |= !std::isfinite(t.value[a[i]]);
    if (accumulate)
      for (uint32_t i = 0; i < 64 * n; ++i) special |= !(std::fabs(d[i]) < 0x1p120f) || (d[i] != 0 && std::fabs(d[i]) < 0x1p-99f);
    if (!special) {
      for (uint32_t i = 0; i < 64; ++i) {
        alignas(64) float x[32], x_power[32];
        for (uint32_t k = 0; k < 32; ++k) {
          x[k] = t.value[a[i * 32 + k]];
          x_power[k] = t.power[a[i * 32 + k]];
        }
        row_of_fp8(n, x, x_power, y, y_power, d + i * n);
      }
      return;
    }
  }
  const uint32_t steps = 32 / f.bytes;
  alignas(64) static thread_local double y[32 * kMaxN], y_power[32 * kMaxN];
  const Table& t64 = table64(o);
  auto element = [&](const uint8_t* row, uint32_t k) -> const Element64& {
    uint32_t bits = row[k * f.bytes];
    if (f.bytes == 2) bits |= static_cast<uint32_t>(row[k * 2 + 1]) << 8;
    return t64.of[bits];
  };
  for (uint32_t j = 0; j < n; ++j)
    for (uint32_t k = 0; k < steps; ++k) {
      const Element64& e = element(b + j * 32, k);
      y[k * kMaxN + j] = e.value;
      y_power[k * kMaxN + j] = e.power;
    }
  for (uint32_t i = 0; i < 64; ++i) {
    double x[32], x_power[32];
    for (uint32_t k = 0; k < steps; ++k) {
      const Element64& e = element(a + i * 32, k);
      x[k] = e.value;
      x_power[k] = e.power;
    }
    if (fast)
      row_in_fp32(n, steps, x, y, d + i * n);
    else
      row_in_double(n, steps, x, x_power, y, y_power, d + i * n, f.fraction_bits, f.result_bits);
  }
}

}  // namespace emulator
