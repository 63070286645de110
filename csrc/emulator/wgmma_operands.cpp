#include "wgmma_operands.h"

#include <cstring>

#include "swizzle.h"

namespace emulator {
namespace {

// By their code, bits 62-63.
constexpr Swizzle kModes[] = {Swizzle::none, Swizzle::b128, Swizzle::b64, Swizzle::b32};
constexpr uint64_t kReserved = 0x3ull << 14 | 0x3ull << 30 | 0x7ull << 46 | 0x3ffull << 52;
constexpr uint32_t kChunk = 16;

constexpr uint32_t span_of(Swizzle s) {
  return s == Swizzle::b128 ? 128 : s == Swizzle::b64 ? 64 : s == Swizzle::b32 ? 32 : kChunk;
}

// The rows that the XOR takes its number from are counted from the start of the pattern. Without a base
// offset that is a multiple of the repeat, and the XOR one of absolute address bits, as TMA does it. With
// one, the ISA says only that it is (pattern start >> 7) & 7; we read it as the number of 128-byte rows that
// the pattern is displaced by.
uint32_t physical(const MatrixDescriptor& m, uint32_t address) {
  const uint32_t displaced = m.base_offset * 128;
  return swizzled(address - displaced, m.swizzle) + displaced;
}

std::string check(const MatrixDescriptor& m, uint64_t bits, bool wide, Major major, uint32_t rows) {
  if (bits & kReserved)
    return "reserved bits are set (bits 14-15, 30-31, 46-48, 52-61 are not part of any field): a sum has run "
           "over, or an offset was not encoded as (x & 0x3FFFF) >> 4";
  if (major == Major::mn && !wide)
    return "MN-major: 8-bit operands are K-major only (imm-trans is for .f16 and .bf16)";
  if (m.swizzle == Swizzle::none && m.base_offset != 0)
    return "base offset " + std::to_string(m.base_offset) +
           " without a swizzle: it is valid for swizzling modes only";
  if (rows == 0 || rows % 8 || rows > 256)
    return std::to_string(rows) + " rows: not a multiple of 8 up to 256";
  if (m.swizzle == Swizzle::none) return "";
  // Canonical layouts: what one row (K-major: 32 bytes of k) or one k (MN-major: up to a span of rows) has
  // within an atom is contiguous up to the XOR. A start address inside of the span must leave room for it.
  const uint32_t span = span_of(m.swizzle), inside = m.start_address % span;
  const uint32_t run = major == Major::k ? 32 : rows * 2 < span ? rows * 2 : span;
  if (inside + run > span)
    return "start address " + std::to_string(m.start_address) + " lies " + std::to_string(inside) +
           " bytes into a span of " + std::to_string(span) + ": the " + std::to_string(run) +
           " bytes that are read from there leave the swizzle atom";
  return "";
}

}  // namespace

MatrixDescriptor decode_descriptor(uint64_t d) {
  const auto field = [d](int bit) { return static_cast<uint32_t>(d >> bit & 0x3fff) << 4; };
  return {field(0), field(16), field(32), static_cast<uint32_t>(d >> 49 & 7), kModes[d >> 62]};
}

uint64_t encode_descriptor(const MatrixDescriptor& m) {
  const auto field = [](uint32_t bytes, int bit) {
    return static_cast<uint64_t>((bytes & 0x3ffff) >> 4) << bit;
  };
  uint64_t mode = 0;
  while (kModes[mode] != m.swizzle) ++mode;
  return field(m.start_address, 0) | field(m.leading_byte_offset, 16) | field(m.stride_byte_offset, 32) |
         static_cast<uint64_t>(m.base_offset & 7) << 49 | mode << 62;
}

std::string gather_operand(const uint8_t* window, uint32_t begin, uint32_t end, uint64_t descriptor,
                           Operand operand, Major major, uint32_t rows, uint8_t* out,
                           void (*touch)(void*, uint32_t, uint32_t), void* context) {
  const MatrixDescriptor m = decode_descriptor(descriptor);
  const bool wide = operand == Operand::bf16 || operand == Operand::f16, plain = m.swizzle == Swizzle::none;
  std::string wrong = check(m, descriptor, wide, major, rows);
  if (!wrong.empty()) return wrong;
  const uint32_t span = span_of(m.swizzle), chunks = span / kChunk;
  const auto chunk = [&](uint32_t offset) -> const uint8_t* {
    const uint32_t address = physical(m, m.start_address + offset);
    if (address < begin || address >= end || end - address < kChunk) {
      wrong = "reads shared addresses " + std::to_string(address) + ".." + std::to_string(address + kChunk) +
              ", outside of the block's " + std::to_string(begin) + ".." + std::to_string(end);
      return nullptr;
    }
    if (touch) touch(context, address, kChunk);
    return window + address;
  };
  if (major == Major::k) {
    for (uint32_t row = 0; row < rows; ++row)
      for (uint32_t c = 0; c < 2; ++c) {
        const uint32_t along = plain ? c * m.leading_byte_offset : c * kChunk;
        const uint8_t* from = chunk(row % 8 * span + row / 8 * m.stride_byte_offset + along);
        if (!from) return wrong;
        std::memcpy(out + row * 32 + c * kChunk, from, kChunk);
      }
    return wrong;
  }
  for (uint32_t group = 0; group < rows / 8; ++group)  // eight rows are one chunk
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t offset =
          plain ? group * m.stride_byte_offset + k % 8 * kChunk + k / 8 * m.leading_byte_offset
                : group % chunks * kChunk + group / chunks * m.leading_byte_offset + k % 8 * span +
                      k / 8 * m.stride_byte_offset;
      const uint8_t* from = chunk(offset);
      if (!from) return wrong;
      for (uint32_t i = 0; i < 8; ++i) std::memcpy(out + (group * 8 + i) * 32 + k * 2, from + i * 2, 2);
    }
  return wrong;
}

}  // namespace emulator
