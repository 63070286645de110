// This file includes itself once per instruction set, with EMULATOR_LEVEL defined: GCC lowers vector types
// before it inlines, so code that is shared by inlining would be SSE2 code in every level. The first part
// below is compiled once, the second (#else) once per level.
#ifndef EMULATOR_LEVEL

#include "tensor_core.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__GNUC__) && !defined(__clang__)
// Vectors wider than the target's registers are never passed to a function.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace emulator {
namespace {

struct Format {
  int bytes, mantissa_bits, exponent_bits;
  bool ieee;  // the largest exponent field holds infinity and NaN; without, its largest code is NaN
  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  constexpr int least() const { return 1 - bias(); }  // exponent of subnormals
};

constexpr Format format_of(Operand o) {
  switch (o) {
    case Operand::e4m3: return {1, 3, 4, false};
    case Operand::e5m2: return {1, 2, 5, true};
    case Operand::bf16: return {2, 7, 8, true};
    default: return {2, 10, 5, true};
  }
}

// A code taken apart: (-1)^negative * significand * 2^(exponent - mantissa_bits), or infinity, or NaN.
struct Number {
  bool negative, infinite, nan;
  int32_t significand, exponent;
  bool finite() const { return !infinite && !nan; }
};

inline Number take_apart(const Format& f, uint32_t bits) {
  const auto field = static_cast<int32_t>(bits >> f.mantissa_bits & ((1u << f.exponent_bits) - 1));
  const auto tail = static_cast<int32_t>(bits & ((1u << f.mantissa_bits) - 1));
  const bool top = field == (1 << f.exponent_bits) - 1;
  Number x;
  x.negative = bits >> (f.mantissa_bits + f.exponent_bits) & 1;
  x.infinite = f.ieee && top && tail == 0;
  x.nan = top && (f.ieee ? tail != 0 : tail == (1 << f.mantissa_bits) - 1);
  x.significand = tail | (field ? 1 << f.mantissa_bits : 0);
  x.exponent = std::max(field, 1) - f.bias();
  return x;
}

inline uint32_t code_at(const Format& f, const uint8_t* row, int k) {
  return f.bytes == 1 ? row[k] : row[2 * k] | static_cast<uint32_t>(row[2 * k + 1]) << 8;
}

constexpr uint32_t kCanonicalNan = 0x7fffffff, kInfinity = 0x7f800000;

// ---- one output in integers -------------------------------------------------------------------------------

// fp32 bits of total * 2^power, cut toward zero to `mantissa_bits`.
uint32_t cut_to_fp32(int64_t total, int power, int mantissa_bits) {
  if (total == 0) return 0;
  const uint32_t sign = total < 0 ? 1u << 31 : 0;
  uint64_t size = total < 0 ? -static_cast<uint64_t>(total) : static_cast<uint64_t>(total);
  int exponent = 63 - __builtin_clzll(size) + power;
  if (exponent > 127) return sign | kInfinity;
  exponent = std::max(exponent, -126);
  const int shift = power - (exponent - mantissa_bits);  // to units of the last kept bit
  size = shift >= 0 ? size << shift : shift > -64 ? size >> -shift : 0;
  const auto mantissa = static_cast<uint32_t>(size << (23 - mantissa_bits));
  if (mantissa >> 23) return sign | static_cast<uint32_t>(exponent + 127) << 23 | (mantissa & 0x7fffff);
  return mantissa ? sign | mantissa : 0;
}

uint32_t exact_element(Operand of_a, Operand of_b, const uint8_t* a, const uint8_t* b, uint32_t c_bits) {
  const Format fa = format_of(of_a), fb = format_of(of_b);
  const int steps = 32 / fa.bytes, fraction_bits = fa.bytes == 1 ? 13 : 25,
            mantissa_bits = fa.bytes == 1 ? 13 : 23;
  const Number c = take_apart({4, 23, 8, true}, c_bits);
  bool nan = c.nan, plus = c.infinite && !c.negative, minus = c.infinite && c.negative;
  Number x[33];
  int carried[33];  // fractional bits of the significand
  int largest = std::numeric_limits<int>::min();
  for (int k = 0; k <= steps; ++k) {
    if (k == steps) {
      x[k] = c;
      carried[k] = 23;
    } else {
      const Number p = take_apart(fa, code_at(fa, a, k)), q = take_apart(fb, code_at(fb, b, k));
      const bool negative = p.negative != q.negative, infinite = p.infinite || q.infinite;
      nan |= p.nan || q.nan ||
             (infinite && ((p.finite() && p.significand == 0) || (q.finite() && q.significand == 0)));
      plus |= infinite && !negative;
      minus |= infinite && negative;
      x[k] = {negative, infinite, false, p.significand * q.significand, p.exponent + q.exponent};
      carried[k] = fa.mantissa_bits + fb.mantissa_bits;
    }
    if (x[k].significand) largest = std::max(largest, x[k].exponent);
  }
  if (nan || (plus && minus)) return kCanonicalNan;
  if (plus || minus) return kInfinity | (minus ? 1u << 31 : 0);
  int64_t total = 0;
  for (int k = 0; k <= steps; ++k) {
    if (x[k].significand == 0) continue;
    const int shift = fraction_bits - carried[k] - (largest - x[k].exponent);
    const int64_t size = x[k].significand;
    const int64_t term = shift >= 0 ? size << shift : shift > -63 ? size >> -shift : 0;
    total += x[k].negative ? -term : term;
  }
  return total == 0 ? 0 : cut_to_fp32(total, largest - fraction_bits, mantissa_bits);
}

// ---- operands for the vector code -------------------------------------------------------------------------

// Columns of b, and of a row of d, and room; rows a multiple of 1 KiB apart would collide in the cache.
constexpr uint32_t kPitch = 256 + 64;

// Exponent codes order products without a branch for zeros: exponent - least + gap, 0 for zero, so that a sum
// of two below 2 * gap has a zero in it and lies below every other.
template <typename Code>
constexpr int kGap = sizeof(Code) == 1 ? 64 : 256;

template <typename Code>
struct Element {
  float value;    // 0 when not finite, unless asked for
  Code exponent;  // code
  bool finite;
};

template <typename Code>
inline Element<Code> element_of(const Format& f, uint32_t bits) {
  const Number x = take_apart(f, bits);
  if (!x.finite())
    return {x.nan ? std::numeric_limits<float>::quiet_NaN() : x.negative ? -INFINITY : INFINITY, 0, false};
  const float size = std::ldexp(static_cast<float>(x.significand), x.exponent - f.mantissa_bits);
  return {x.negative ? -size : size,
          static_cast<Code>(x.significand ? x.exponent - f.least() + kGap<Code> : 0), true};
}

struct Table8 {
  float value[256];
  uint8_t exponent[256];
  bool finite[256];
  explicit Table8(Operand o) {
    for (uint32_t i = 0; i < 256; ++i) {
      const auto e = element_of<uint8_t>(format_of(o), i);
      value[i] = e.value;
      exponent[i] = e.exponent;
      finite[i] = e.finite;
    }
  }
};

const Table8& table_of(Operand o) {
  static const Table8 e4m3(Operand::e4m3), e5m2(Operand::e5m2);
  return o == Operand::e4m3 ? e4m3 : e5m2;
}

// Calls put(k, value, exponent code, finite) for the elements of a row of 32 bytes.
template <typename Code, typename Put>
inline void for_each_element(Operand o, const uint8_t* row, Put put) {
  if constexpr (sizeof(Code) == 1) {
    const Table8& t = table_of(o);
    for (int k = 0; k < 32; ++k) put(k, t.value[row[k]], t.exponent[row[k]], t.finite[row[k]]);
  } else if (o == Operand::bf16) {
    for (int k = 0; k < 16; ++k) {  // bf16 is the upper half of an fp32
      uint32_t bits = row[2 * k] | static_cast<uint32_t>(row[2 * k + 1]) << 8;
      const int field = bits >> 7 & 255;
      const bool zero = (bits & 0x7fff) == 0;
      bits <<= 16;
      float value;
      std::memcpy(&value, &bits, 4);
      put(k, value, static_cast<Code>(zero ? 0 : std::max(field, 1) - 1 + kGap<Code>), field != 255);
    }
  } else {
    for (int k = 0; k < 16; ++k) {
      const uint32_t bits = row[2 * k] | static_cast<uint32_t>(row[2 * k + 1]) << 8;
      const uint32_t field = bits >> 10 & 31, tail = bits & 1023;
      const bool finite = field != 31;
      float value = static_cast<float>(tail) * 0x1p-24f;  // a subnormal
      if (field) {
        const uint32_t normal = (finite ? field + 112 : 255) << 23 | tail << 13;
        std::memcpy(&value, &normal, 4);
      }
      const bool zero = (bits & 0x7fff) == 0;
      put(k, bits >> 15 ? -value : value, static_cast<Code>(zero ? 0 : std::max(field, 1u) - 1 + kGap<Code>),
          finite);
    }
  }
}

// Both operands of a product, decoded; b with k outside, so that columns are vectors. -1 in `special` marks a
// row or column with a NaN or an infinity.
template <typename Code>
struct Decoded {
  static constexpr int kSteps = sizeof(Code) == 1 ? 32 : 16;
  alignas(64) float b[kSteps][kPitch];
  alignas(64) Code b_exponent[kSteps][kPitch];
  alignas(64) int32_t b_special[kPitch];
  alignas(64) float a[64][kSteps];
  alignas(64) Code a_exponent[64][kSteps];
  int32_t a_special[64];
  int bias;  // from a sum of exponent codes to the biased exponent of fp32

