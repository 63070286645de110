// Which thread holds which element. PTX ISA: "Register fragments and shared-memory matrix layouts" (wgmma), "ldmatrix".
#pragma once

#include <cstdint>

namespace emulator {

struct Place { uint32_t row, column; };

// Register i of thread t (0..127) of a warpgroup, of the 64 x n accumulator.
constexpr Place accumulator_place(uint32_t t, uint32_t i) {
  return {16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (t % 4) + i % 2};
}

// Byte b (0..3) of word w (0..3) of A in registers, as row and byte of the 64 x 32-byte operand: the two formats agree in
// bytes, since a word holds 4 neighbouring e4m3 or 2 neighbouring bf16.
constexpr Place a_register_place(uint32_t t, uint32_t w, uint32_t b) {
  return {16 * (t / 32) + t % 32 / 4 + 8 * (w % 2), 16 * (w / 2) + 4 * (t % 4) + b};
}

// Row and first column of the pair of 16-bit elements in a register of ldmatrix and stmatrix.
constexpr Place matrix_place(uint32_t lane) { return {lane / 4, 2 * (lane % 4)}; }

}  // namespace emulator
