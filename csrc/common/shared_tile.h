// A tile in shared memory as TMA writes it and wgmma reads it.
//
// The columns are cut into panels as wide as the swizzle's span (128, 64 or 32 bytes); a panel holds all rows, one
// after the other. Within a panel TMA exchanges 16-byte chunks so that the same chunk of 8 consecutive rows falls into
// 8 different groups of banks (PTX ISA, "Tensor copies: swizzling modes"):
//
//   128 B: chunk ^= row % 8        64 B: chunk ^= row / 2 % 4        32 B: chunk ^= row / 4 % 2
//
// which on byte addresses is one rule: bits 4.. are XORed with bits 7.. of the address.
#pragma once

#include "../hopper/front.h"

template <class T, int Rows, int Columns, hopper::Swizzle swizzle>
struct alignas(swizzle == hopper::Swizzle::none ? 128 : 1024) SharedTile {
  static constexpr int kRows = Rows, kColumns = Columns;
  static constexpr int kPanelBytes = swizzle == hopper::Swizzle::b128  ? 128
                                     : swizzle == hopper::Swizzle::b64 ? 64
                                     : swizzle == hopper::Swizzle::b32 ? 32
                                                                       : Columns * static_cast<int>(sizeof(T));
  static constexpr int kPanelColumns = kPanelBytes / static_cast<int>(sizeof(T));
  static constexpr int kPanels = Columns / kPanelColumns;
  static constexpr uint32_t kMask = swizzle == hopper::Swizzle::none ? 0 : kPanelBytes - 16;
  static_assert(Columns % kPanelColumns == 0, "the columns must be whole panels of the swizzle's span");
  static_assert(Rows % 8 == 0, "a swizzle pattern repeats every 8 rows");

  T data[Rows * Columns];

  HOPPER_DEVICE T* panel(int index) { return data + index * Rows * kPanelColumns; }
  HOPPER_DEVICE T* row(int index) { return data + index * kPanelColumns; }   // of the first panel; 8-aligned rows

  // Address of 16 bytes: `column` is a multiple of 16 bytes.
  HOPPER_DEVICE T* chunk(uint32_t row, uint32_t column) {
    const uint32_t offset = row * kPanelBytes + column % kPanelColumns * sizeof(T);
    const uint32_t swizzled = offset ^ ((offset >> 3) & kMask);
    return panel(column / kPanelColumns) + swizzled / sizeof(T);
  }
};

// The widest swizzle whose span divides a row of that many bytes. All three are free of bank conflicts for stmatrix;
// a wider one means fewer and longer rows for the TMA store.
constexpr hopper::Swizzle widest_swizzle(int row_bytes) {
  return row_bytes % 128 == 0  ? hopper::Swizzle::b128
         : row_bytes % 64 == 0 ? hopper::Swizzle::b64
         : row_bytes % 32 == 0 ? hopper::Swizzle::b32
                               : hopper::Swizzle::none;
}