  void decode(const WgmmaShape& s, const uint8_t* rows_of_a, const uint8_t* rows_of_b, bool keep_special) {
    bias = format_of(s.a).least() + format_of(s.b).least() - 2 * kGap<Code> + 127;
    for (uint32_t i = 0; i < 64; ++i) {
      a_special[i] = 0;
      for_each_element<Code>(s.a, rows_of_a + 32 * i, [&](int k, float value, Code exponent, bool finite) {
        a[i][k] = finite || keep_special ? value : 0.0f;
        a_exponent[i][k] = finite ? exponent : 0;
        if (!finite) a_special[i] = -1;
      });
    }
    for (uint32_t j = 0; j < s.n; ++j) {
      b_special[j] = 0;
      for_each_element<Code>(s.b, rows_of_b + 32 * j, [&](int k, float value, Code exponent, bool finite) {
        b[k][j] = finite || keep_special ? value : 0.0f;
        b_exponent[k][j] = finite ? exponent : 0;
        if (!finite) b_special[j] = -1;
      });
    }
    for (uint32_t j = s.n; j % 64; ++j) {  // the rest of the last vector
      b_special[j] = 0;
      for (int k = 0; k < kSteps; ++k) {
        b[k][j] = 0.0f;
        b_exponent[k][j] = 0;
      }
    }
  }
};

// Rows of d that one call computes together: they share the loads of b.
constexpr uint32_t kRows = 2;

struct Rows {
  alignas(64) float d[kRows][kPitch];            // in: the accumulator; out: the result
  alignas(64) int32_t irregular[kRows][kPitch];  // out: not 0 where d is wrong and exact_element must say
};

// Biased exponents of fp32 between which the vector code is exact, see below.
constexpr int kLeastExponent = 127 - 100, kLargestExponent = 127 + 125;

template <typename Code>
using ExactRows = bool (*)(const Decoded<Code>&, uint32_t i, uint32_t n, Rows&);
template <typename Code>
using Fp32Rows = void (*)(const Decoded<Code>&, uint32_t i, uint32_t n, Rows&);

}  // namespace
}  // namespace emulator

