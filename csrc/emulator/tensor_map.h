// The geometry of tensor copies: which bytes of the tensor a box covers, and where they lie in shared memory.
// PTX ISA 5.5 "Tensors": "Tiled Mode" (bounding box, traversal stride, out of boundary access) and "Swizzling
// Modes".
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "../hopper/tensor_map.h"
#include "swizzle.h"

namespace emulator {

// Dimensions past the rank have size, box, step and count 1 and stride 0: loops need not know the rank.
struct DecodedMap {
  uint8_t* base = nullptr;
  int rank = 0;
  hopper::Element element{};
  uint32_t element_bytes = 0;
  hopper::Swizzle swizzle{};
  bool fill_nan = false;
  int64_t size[5] = {};       // elements
  int64_t stride[5] = {};     // bytes, that of dimension 0 included
  int32_t box[5] = {};        // elements that the box spans
  int32_t step[5] = {};       // traversal stride
  int32_t count[5] = {};      // elements that a copy moves: ceil(box / step)
  uint32_t row_bytes = 0;     // of a run along dimension 0
  uint32_t row_pitch = 0;     // from one run to the next in shared memory
  uint32_t rows = 0;          // runs of the box
  uint8_t fill[16] = {};      // what a load finds outside of the tensor, 16 bytes of it
};

// Text that says why the 128 bytes are no tensor map, or empty.
std::string decode(const hopper::TensorMap*, DecodedMap&);

// Text that says why an instruction of that rank may not copy to or from that place, or empty.
std::string check_copy(const DecodedMap&, int rank, uint32_t shared_address);

// What a load completes on its barrier: the whole box, with what lies outside of the tensor and without gaps
// between rows.
inline uint32_t box_bytes(const DecodedMap& m) { return m.rows * m.row_bytes; }

// From the box's address to the end of its last row; a swizzle moves chunks within the row's own span.
inline uint32_t shared_extent(const DecodedMap& m) { return m.rows * m.row_pitch; }

struct Piece {
  uint32_t shared_offset;   // from the box's address, before the swizzle
  uint8_t* global;          // null: outside of the tensor; loads write DecodedMap::fill, stores skip it
  uint32_t bytes;           // whole elements, 16 at most, within one 16-byte chunk of shared memory
};

// Calls visit(shared address after the swizzle, Piece) for every piece of the box, row by row; or, where
// visit takes them so, visit(address, global, bytes). The copy must have passed check_copy.
template <class Visit>
void for_each_piece(const DecodedMap& m, const int32_t* coordinates, uint32_t shared_address, Visit&& visit) {
  int64_t at[5] = {};
  for (int i = 0; i < m.rank; ++i) at[i] = coordinates[i];
  // The bytes [first, last) of every row lie in the tensor; dimension 0 has no traversal stride.
  const auto in_row = [&m](int64_t element) {
    return static_cast<uint32_t>(std::clamp<int64_t>(element, 0, m.count[0])) * m.element_bytes;
  };
  const uint32_t first = in_row(-at[0]), last = in_row(m.size[0] - at[0]);

  const auto emit = [&](uint32_t offset, uint8_t* global, uint32_t bytes) {
    const uint32_t address = swizzled(shared_address + offset, m.swizzle);
    if constexpr (std::is_invocable_v<Visit&, uint32_t, const Piece&>)
      visit(address, Piece{offset, global, bytes});
    else
      visit(address, global, bytes);
  };
  // Integers, for the address of a box's corner may lie outside of any object.
  const auto pointer = [](uint64_t a) { return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(a)); };

  uint32_t offset = 0;
  const auto visit_row = [&](uint64_t global, bool inside) {
    const uint32_t end = m.row_bytes;
    if (!inside || first == last) {
      for (uint32_t b = 0; b < end; b += 16) emit(offset + b, nullptr, 16);
    } else if (last - first == end) {
      for (uint32_t b = 0; b < end; b += 16) emit(offset + b, pointer(global + b), 16);
    } else {
      for (uint32_t b = 0; b < end; b += 16) {
        const uint32_t left = std::clamp(first, b, b + 16), right = std::clamp(last, b, b + 16);
        if (left > b) emit(offset + b, nullptr, left - b);
        if (right > left) emit(offset + left, pointer(global + left), right - left);
        if (b + 16 > right) emit(offset + right, nullptr, b + 16 - right);
      }
    }
    offset += m.row_pitch;
  };

  // A coordinate's part of the address, and whether it lies in the tensor.
  const auto add = [&m, &at](int i, int32_t k, uint64_t& global) {
    const int64_t c = at[i] + int64_t{k} * m.step[i];
    global += static_cast<uint64_t>(c) * static_cast<uint64_t>(m.stride[i]);
    return c >= 0 && c < m.size[i];
  };
  uint64_t corner = reinterpret_cast<uintptr_t>(m.base);
  add(0, 0, corner);
  for (int32_t i4 = 0; i4 < m.count[4]; ++i4) {
    uint64_t g4 = corner;
    const bool in4 = add(4, i4, g4);
    for (int32_t i3 = 0; i3 < m.count[3]; ++i3) {
      uint64_t g3 = g4;
      const bool in3 = add(3, i3, g3) && in4;
      for (int32_t i2 = 0; i2 < m.count[2]; ++i2) {
        uint64_t g2 = g3;
        const bool in2 = add(2, i2, g2) && in3;
        for (int32_t i1 = 0; i1 < m.count[1]; ++i1) {
          uint64_t g1 = g2;
          const bool in1 = add(1, i1, g1) && in2;
          visit_row(g1, in1);
        }
      }
    }
  }
}

}  // namespace emulator
