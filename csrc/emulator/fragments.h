// Which thread holds which element: register fragments of wgmma, ldmatrix and stmatrix, as pure functions.
#pragma once

#include <cstdint>

namespace emulator {

struct Place {
  uint32_t row, column;
  constexpr bool operator==(const Place&) const = default;
};

// Register i (0 .. n/2 - 1) of thread t (0 .. 127) of a warpgroup, of the 64 x n fp32 accumulator. The same
// for every k. PTX ISA 9.7.15.5.1.1: "Matrix Fragments for wgmma.mma_async.m64nNk16" and "m64nNk32", figures
// of matrix D.
constexpr Place accumulator_place(uint32_t t, uint32_t i) {
  return {16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (t % 4) + i % 2};
}

// Byte b (0 .. 3) of word w (0 .. 3) of A in registers, as row and byte of the 64 x 32-byte operand: the
// formats agree in bytes, since a word holds four neighbouring 8-bit or two neighbouring 16-bit elements, the
// first in the lowest bits. Same section, figures of matrix A.
constexpr Place a_register_place(uint32_t t, uint32_t w, uint32_t b) {
  return {16 * (t / 32) + t % 32 / 4 + 8 * (w % 2), 16 * (w / 2) + 4 * (t % 4) + b};
}

// Element e of word w as row and k: four elements of one byte or two of two bytes.
constexpr Place a_element_place(uint32_t t, uint32_t w, uint32_t e, uint32_t element_bytes) {
  const Place p = a_register_place(t, w, e * element_bytes);
  return {p.row, p.column / element_bytes};
}

// Row and first column of the pair of 16-bit elements that a lane holds of an 8x8 matrix; the pair's second
// element, one column on, is in the upper half of the register. PTX ISA: "ldmatrix" and "stmatrix", figures
// of the fragments.
constexpr Place matrix_place(uint32_t lane) { return {lane / 4, 2 * (lane % 4)}; }

// Element `half` (0: lower 16 bits) of register r of ldmatrix or stmatrix: which of the 1, 2 or 4 matrices,
// and where in it as it lies in shared memory, whose row i starts at the address that lane 8 * matrix + i
// gives. Register r belongs to matrix r; .trans exchanges rows and columns of each matrix.
struct MatrixElement {
  uint32_t matrix, row, column;
  constexpr bool operator==(const MatrixElement&) const = default;
};
constexpr MatrixElement matrix_element(uint32_t lane, uint32_t r, uint32_t half, bool transposed) {
  const Place p = matrix_place(lane);
  return transposed ? MatrixElement{r, p.column + half, p.row} : MatrixElement{r, p.row, p.column + half};
}

}  // namespace emulator