// ---- the levels -------------------------------------------------------------------------------------------

// EMULATOR_WIDTH: fp32 lanes of a register.
#define EMULATOR_LEVEL portable
#define EMULATOR_TARGET
#define EMULATOR_WIDTH 4
#include "tensor_core.cpp"  // NOLINT
#undef EMULATOR_LEVEL
#undef EMULATOR_TARGET
#undef EMULATOR_WIDTH

#if defined(__x86_64__)
#define EMULATOR_LEVEL avx2
#define EMULATOR_TARGET __attribute__((target("avx2")))
#define EMULATOR_WIDTH 8
#include "tensor_core.cpp"  // NOLINT
#undef EMULATOR_LEVEL
#undef EMULATOR_TARGET
#undef EMULATOR_WIDTH

#define EMULATOR_LEVEL avx512
#define EMULATOR_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define EMULATOR_WIDTH 16
#include "tensor_core.cpp"  // NOLINT
#undef EMULATOR_LEVEL
#undef EMULATOR_TARGET
#undef EMULATOR_WIDTH
#endif

namespace emulator {
namespace {

bool available(TensorCoreLevel level) {
#if defined(__x86_64__)
  if (level == TensorCoreLevel::avx2) return __builtin_cpu_supports("avx2");
  if (level == TensorCoreLevel::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return level == TensorCoreLevel::scalar || level == TensorCoreLevel::portable;
}

std::atomic<TensorCoreLevel>& level_in_use() {
  static std::atomic<TensorCoreLevel> level{available(TensorCoreLevel::avx512) ? TensorCoreLevel::avx512
                                            : available(TensorCoreLevel::avx2) ? TensorCoreLevel::avx2
                                                                               : TensorCoreLevel::portable};
  return level;
}

template <typename Code>
struct Functions {
  ExactRows<Code> exact;
  Fp32Rows<Code> fp32;
};

template <typename Code>
Functions<Code> functions(TensorCoreLevel level) {
#if defined(__x86_64__)
  if (level == TensorCoreLevel::avx512) return {avx512::exact_rows<Code>, avx512::fp32_rows<Code>};
  if (level == TensorCoreLevel::avx2) return {avx2::exact_rows<Code>, avx2::fp32_rows<Code>};
#endif
  (void)level;
  return {portable::exact_rows<Code>, portable::fp32_rows<Code>};
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <typename Code>
void product(const WgmmaShape& s, const uint8_t* a, const uint8_t* b, float* d, bool accumulate,
             TensorCoreMode mode, TensorCoreLevel level) {
  static thread_local Decoded<Code> operands;  // 60 KiB: too much for the stack of a fiber
  static thread_local Rows rows;
  const uint32_t n = s.n, padded = (n + 63) / 64 * 64;
  operands.decode(s, a, b, mode == TensorCoreMode::fp32);
  const auto compute = functions<Code>(level);
  for (uint32_t i = 0; i < 64; i += kRows) {
    for (uint32_t r = 0; r < kRows; ++r) {
      if (accumulate) std::memcpy(rows.d[r], d + (i + r) * n, n * sizeof(float));
      std::fill(rows.d[r] + (accumulate ? n : 0), rows.d[r] + padded, 0.0f);
    }
    bool irregular = false;
    if (mode == TensorCoreMode::fp32)
      compute.fp32(operands, i, n, rows);
    else
      irregular = compute.exact(operands, i, n, rows);
    for (uint32_t r = 0; r < kRows; ++r) {
      float* to = d + (i + r) * n;
      for (uint32_t j = 0; irregular && j < n; ++j)
        if (rows.irregular[r][j]) {
          const uint32_t bits =
              exact_element(s.a, s.b, a + 32 * (i + r), b + 32 * j, accumulate ? bits_of(to[j]) : 0);
          std::memcpy(&rows.d[r][j], &bits, 4);
        }
      std::memcpy(to, rows.d[r], n * sizeof(float));
    }
  }
}

}  // namespace

TensorCoreLevel tensor_core_level() { return level_in_use(); }

bool set_tensor_core_level(TensorCoreLevel level) {
  if (!available(level)) return false;
  level_in_use() = level;
  return true;
}

void wgmma_product(const WgmmaShape& s, const uint8_t* a, const uint8_t* b, float* d, bool accumulate,
                   TensorCoreMode mode) {
  const TensorCoreLevel level = level_in_use();
  if (level == TensorCoreLevel::scalar && mode == TensorCoreMode::exact) {
    for (uint32_t i = 0; i < 64; ++i)
      for (uint32_t j = 0; j < s.n; ++j) {
        float& at = d[i * s.n + j];
        const uint32_t bits = exact_element(s.a, s.b, a + 32 * i, b + 32 * j, accumulate ? bits_of(at) : 0);
        std::memcpy(&at, &bits, 4);
      }
    return;
  }
  if (format_of(s.a).bytes == 1)
    product<uint8_t>(s, a, b, d, accumulate, mode, level);
  else
    product<int16_t>(s, a, b, d, accumulate, mode, level);
}

}  // namespace emulator

#else  // one level

namespace emulator {
namespace {
namespace EMULATOR_LEVEL {

constexpr uint32_t kWidth = EMULATOR_WIDTH;
constexpr uint32_t kVectors = 2;  // of a block of columns: sums and scales of kRows rows stay in registers

// They read and write arrays of their elements and of each other's.
typedef float Floats __attribute__((vector_size(4 * kWidth), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth), may_alias));
typedef uint32_t Wrapping __attribute__((vector_size(4 * kWidth), may_alias));
// Half as many lanes: what a register holds as fp64.
typedef float HalfFloats __attribute__((vector_size(2 * kWidth), may_alias));
typedef int32_t HalfInts __attribute__((vector_size(2 * kWidth), may_alias));
typedef double Doubles __attribute__((vector_size(4 * kWidth), may_alias));
typedef int64_t Longs __attribute__((vector_size(4 * kWidth), may_alias));
// Exponent codes: a register full of them, and one per fp32 lane.
template <typename Code>
struct Codes {
  typedef Code Full __attribute__((vector_size(4 * kWidth), may_alias));
  typedef Code PerLane __attribute__((vector_size(sizeof(Code) * kWidth), may_alias));
};

// Rows i .. i + kRows of d, n columns. Returns whether any output is irregular.
//
// Why fp32 operations give the exact model. Let top be the largest exponent of an output
// and cut = 2^(fraction - top).
// - A product x * y has at most 22 significant bits: exact in fp32, unless it leaves the range. Scaling by
//   `cut` is exact, and the conversion to int32 cuts toward zero: that is the term.
// - What underflows on the way is rounded, but stays below 2^-126 * cut < 1 for top >= -100: the term is 0,
//   as it should be.
// - Terms of 8-bit formats lie below 2^15, their sum below 2^21. Terms of 16-bit formats lie below 2^27, and
//   17 of them may pass 2^31: each half of k has a sum of its own.
// - Irregular, left to exact_element, are outputs with NaN or infinities, with a product that may reach
//   2^127, or with top < -100 because of a product.
// - Without any product that is not zero the result is the accumulator, cut; that alone can be subnormal.
template <typename Code>
EMULATOR_TARGET bool exact_rows(const Decoded<Code>& of, uint32_t i, uint32_t n, Rows& rows) {
  using Full = typename Codes<Code>::Full;
  using PerLane = typename Codes<Code>::PerLane;
  constexpr int kSteps = Decoded<Code>::kSteps;
  constexpr bool kNarrow = sizeof(Code) == 1;
  constexpr int kFraction = kNarrow ? 13 : 25, kHalves = kNarrow ? 1 : 2;
  constexpr uint32_t kCodes = 4 * kWidth / sizeof(Code), kBlock = kWidth * kVectors;

  alignas(64) Code top_code[kRows][kPitch];
  for (uint32_t j = 0; j < n; j += kCodes) {
    Full top[kRows] = {};
    for (int k = 0; k < kSteps; ++k) {
      const Full y = *reinterpret_cast<const Full*>(&of.b_exponent[k][j]);
      for (uint32_t r = 0; r < kRows; ++r) {
        const Full sum = y + of.a_exponent[i + r][k];
        top[r] = sum > top[r] ? sum : top[r];
      }
    }
    for (uint32_t r = 0; r < kRows; ++r) *reinterpret_cast<Full*>(&top_code[r][j]) = top[r];
  }

  Ints any = {};
  for (uint32_t j = 0; j < n; j += kBlock) {
    Ints top[kRows][kVectors], none[kRows][kVectors];
    Wrapping sum[kHalves][kRows][kVectors];  // of int32; sums of irregular outputs may run over
    Floats scale[kRows][kVectors];
    for (uint32_t r = 0; r < kRows; ++r)
      for (uint32_t v = 0; v < kVectors; ++v) {
        const uint32_t at = j + v * kWidth;
        const Floats c = *reinterpret_cast<const Floats*>(&rows.d[r][at]);
        const Ints c_exponent = reinterpret_cast<Ints>(c) >> 23 & 255;
        const Ints code = __builtin_convertvector(*reinterpret_cast<const PerLane*>(&top_code[r][at]), Ints);
        const Ints exponent = code + of.bias;
        none[r][v] = code < 2 * kGap<Code>;
        // The field of subnormals and zero is one too low, and far below every product where that matters.
        top[r][v] = exponent > c_exponent ? exponent : c_exponent;
        Ints bad = ~none[r][v] & ((exponent > kLargestExponent) | (top[r][v] < kLeastExponent));
        bad |= (c_exponent == 255) | *reinterpret_cast<const Ints*>(&of.b_special[at]) | of.a_special[i + r];
        any |= bad;
        *reinterpret_cast<Ints*>(&rows.irregular[r][at]) = bad;
        const Ints cut = (127 + 127 + kFraction - top[r][v]) << 23;
        scale[r][v] = reinterpret_cast<Floats>(cut);
        sum[0][r][v] = reinterpret_cast<Wrapping>(__builtin_convertvector(c * scale[r][v], Ints));
        if (kHalves == 2) sum[kHalves - 1][r][v] = Wrapping{};
      }
    for (int h = 0; h < kHalves; ++h)
      for (int k = h * kSteps / kHalves; k < (h + 1) * kSteps / kHalves; ++k)
        for (uint32_t v = 0; v < kVectors; ++v) {
          const Floats y = *reinterpret_cast<const Floats*>(&of.b[k][j + v * kWidth]);
          for (uint32_t r = 0; r < kRows; ++r) {
            const Ints term = __builtin_convertvector(y * of.a[i + r][k] * scale[r][v], Ints);
            sum[h][r][v] += reinterpret_cast<Wrapping>(term);
          }
        }
    for (uint32_t r = 0; r < kRows; ++r)
      for (uint32_t v = 0; v < kVectors; ++v) {
        float* const at = &rows.d[r][j + v * kWidth];
        Floats total;  // with its excess bits cut
        if constexpr (kNarrow) {
          total = __builtin_convertvector(reinterpret_cast<Ints>(sum[0][r][v]), Floats);
          total = reinterpret_cast<Floats>(reinterpret_cast<Ints>(total) & ~0x3ff);
        } else {
          for (int part = 0; part < 2; ++part) {
            const auto* low = reinterpret_cast<const HalfInts*>(&sum[0][r][v]) + part;
            const auto* high = reinterpret_cast<const HalfInts*>(&sum[kHalves - 1][r][v]) + part;
            Doubles both = __builtin_convertvector(*low, Doubles) + __builtin_convertvector(*high, Doubles);
            both = reinterpret_cast<Doubles>(reinterpret_cast<Longs>(both) & ~((int64_t{1} << 29) - 1));
            reinterpret_cast<HalfFloats*>(&total)[part] = __builtin_convertvector(both, HalfFloats);
          }
        }
        // Times 2^(top - fraction): exact, or infinity. `total` is no subnormal, nor is the product of at
        // least 2^-125.
        const Ints back = (top[r][v] - kFraction) << 23;
        total *= reinterpret_cast<Floats>(back);
        Ints c = *reinterpret_cast<const Ints*>(at);
        if (kNarrow) c &= ~0x3ff;
        c = (c & 0x7fffffff) == 0 ? Ints{} : c;  // a sum of zero is +0
        *reinterpret_cast<Ints*>(at) = none[r][v] ? c : reinterpret_cast<Ints>(total);
      }
  }
  for (uint32_t lane = 0; lane < kWidth; ++lane)
    if (any[lane]) return true;
  return false;
}

// Products of two elements are exact in fp32 within its range, where an fma would change nothing; beyond it
// the levels agree because the project compiles with -ffp-contract=off.
template <typename Code>
EMULATOR_TARGET void fp32_rows(const Decoded<Code>& of, uint32_t i, uint32_t n, Rows& rows) {
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif
  constexpr uint32_t kBlock = kWidth * kVectors;
  for (uint32_t j = 0; j < n; j += kBlock) {
    Floats sum[kRows][kVectors];
    for (uint32_t r = 0; r < kRows; ++r)
      for (uint32_t v = 0; v < kVectors; ++v)
        sum[r][v] = *reinterpret_cast<const Floats*>(&rows.d[r][j + v * kWidth]);
    for (int k = 0; k < Decoded<Code>::kSteps; ++k)
      for (uint32_t v = 0; v < kVectors; ++v) {
        const Floats y = *reinterpret_cast<const Floats*>(&of.b[k][j + v * kWidth]);
        for (uint32_t r = 0; r < kRows; ++r) sum[r][v] += y * of.a[i + r][k];
      }
    for (uint32_t r = 0; r < kRows; ++r)
      for (uint32_t v = 0; v < kVectors; ++v)
        *reinterpret_cast<Floats*>(&rows.d[r][j + v * kWidth]) = sum[r][v];
  }
}

}  // namespace EMULATOR_LEVEL
}  // namespace
}  // namespace emulator

#endif
