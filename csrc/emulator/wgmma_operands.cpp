#include "wgmma_operands.h"

#include <cstring>

#include "swizzle.h"

namespace emulator {

// PTX ISA: "Matrix descriptor format".
MatrixDescriptor decode_descriptor(uint64_t d) {
  static constexpr Swizzle modes[] = {Swizzle::none, Swizzle::b128, Swizzle::b64, Swizzle::b32};
  return {static_cast<uint32_t>(d & 0x3fff) << 4, static_cast<uint32_t>(d >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(d >> 32 & 0x3fff) << 4, static_cast<uint32_t>(d >> 49 & 7), modes[d >> 62]};
}

std::string gather_operand(const uint8_t* window, uint32_t begin, uint32_t end, uint64_t descriptor, Operand operand, Major major, uint32_t rows,
                           uint8_t* out, void (*touch)(void*, uint32_t, uint32_t), void* context) {
  const MatrixDescriptor m = decode_descriptor(descriptor);
  const bool wide = operand == Operand::bf16 || operand == Operand::f16;
  if (major == Major::mn && !wide) return "8-bit operands are K-major only";
  if (m.base_offset != 0) return "base offset " + std::to_string(m.base_offset) + ": start tiles at multiples of the swizzle's repeat instead";
  const uint32_t span = m.swizzle == Swizzle::b128 ? 128 : m.swizzle == Swizzle::b64 ? 64 : m.swizzle == Swizzle::b32 ? 32 : 16;
  std::string wrong;
  auto piece = [&](uint32_t address) -> const uint8_t* {
    const uint32_t physical = swizzled(address, m.swizzle);
    if (physical < begin || physical + 16 > end) {
      wrong = "reads shared address " + std::to_string(physical) + ", outside of the block's " + std::to_string(begin) + ".." + std::to_string(end);
      return nullptr;
    }
    if (touch) touch(context, physical, 16);
    return window + physical;
  };
  if (major == Major::k) {
    // Rows in groups of 8: with a swizzle a row is one span; without, 8x16-byte cores, `leading` apart along K.
    const uint32_t pitch = span, chunk_step = m.swizzle == Swizzle::none ? m.leading_bytes : 16;
    for (uint32_t r = 0; r < rows; ++r)
      for (uint32_t c = 0; c < 2; ++c) {
        const uint8_t* p = piece(m.start + r % 8 * pitch + r / 8 * m.stride_bytes + c * chunk_step);
        if (!p) return wrong;
        std::memcpy(out + r * 32 + c * 16, p, 16);
      }
    return wrong;
  }
  // MN-major: 16-byte pieces of 8 neighbouring rows at one k. With a swizzle `span` bytes of rows lie together, k moves by
  // a span within groups of 8 (the stride to the next group), further rows are `leading` apart. Without, cores of
  // 8 rows x 8 k, `stride` apart along the rows and `leading` along k.
  const uint32_t per_span = span / 16;
  for (uint32_t r8 = 0; r8 < rows / 8; ++r8)
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t address = m.swizzle == Swizzle::none ? m.start + r8 * m.stride_bytes + k % 8 * 16 + k / 8 * m.leading_bytes
                                                          : m.start + r8 % per_span * 16 + r8 / per_span * m.leading_bytes +
                                                                k % 8 * span + k / 8 * m.stride_bytes;
      const uint8_t* p = piece(address);
      if (!p) return wrong;
      for (uint32_t i = 0; i < 8; ++i) std::memcpy(out + (r8 * 8 + i) * 32 + k * 2, p + i * 2, 2);
    }
  return wrong;
}

}  // namespace emulator
