// Patches that a thread keeps in shared memory for itself, without any barrier: more than its registers hold, or copies
// under way. A warp's 16-byte pieces lie next to each other, so that no access has a bank conflict, and all pieces of a
// warp too, so that their addresses differ by constants and cost no registers.
#pragma once

#include "patch.cuh"

namespace quantize_kernels {

template <class T>
struct OwnPatches {
  static constexpr int kSlots = kRows * Patch<T>::kPieces;    // of 16 bytes, a patch and thread
  static constexpr size_t bytes(int patches, int threads) { return size_t{kSlots} * 16 * patches * threads; }

  uint4* slots;

  HOPPER_DEVICE uint4* first_slot(int patch) const {
    return slots + (patch * blockDim.x + threadIdx.x / 32 * 32) * kSlots + threadIdx.x % 32;
  }
  // One 16-byte piece of a patch, as it lies in a row.
  HOPPER_DEVICE void put_piece(int index, int row, int piece, uint4 words) const {
    first_slot(index)[32 * (row * Patch<T>::kPieces + piece)] = words;
  }
  // What lies behind so many patches.
  HOPPER_DEVICE void* end(int patches) const { return slots + patches * blockDim.x * kSlots; }

  HOPPER_DEVICE void put(int index, const Patch<T>& patch) const {
    uint4* slot = first_slot(index);
    HOPPER_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t* w = &patch.words[i / Patch<T>::kPieces][i % Patch<T>::kPieces * 4];
      slot[32 * i] = uint4{w[0], w[1], w[2], w[3]};
    }
  }
  HOPPER_DEVICE void take(int index, Patch<T>& patch) const {
    uint4* slot = first_slot(index);
    HOPPER_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      const uint4 piece = slot[32 * i];
      uint32_t* w = &patch.words[i / Patch<T>::kPieces][i % Patch<T>::kPieces * 4];
      w[0] = piece.x, w[1] = piece.y, w[2] = piece.z, w[3] = piece.w;
    }
  }

  // Starts the copy of a patch with zeros past the window's end; what Patch::load<true> reads. The caller commits and waits.
  HOPPER_DEVICE void start_copy(int index, const Source& source, const Window& window, Place at) const {
    uint4* slot = first_slot(index);
    const T* data = static_cast<const T*>(source.data);
    HOPPER_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      const int r = at.group * kRows + i / Patch<T>::kPieces;
      const int c = Patch<T>::column(i % Patch<T>::kPieces * Patch<T>::kPiece, at.lane);
      const bool exists = r < window.rows && c < window.columns;
      const T* from = exists ? data + (window.row + r) * source.row_stride + window.column + c : data;
      hopper::cp_async<16>(slot + 32 * i, from, exists ? 16 : 0);
    }
  }
};

}  // namespace quantize_kernels
