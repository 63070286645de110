// One slice of a bf16 operand of wgmma in shared memory, in the order in which it lies in global memory.
//
// An operand has rows (M of A, N of B) and K. wgmma takes 16-bit operands with either of them contiguous, so that a
// transposed view is read as it stands. A slice is 64 of K; TMA writes it with the 128-byte swizzle as
//
//   Major::k     [rows][64 of K]            one panel, a row is one span           K contiguous in global memory
//   Major::mn    [rows / 64][64 of K][64]   a panel for every 64 rows, k by k      rows contiguous in global memory
//
// (PTX ISA "Shared Memory Matrix Layout", "Canonical Layouts" with 128-byte swizzling.)
#pragma once

#include "../hopper/front.h"
#include "shared_tile.h"

constexpr int kOperandSlice = 64;   // of K: 128 bytes, the span of the widest swizzle
constexpr int kOperandStep = 16;    // of K in one 16-bit wgmma

template <int Rows, hopper::Major major>
struct OperandTile {
  static constexpr bool kRowsInside = major == hopper::Major::mn;   // rows are the contiguous dimension
  static constexpr int kPanels = kRowsInside ? Rows / 64 : 1;
  static_assert(Rows % 64 == 0, "panels of 64 rows");
  using Storage = SharedTile<hopper::bf16, kRowsInside ? kOperandSlice : Rows, kRowsInside ? Rows : kOperandSlice,
                             hopper::Swizzle::b128>;
  static constexpr int kBytes = Rows * kOperandSlice * 2;

  Storage storage;

  // What wgmma reads from row `first` (a multiple of 64) on, and how many bytes on the next 16 of K lie.
  HOPPER_DEVICE uint64_t matrix(int first) {
    if constexpr (kRowsInside)
      return hopper::matrix_descriptor(storage.panel(first / 64), hopper::Swizzle::b128, 64 * kOperandSlice * 2, 1024);
    else
      return hopper::matrix_descriptor<hopper::Swizzle::b128>(storage.row(first));
  }
  static constexpr uint32_t kStepBytes = kRowsInside ? kOperandStep * 128 : kOperandStep * 2;

  // One thread: the slice at (row, k) of matrix `batch`. Of `parts` CTAs that share it, each loads the part `part` into
  // all of `mask`: rows of a K-major tile, K of the other, whose panels have no half that a swizzle could span.
  HOPPER_DEVICE void load(const hopper::TensorMap& map, hopper::Mbarrier* full, int32_t row, int32_t k, int32_t batch,
                          int32_t part = 0, int32_t parts = 1, uint16_t mask = 0, hopper::Site site = HOPPER_HERE) {
    const int32_t first = part * ((kRowsInside ? kOperandSlice : Rows) / parts);
    if constexpr (kRowsInside) {
      HOPPER_UNROLL for (int panel = 0; panel < kPanels; ++panel)
        hopper::tma_load(storage.panel(panel) + first * 64, map, full, {row + 64 * panel, k + first, batch}, mask, site);
    } else {
      hopper::tma_load(storage.row(first), map, full, {k, row + first, batch}, mask, site);
    }
  }

  // Writes zeros over what lies past the first `valid` of K, by `threads` threads together. The caller orders that before
  // wgmma: a proxy fence of each writer, then a barrier.
  HOPPER_DEVICE void clear_past(int32_t valid, uint32_t thread, uint32_t threads) {
    const uint4 zeros{0, 0, 0, 0};
    if constexpr (kRowsInside) {
      const uint32_t chunks = (kOperandSlice - valid) * 8;   // whole rows of 128 bytes: the swizzle stays inside of them
      HOPPER_UNROLL for (int panel = 0; panel < kPanels; ++panel)
        for (uint32_t i = thread; i < chunks; i += threads)
          hopper::store_vector(storage.panel(panel) + valid * 64 + i * 8, zeros);
    } else {
      for (uint32_t i = thread; i < Rows * 8; i += threads) {
        const int32_t k = i % 8 * 8;
        hopper::bf16* at = storage.chunk(i / 8, k);
        if (k >= valid) {
          hopper::store_vector(at, zeros);
        } else {
          for (int32_t j = valid - k; j < 8; ++j) at[j] = hopper::bf16{0};
        }
      }
    }
  }
};
