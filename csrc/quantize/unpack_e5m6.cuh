// Packed E5M6 to bf16 or fp32: a warp takes 8 rows by 128 columns, 96 pieces of 16 bytes, three for each lane.
//
//   16-byte loads -> smem of the warp | syncwarp | 8 (fp32: 4) codes of a lane, scaled -> 16-byte stores
#pragma once

#include "e5m6_format.cuh"
#include "value_output.cuh"

namespace quantize_kernels {

constexpr int kUnpackThreads = 256;
constexpr int kUnpackWarpRows = 8;
constexpr int kUnpackRows = kUnpackThreads / 32 * kUnpackWarpRows;   // of a block: 64

struct UnpackParams {
  const uint8_t* packed;         // [rows, stride], 4-byte aligned
  int64_t stride;                // bytes: 12 for each 8 columns
  const float* scale;            // of row r and tile t: scale[t * tile_stride + r * row_stride]
  int64_t scale_tile_stride, scale_row_stride;
  int64_t rows, columns;
  uint32_t column_tiles;
  void* out;                     // [rows, columns]
};

// The rows of a warp in shared memory.
struct UnpackTile {
  alignas(16) uint32_t words[kUnpackWarpRows][kPackedTile / 4];
};

template <bool kVector>
HOPPER_DEVICE void load_packed(UnpackTile& tile, const uint8_t* corner, int64_t stride, int rows, int bytes) {
  constexpr int kPiece = kVector ? 16 : 4, kPieces = kPackedTile / kPiece, kSteps = kUnpackWarpRows * kPieces / 32;
  using Piece = std::conditional_t<kVector, uint4, uint32_t>;
  Piece pieces[kSteps];
  const auto lane = static_cast<int>(threadIdx.x % 32);
  HOPPER_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    const int row = (i * 32 + lane) / kPieces, byte = (i * 32 + lane) % kPieces * kPiece;
    pieces[i] = row < rows && byte < bytes ? hopper::load_stream(reinterpret_cast<const Piece*>(corner + row * stride + byte)) : Piece{};
  }
  HOPPER_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    const int row = (i * 32 + lane) / kPieces, byte = (i * 32 + lane) % kPieces * kPiece;
    hopper::store_vector<Piece>(&tile.words[row][byte / 4], pieces[i]);
  }
}

template <class Out, bool kVector>
HOPPER_KERNEL_BLOCKS(kUnpackThreads, 6) unpack_e5m6_kernel(const UnpackParams p) {
  constexpr int kValues = 16 / sizeof(Out), kLanesOfRow = kTile / kValues, kRowsOfStep = 32 / kLanesOfRow;
  auto& tile = reinterpret_cast<UnpackTile*>(hopper::dynamic_smem())[threadIdx.x / 32];
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row = int64_t{blockIdx.x / p.column_tiles} * kUnpackRows + threadIdx.x / 32 * kUnpackWarpRows;
  const int64_t column_tile = blockIdx.x % p.column_tiles, column = column_tile * kTile;
  const int rows = static_cast<int>(p.rows - row < kUnpackWarpRows ? p.rows - row : kUnpackWarpRows);
  const int columns = static_cast<int>(p.columns - column < kTile ? p.columns - column : kTile);

  hopper::grid_dependency_wait();
  load_packed<kVector>(tile, p.packed + row * p.stride + column / 8 * 12, p.stride, rows, (columns + 7) / 8 * 12);
  float scales[kUnpackWarpRows / kRowsOfStep];
  HOPPER_UNROLL
  for (int i = 0; i < kUnpackWarpRows / kRowsOfStep; ++i) {
    const int r = i * kRowsOfStep + lane / kLanesOfRow;
    scales[i] = r < rows ? p.scale[column_tile * p.scale_tile_stride + (row + r) * p.scale_row_stride] : 0.0f;
  }
  hopper::grid_dependency_launch();
  hopper::syncwarp();

  HOPPER_UNROLL
  for (int i = 0; i < kUnpackWarpRows / kRowsOfStep; ++i) {
    const int r = i * kRowsOfStep + lane / kLanesOfRow, c = lane % kLanesOfRow * kValues;
    if (r >= rows || c >= columns) continue;
    const uint32_t* w = tile.words[r] + c / 8 * 3;
    float values[kValues];
    HOPPER_UNROLL
    for (int k = 0; k < kValues; ++k) {
      const bool right = sizeof(Out) == 2 ? k >= 4 : c % 8 != 0;
      const FourCodes four = right ? right_four(w[1], w[2]) : left_four(w[0], w[1]);
      values[k] = hopper::bits_float(decode_e5m6(code_of(four, k % 4), scales[i]));
    }
    store_values<kVector>(static_cast<Out*>(p.out) + (row + r) * p.columns + column + c, values, columns - c);
  }
}

}  // namespace quantize_kernels
