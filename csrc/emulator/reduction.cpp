#include "reduction.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../hopper/convert.h"

namespace emulator {

uint32_t element_bytes(Element e) {
  switch (e) {
    case Element::u8: return 1;
    case Element::u16: case Element::f16: case Element::bf16: return 2;
    case Element::u32: case Element::s32: case Element::f32: return 4;
    default: return 8;
  }
}

namespace {


std::string legal(Reduce op, Element e, bool bulk) {
  if (e == Element::u8 || e == Element::u16) return "no reduction on 8- or 16-bit integers";
  if (op == Reduce::add) return "";
  if (e == Element::f32 || e == Element::f64) return "fp32 and fp64 have add only";
  if (e == Element::f16 || e == Element::bf16)
    return bulk && (op == Reduce::min || op == Reduce::max) ? "" : "16-bit floating point has add, and min and max in bulk reductions";
  if ((op == Reduce::inc || op == Reduce::dec) && e != Element::u32) return "inc and dec are for u32";
  return "";
}

template <class T>
T integer(Reduce op, T a, T b) {
  switch (op) {
    case Reduce::add: return static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
    case Reduce::min: return std::min(a, b);
    case Reduce::max: return std::max(a, b);
    case Reduce::inc: return a >= b ? 0 : a + 1;
    case Reduce::dec: return a == 0 || a > b ? b : a - 1;
    case Reduce::and_: return a & b;
    case Reduce::or_: return a | b;
    default: return a ^ b;
  }
}

float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const float sign = h >> 15 ? -1.0f : 1.0f;
  const float fraction = static_cast<float>(h & 1023);
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return exponent ? sign * std::ldexp(1024.0f + fraction, exponent - 25) : sign * std::ldexp(fraction, -24);
}

uint16_t float_to_half(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float a = std::fabs(x);
  if (a >= 65520.0f) return sign | 0x7c00;
  int e;
  std::frexp(a, &e);
  e = std::max(e - 1, -14);
  const float units = std::nearbyint(std::ldexp(a, 10 - e));   // of 2^(e - 10)
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(e + 14) << 10) + static_cast<uint32_t>(units)));
}

float floating(Reduce op, float a, float b) {
  if (op == Reduce::add) return a + b;
  if (std::isnan(a)) return b;   // the number wins
  if (std::isnan(b)) return a;
  return op == Reduce::min ? std::min(a, b) : std::max(a, b);
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

std::string atomic_legal(Reduce op, Element e) { return legal(op, e, false); }
std::string bulk_reduce_legal(Reduce op, Element e) { return legal(op, e, true); }

void reduce_elements(Reduce op, Element e, void* dst, const void* src, size_t bytes) {
  switch (e) {
    case Element::u32: each<uint32_t>(dst, src, bytes, [op](auto a, auto b) { return integer(op, a, b); }); break;
    case Element::s32: each<int32_t>(dst, src, bytes, [op](auto a, auto b) { return integer(op, a, b); }); break;
    case Element::u64: each<uint64_t>(dst, src, bytes, [op](auto a, auto b) { return integer(op, a, b); }); break;
    case Element::s64: each<int64_t>(dst, src, bytes, [op](auto a, auto b) { return integer(op, a, b); }); break;
    case Element::f32: each<float>(dst, src, bytes, [](auto a, auto b) { return a + b; }); break;
    case Element::f64: each<double>(dst, src, bytes, [](auto a, auto b) { return a + b; }); break;
    case Element::bf16:
      each<uint16_t>(dst, src, bytes, [op](uint16_t a, uint16_t b) {
        return hopper::to_bf16(floating(op, hopper::to_float(hopper::bf16{a}), hopper::to_float(hopper::bf16{b}))).bits;
      });
      break;
    case Element::f16:
      each<uint16_t>(dst, src, bytes, [op](uint16_t a, uint16_t b) { return float_to_half(floating(op, half_to_float(a), half_to_float(b))); });
      break;
    default: break;   // refused by the legality tables
  }
}

}  // namespace emulator
