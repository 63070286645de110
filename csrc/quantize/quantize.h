// The quantisers on the host: arguments, limits, launches (report 3.3.2, 3.5.2). What they compute, to the byte:
// deepseek_ops/quantize.py and docs/numerics.md; how: README.md beside this file.
//
// Every function launches on `stream`, allocates nothing, never synchronises, and throws before anything is launched
// with a sentence that names the argument, the rule it broke and its value. Strides count elements. Outputs are dense.
// Scales are fp32 and always dequantisation multipliers; row scales are GEMM-ready, [ceil(columns/128), rows padded
// to 4], rows contiguous, padding 1.
#pragma once

#include <cstdint>

#include "../hopper/launch.h"

namespace quantize {

enum class Type : uint8_t { bf16, fp32, fp64, e4m3, e5m6 };   // e5m6: packed, strides count bytes

struct Matrix {                   // [rows, columns], any strides
  const void* data = nullptr;
  Type type = Type::bf16;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 1;
};

// 1 x 128: q [rows, columns] e4m3 and its scale.
struct RowsArguments {
  Matrix x;                       // bf16 or fp32
  void* q = nullptr;
  float* scale = nullptr;
  bool pow2 = false;
  bool official_clamp = false;    // amax at least 1e-4, as the released inference code has it
  bool programmatic = true;       // may start before the previous kernel of the stream has ended (PDL)
};
void quantize_1x128(const RowsArguments& arguments, hopper::Stream stream);

// 128 x 1, stored transposed: q_t [columns, padded_rows] e4m3 and scale_t [padded_rows / 128, columns padded to 4].
// With q and scale the 1 x 128 result too, from the same read. An e4m3 or e5m6 x with its scales is requantised.
struct ColumnsArguments {
  Matrix x;
  const float* x_scale = nullptr; // e4m3 and e5m6 only: [ceil(columns/128), x_scale_stride], rows contiguous
  int64_t x_scale_stride = 0;

  // Groups of rows, each padded to 128 on its own; null: all rows are one group and padded_rows is rows padded to 128.
  const int32_t* offsets = nullptr;     // [groups + 1] on the device, not checked; memory outside x is never touched
  int32_t* padded_offsets = nullptr;    // [groups + 1], written
  int64_t groups = 0;

  int64_t padded_rows = 0;        // a multiple of 128 that holds every group
  void* q_t = nullptr;
  float* scale_t = nullptr;
  void* q = nullptr;              // both or neither
  float* scale = nullptr;
  bool pow2 = false;
  bool programmatic = true;
};
void quantize_128x1(const ColumnsArguments& arguments, hopper::Stream stream);

// 128 x 128 blocks of `batch` matrices: q of the shape of w, scale [batch, ceil(rows/128), ceil(columns/128)]; with q_t
// and scale_t the transposed copy of both too.
struct BlocksArguments {
  Matrix w;                       // bf16 or fp32
  int64_t batch = 1, batch_stride = 0;
  void* q = nullptr;
  float* scale = nullptr;
  void* q_t = nullptr;            // both or neither
  float* scale_t = nullptr;
  bool pow2 = false;
  bool programmatic = true;
};
void quantize_128x128(const BlocksArguments& arguments, hopper::Stream stream);

// The transposed copy of codes and scales that exist already.
struct TransposeArguments {
  Matrix q;                       // e4m3
  int64_t batch = 1, batch_stride = 0;
  const float* scale = nullptr;   // [batch, ceil(rows/128), ceil(columns/128)]
  int64_t scale_strides[3] = {};
  void* q_t = nullptr;
  float* scale_t = nullptr;
  bool programmatic = true;
};
void transpose_128x128(const TransposeArguments& arguments, hopper::Stream stream);

// ---- E5M6: 8 values in 12 bytes ------------------------------------------------------------------------------------

constexpr int64_t packed_bytes(int64_t columns) { return (columns + 7) / 8 * 12; }   // of a row

struct PackArguments {
  Matrix x;                       // bf16 or fp32
  bool whole_rows = false;        // one fp32 scale a row, scale [rows]; else powers of two, GEMM-ready
  void* packed = nullptr;         // [rows, packed_bytes(columns)]
  float* scale = nullptr;
  bool programmatic = true;
};
void pack_e5m6(const PackArguments& arguments, hopper::Stream stream);

struct UnpackArguments {
  const void* packed = nullptr;   // dense, 4-byte aligned
  const float* scale = nullptr;
  int64_t scale_tile_stride = 0, scale_row_stride = 1;
  int64_t rows = 0, columns = 0;
  void* out = nullptr;            // [rows, columns] bf16 or fp32
  Type out_type = Type::bf16;
  bool programmatic = true;
};
void unpack_e5m6(const UnpackArguments& arguments, hopper::Stream stream);

// ---- back to values: fp32 product with the scale, rounded to bf16 for bf16; exact in fp64 ---------------------------

struct DequantizeArguments {
  const void* q = nullptr;        // dense [batch, rows, columns] e4m3; for 128 x 1 its transpose, [columns, padded_rows]
  const float* scale = nullptr;
  int64_t batch = 1, rows = 0, columns = 0;
  int64_t scale_stride = 0;       // from 128 columns to the next; 128 x 1: from 128 rows to the next
  void* out = nullptr;            // dense [batch, rows, columns]
  Type out_type = Type::fp32;     // bf16, fp32 or fp64
  bool programmatic = true;
};
void dequantize_1x128(const DequantizeArguments& arguments, hopper::Stream stream);
void dequantize_128x128(const DequantizeArguments& arguments, hopper::Stream stream);   // dense scale
void dequantize_128x1(const DequantizeArguments& arguments, int64_t padded_rows, hopper::Stream stream);

}  // namespace quantize
