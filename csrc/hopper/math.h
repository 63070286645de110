// Single IEEE operations that no compiler may fuse or reorder (NUMERICS), and approximations named as such.
// exp_approximate is e^x; its host twin is correctly rounded, the device's ex2 of x log2(e) is within 2^-21 relative.
// log_approximate is ln x; its host twin is correctly rounded, the device's lg2 of x times ln 2 is within 2^-22 absolute
// between 0.5 and 2 and within 2^-21 relative elsewhere.
// PTX ISA: "add", "mul", "div", "sqrt", "fma" with .rn; "ex2.approx", "lg2.approx", "rsqrt.approx",
// "rcp.approx".
#pragma once

#include <cmath>
#include <cstring>

#include "types.h"

namespace hopper {

#ifdef HOPPER_EMULATED
// -ffp-contract=off keeps these single roundings on the host.
inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double sqrt_rn(double a) { return std::sqrt(a); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline uint32_t float_bits(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float bits_float(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }
// The device's results differ in the last places.
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float log2_approximate(float x) { return std::log2(x); }
inline float rsqrt_approximate(float x) { return 1.0f / std::sqrt(x); }
inline float reciprocal_approximate(float x) { return 1.0f / x; }
inline float exp_approximate(float x) { return static_cast<float>(std::exp(static_cast<double>(x))); }
inline float log_approximate(float x) { return static_cast<float>(std::log(static_cast<double>(x))); }
#else
HOPPER_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
HOPPER_DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
HOPPER_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
HOPPER_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
HOPPER_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
HOPPER_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
HOPPER_DEVICE double sqrt_rn(double a) { return __dsqrt_rn(a); }
HOPPER_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
HOPPER_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
HOPPER_DEVICE float bits_float(uint32_t b) { return __uint_as_float(b); }
HOPPER_DEVICE float exp2_approximate(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
HOPPER_DEVICE float log2_approximate(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
HOPPER_DEVICE float rsqrt_approximate(float x) { float y; asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
HOPPER_DEVICE float reciprocal_approximate(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
HOPPER_DEVICE float exp_approximate(float x) { return exp2_approximate(__fmul_rn(x, 1.4426950408889634f)); }
HOPPER_DEVICE float log_approximate(float x) { return __fmul_rn(log2_approximate(x), 0.6931471805599453f); }
#endif

}  // namespace hopper
