#include "reduction.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../hopper/convert.h"

namespace emulator {
namespace {

// ---- what exists ------------------------------------------------------------------------------------------

uint32_t bit(Element e) { return 1u << static_cast<uint32_t>(e); }
template <class... Elements>
uint32_t set(Elements... e) { return (bit(e) | ...); }

bool bitwise(Reduce op) { return op == Reduce::and_ || op == Reduce::or_ || op == Reduce::xor_; }
bool wraps(Reduce op) { return op == Reduce::inc || op == Reduce::dec; }

const char* name_of(Reduce op) {
  static constexpr const char* kNames[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor"};
  return kNames[static_cast<int>(op)];
}
const char* name_of(Element e) {
  static constexpr const char* kNames[] = {"u8",  "u16", "u32",  "s32", "u64",
                                           "s64", "f16", "bf16", "f32", "f64"};
  return kNames[static_cast<int>(e)];
}

std::string check(const char* instruction, Reduce op, Element e, uint32_t add, uint32_t min_max) {
  const uint32_t allowed = op == Reduce::add ? add
                           : wraps(op)       ? bit(Element::u32)
                           : bitwise(op)     ? set(Element::u32, Element::s32, Element::u64, Element::s64)
                                             : min_max;
  if (allowed & bit(e)) return "";
  std::string list;
  for (int i = 0; i <= static_cast<int>(Element::f64); ++i)
    if (const auto other = static_cast<Element>(i); allowed & bit(other))
      list += (list.empty() ? "" : ", ") + std::string(name_of(other));
  return std::string(instruction) + " has no " + name_of(op) + " of " + name_of(e) + ", only of " + list;
}

// ---- arithmetic -------------------------------------------------------------------------------------------

template <class T>
T integer(Reduce op, T a, T b) {
  using U = std::make_unsigned_t<T>;  // sums wrap
  switch (op) {
    case Reduce::add: return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
    case Reduce::min: return std::min(a, b);
    case Reduce::max: return std::max(a, b);
    case Reduce::inc: return a >= b ? 0 : a + 1;           // PTX ISA "atom", semantics
    case Reduce::dec: return a == 0 || a > b ? b : a - 1;
    case Reduce::and_: return a & b;
    case Reduce::or_: return a | b;
    default: return a ^ b;
  }
}

float flushed(float x, Subnormals s) {
  return s == Subnormals::flush && std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

// CUDA programming guide, "Floating-Point Standard": fp32 operations return the quiet NaN 0x7fffffff.
float sum(float a, float b, Subnormals s) {
  const float result = flushed(flushed(a, s) + flushed(b, s), s);
  return std::isnan(result) ? hopper::bits_float(0x7fffffff) : result;
}

// The payload of a NaN survives, the first operand's if both are; spelt out, for compilers may swap operands.
double sum(double a, double b) {
  const bool of_a = std::isnan(a);
  if (!of_a && !std::isnan(b)) {
    const double result = a + b;
    return std::isnan(result) ? -std::numeric_limits<double>::quiet_NaN() : result;
  }
  uint64_t bits;
  std::memcpy(&bits, of_a ? &a : &b, sizeof bits);
  bits |= uint64_t{1} << 51;
  double nan;
  std::memcpy(&nan, &bits, sizeof nan);
  return nan;
}

// On values of a 16-bit format. A sum in fp32 that is then rounded to p = 8 or 11 bits equals one rounding,
// for fp32 has 2p + 2 bits or more. PTX ISA "min", "max": a number beats NaN, and -0 is less than +0.
float narrow(Reduce op, float a, float b) {
  if (op == Reduce::add) return a + b;
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  const bool a_less = a < b || (a == b && std::signbit(a));
  return a_less == (op == Reduce::min) ? a : b;
}

// ---- f16 --------------------------------------------------------------------------------------------------

float f16_value(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return hopper::bits_float(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return hopper::bits_float(sign | (exponent + 112) << 23 | fraction << 13);
  return std::copysign(static_cast<float>(fraction) * 0x1p-24f, hopper::bits_float(sign | 0x3f800000));
}

uint16_t f16_bits(float x) {
  const uint32_t bits = hopper::float_bits(x), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;                       // what cvt.rn.f16.f32 makes of any NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;               // 65520 and beyond
  if (magnitude < 0x38800000)                                      // below 2^-14: multiples of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyintf(hopper::bits_float(magnitude) * 0x1p24f));
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);   // a carry moves on into the exponent
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

template <class T, class F>
void each(void* dst, const void* src, size_t bytes, F f) {
  for (size_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, static_cast<char*>(dst) + i, sizeof(T));
    std::memcpy(&b, static_cast<const char*>(src) + i, sizeof(T));
    a = f(a, b);
    std::memcpy(static_cast<char*>(dst) + i, &a, sizeof(T));
  }
}

}  // namespace

std::string atomic_legal(Reduce op, Element e) {
  using enum hopper::Element;
  // min and max of the 16-bit types exist in the vector forms only, which the vocabulary lacks.
  return check("red/atom", op, e, set(u32, s32, u64, f32, f64, f16, Element::bf16), set(u32, s32, u64, s64));
}
std::string bulk_reduce_legal(Reduce op, Element e) {
  using enum hopper::Element;
  return check("cp.reduce.async.bulk", op, e, set(u32, s32, u64, f32, f64, f16, Element::bf16),
               set(u32, s32, u64, s64, f16, Element::bf16));
}
std::string tensor_reduce_legal(Reduce op, Element e) {
  using enum hopper::Element;
  return check("cp.reduce.async.bulk.tensor", op, e, set(u32, s32, u64, f32, f16, Element::bf16),
               set(u32, s32, u64, s64, f16, Element::bf16));
}

void reduce_elements(Reduce op, Element e, void* dst, const void* src, size_t bytes, Subnormals s) {
  const auto integers = [op](auto a, auto b) { return integer(op, a, b); };
  switch (e) {
    case Element::u32: each<uint32_t>(dst, src, bytes, integers); break;
    case Element::s32: each<int32_t>(dst, src, bytes, integers); break;
    case Element::u64: each<uint64_t>(dst, src, bytes, integers); break;
    case Element::s64: each<int64_t>(dst, src, bytes, integers); break;
    case Element::f32: each<float>(dst, src, bytes, [s](float a, float b) { return sum(a, b, s); }); break;
    case Element::f64: each<double>(dst, src, bytes, [](double a, double b) { return sum(a, b); }); break;
    case Element::bf16:
      each<uint16_t>(dst, src, bytes, [op](uint16_t a, uint16_t b) {
        const float x = hopper::to_float(hopper::bf16{a}), y = hopper::to_float(hopper::bf16{b});
        return hopper::to_bf16(narrow(op, x, y)).bits;
      });
      break;
    case Element::f16:
      each<uint16_t>(dst, src, bytes, [op](uint16_t a, uint16_t b) {
        return f16_bits(narrow(op, f16_value(a), f16_value(b)));
      });
      break;
    default: break;  // u8 and u16 are in no table
  }
}

void atomic_element(Reduce op, Element e, void* p, const void* value, void* old, Subnormals s) {
  const size_t bytes = element_bytes(e);
  if (old != nullptr) std::memcpy(old, p, bytes);
  reduce_elements(op, e, p, value, bytes, s);
}

}  // namespace emulator
