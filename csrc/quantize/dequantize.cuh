// e4m3 and its scales back to bf16, fp32 or fp64.
//
//   1 x 128, 128 x 128    a block: 64 rows (fp32 32, fp64 16) by 128 columns; a thread decodes what makes 16 bytes, 4 times
//   128 x 1, transposed   a block: 128 x 128 | 16-byte loads | 4 channels a word -> smem | barrier | as above
//
// A thread loads 8, 4 or 2 codes at once, so that lanes are neighbours on both sides; all loads are issued first.
#pragma once

#include "column_output.cuh"
#include "value_output.cuh"

namespace quantize_kernels {

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizeSteps = 4;

template <class Out>
inline constexpr int values_of = 16 / sizeof(Out);   // of a thread at a time
template <class Out>
inline constexpr int rows_of_step = kDequantizeThreads / (kTile / values_of<Out>);
template <class Out>
inline constexpr int rows_of_block = kDequantizeSteps * rows_of_step<Out>;

struct DequantizeParams {
  const uint8_t* q;              // [batch, rows, columns]; 128 x 1: [columns, q_stride]
  int64_t q_stride;              // 128 x 1 only
  const float* scale;            // of a value: scale[batch * s0 + (row >> row_shift) * s1 + column / 128 * s2]
  int64_t s0, s1, s2;            // 128 x 1: s1 from 128 rows to the next, columns contiguous
  int row_shift;                 // 0: a scale for each row; 7: for 128 rows
  int64_t rows, columns;
  uint32_t row_blocks, column_tiles;
  void* out;                     // [batch, rows, columns]
};

// `values_of<Out>` codes in the low bytes; the decoded value times a scale as Out wants it.
template <class Out>
using CodesFor = std::conditional_t<sizeof(Out) == 2, uint2, std::conditional_t<sizeof(Out) == 4, uint32_t, uint16_t>>;

template <class Out>
HOPPER_DEVICE uint32_t code_at(const CodesFor<Out>& codes, int i) {
  if constexpr (sizeof(Out) == 2) return (i < 4 ? codes.x : codes.y) >> 8 * (i % 4) & 0xFF;
  else return uint32_t{codes} >> 8 * i & 0xFF;
}

template <class Out>
HOPPER_DEVICE auto decoded(uint32_t code, float scale) {
  if constexpr (sizeof(Out) == 8) return static_cast<double>(hopper::bits_float(decode(code, 1.0f))) * static_cast<double>(scale);
  else return hopper::bits_float(decode(code, scale));
}

template <class Out, bool kVector>
HOPPER_DEVICE CodesFor<Out> load_codes(const uint8_t* at, int present) {
  CodesFor<Out> codes{};
  if constexpr (kVector) {
    if (present > 0) codes = hopper::load_vector<CodesFor<Out>>(at);
  } else {
    uint8_t bytes[values_of<Out>] = {};
    HOPPER_UNROLL
    for (int i = 0; i < values_of<Out>; ++i)
      if (i < present) bytes[i] = at[i];
    memcpy(&codes, bytes, sizeof(codes));
  }
  return codes;
}

// 4 loads of 8, 4 or 2 codes in flight for each thread: reads are a third of the traffic at most, the rest are stores.
template <class Out, bool kVector>
HOPPER_KERNEL_BLOCKS(kDequantizeThreads, kVector ? 6 : 4) dequantize_rows_kernel(const DequantizeParams p) {
  constexpr int kValues = values_of<Out>, kLanesOfRow = kTile / kValues, kStep = rows_of_step<Out>, kSteps = kDequantizeSteps;
  const int64_t tile = blockIdx.x % p.column_tiles, above = blockIdx.x / p.column_tiles;
  const int64_t row = above % p.row_blocks * rows_of_block<Out> + threadIdx.x / kLanesOfRow, batch = above / p.row_blocks;
  const int64_t column = tile * kTile + threadIdx.x % kLanesOfRow * kValues;
  const int64_t corner = (batch * p.rows + row) * p.columns + column;
  const int columns = static_cast<int>(p.columns - column < kValues ? (p.columns < column ? 0 : p.columns - column) : kValues);
  const float* scale = p.scale + batch * p.s0 + tile * p.s2;

  hopper::grid_dependency_wait();
  CodesFor<Out> codes[kSteps];
  float scales[kSteps];
  HOPPER_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    const int64_t r = row + i * kStep;
    const int present = r < p.rows ? columns : 0;
    codes[i] = load_codes<Out, kVector>(p.q + corner + i * kStep * p.columns, present);
    scales[i] = present > 0 ? scale[(r >> p.row_shift) * p.s1] : 0.0f;
  }
  hopper::grid_dependency_launch();
  HOPPER_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    if (row + i * kStep >= p.rows || columns == 0) continue;
    decltype(decoded<Out>(0, 0.0f)) values[kValues];
    HOPPER_UNROLL
    for (int k = 0; k < kValues; ++k) values[k] = decoded<Out>(code_at<Out>(codes[i], k), scales[i]);
    store_values<kVector>(static_cast<Out*>(p.out) + corner + i * kStep * p.columns, values, columns);
  }
}

struct DequantizeShared {
  TransposedTile codes;                  // row t: the 128 channels of token t
  alignas(16) float scale[kTile];
};

template <class Out, bool kVector>
HOPPER_KERNEL_BLOCKS(kThreads, 4) dequantize_columns_kernel(const DequantizeParams p) {
  constexpr int kValues = values_of<Out>, kLanesOfToken = kTile / kValues, kStep = kThreads / kLanesOfToken;
  auto& shared = *reinterpret_cast<DequantizeShared*>(hopper::dynamic_smem());
  const int64_t tile = blockIdx.x / p.column_tiles, token = tile * kTile;
  const int64_t channel = int64_t{blockIdx.x % p.column_tiles} * kTile;
  const int channels = static_cast<int>(p.columns - channel < kTile ? p.columns - channel : kTile);
  const int tokens = static_cast<int>(p.rows - token < kTile ? p.rows - token : kTile);
  const Place at;

  hopper::grid_dependency_wait();
  CodedPatch patch;
  patch.load<kVector>({p.q, p.q_stride, 1}, {channel, token, channels, kTile}, at);
  const auto own = static_cast<int>(threadIdx.x);
  if (own < kTile) shared.scale[own] = own < channels ? p.scale[tile * p.s1 + channel + own] : 0.0f;
  hopper::grid_dependency_launch();
  put_codes<CodedPatch>(patch.words, shared.codes, at);
  hopper::barrier_sync<0>(kThreads);

  const int c = own % kLanesOfToken * kValues;
  if (c >= channels) return;
  float scale[kValues];
  HOPPER_UNROLL
  for (int k = 0; k < kValues; ++k) scale[k] = shared.scale[c + k];
  Out* line = static_cast<Out*>(p.out) + (token + own / kLanesOfToken) * p.columns + channel + c;
  for (int t = own / kLanesOfToken; t < tokens; t += kStep, line += kStep * p.columns) {
    uint32_t words[kValues > 4 ? 2 : 1];
    HOPPER_UNROLL
    for (int w = 0; w < (kValues > 4 ? 2 : 1); ++w) words[w] = shared.codes.word<CodedPatch::kPiece>(t, c / 4 + w);
    decltype(decoded<Out>(0, 0.0f)) values[kValues];
    HOPPER_UNROLL
    for (int k = 0; k < kValues; ++k) values[k] = decoded<Out>(words[k / 4] >> 8 * ((c + k) % 4) & 0xFF, scale[k]);
    store_values<kVector>(line, values, channels - c);
  }
}

}  // namespace quantize_kernels
