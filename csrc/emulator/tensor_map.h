// The geometry of tensor copies: which bytes of a tensor a box touches, and where they lie in shared memory.
// PTX ISA: "Tensors" (tiled mode, boxes, out-of-bounds access, swizzling modes).
#pragma once

#include <cstring>
#include <string>

#include "../hopper/tensor_map.h"
#include "swizzle.h"

namespace emulator {

struct DecodedMap {
  uint8_t* base = nullptr;
  int rank = 0;
  hopper::Element element{};
  uint32_t element_bytes = 0;
  hopper::Swizzle swizzle{};
  bool fill_nan = false;
  int64_t size[5]{}, stride[5]{};   // stride in bytes, dimension 0 included
  int32_t box[5]{}, step[5]{};
};

// What is wrong, or nothing.
std::string decode(const hopper::TensorMap*, DecodedMap&);

// What a copy completes on its barrier: the whole box, bytes outside of the tensor included.
inline uint32_t box_bytes(const DecodedMap& m) {
  uint32_t bytes = m.element_bytes;
  for (int i = 0; i < m.rank; ++i) bytes *= static_cast<uint32_t>(m.box[i]);
  return bytes;
}

// Shared memory holds the box's rows of dimension 0 one after the other, each `box[0]` elements - under a swizzle each
// starts at a multiple of the span. Calls visit(shared address, pointer or null, bytes) for pieces of at most 16 bytes
// inside one 16-byte chunk; null: outside of the tensor.
template <class Visit>
void for_each_piece(const DecodedMap& m, const int32_t* coordinates, uint32_t shared_address, Visit visit) {
  const uint32_t row_bytes = static_cast<uint32_t>(m.box[0]) * m.element_bytes;
  const uint32_t span = m.swizzle == hopper::Swizzle::b128 ? 128 : m.swizzle == hopper::Swizzle::b64 ? 64 : m.swizzle == hopper::Swizzle::b32 ? 32 : row_bytes;
  int32_t at[5] = {};
  uint32_t row_address = shared_address;
  for (;;) {
    bool inside = true;
    uint8_t* row = m.base;
    for (int i = 1; i < m.rank; ++i) {
      const int64_t c = int64_t{coordinates[i]} + int64_t{at[i]} * m.step[i];
      inside &= c >= 0 && c < m.size[i];
      row += c * m.stride[i];
    }
    for (uint32_t offset = 0; offset < row_bytes; offset += 16) {
      const uint32_t address = swizzled(row_address + offset, m.swizzle);
      const int64_t first = int64_t{coordinates[0]} + int64_t{offset / m.element_bytes} * m.step[0];
      const int64_t last = first + int64_t{16 / m.element_bytes - 1} * m.step[0];
      if (m.step[0] == 1 && inside && first >= 0 && last < m.size[0]) {
        visit(address, row + first * m.element_bytes, 16u);
      } else if (!inside || last < 0 || first >= m.size[0]) {
        visit(address, static_cast<uint8_t*>(nullptr), 16u);
      } else {
        for (uint32_t b = 0; b < 16; b += m.element_bytes) {
          const int64_t c = first + int64_t{b / m.element_bytes} * m.step[0];
          visit(address + b, c >= 0 && c < m.size[0] ? row + c * m.element_bytes : nullptr, m.element_bytes);
        }
      }
    }
    row_address += span;
    int i = 1;
    for (; i < m.rank; ++i) {
      if (++at[i] < m.box[i]) break;
      at[i] = 0;
    }
    if (i >= m.rank) return;
  }
}

}  // namespace emulator
