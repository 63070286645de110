// SwiGLU on plain pointers. Every function launches on `stream`, allocates nothing, never synchronises, and throws before
// anything is launched with a sentence that names the argument, the rule it broke and its value. Strides count elements.
// Outputs are dense.
#pragma once

#include "../quantize/quantize.h"

namespace activation {

using quantize::Matrix;
using quantize::Type;

struct RowWeight {                // [rows] fp32; no data: ones
  const float* data = nullptr;
  int64_t stride = 1;
};

// y = ((gate sigmoid(gate)) up) weight, rounded to gate_up's type; with q and scale instead of y its 1 x 128 codes.
struct SwigluArguments {
  Matrix gate_up;                 // [rows, 2 I] bf16 or fp32, gate first
  RowWeight weight;
  void* y = nullptr;              // [rows, I]; null when q is given
  void* q = nullptr;
  float* scale = nullptr;
  bool pow2 = false;
  bool programmatic = true;       // may start before the previous kernel of the stream has ended (PDL)
};
void swiglu(const SwigluArguments& arguments, hopper::Stream stream);

struct SwigluBackwardArguments {
  Matrix dy, gate_up;             // [rows, I], [rows, 2 I] of one type
  RowWeight weight;
  void* dgate_up = nullptr;       // [rows, 2 I]
  float* dweight = nullptr;       // [rows], exactly when there is a weight
  bool programmatic = true;
};
void swiglu_backward(const SwigluBackwardArguments& arguments, hopper::Stream stream);

// swiglu_backward in bf16, and what the GEMMs behind it read: dgate_up in 1 x 128 tiles and, transposed, in 128 x 1 tiles;
// the activation once more, transposed, in 128 x 1 tiles. I is a multiple of 128. gate_up may be e4m3 with 1 x 128 scales:
// its values are then their products, rounded to bf16.
struct SwigluBackwardQuantizeArguments {
  Matrix dy;                      // bf16 [rows, I], rows at multiples of 16 bytes
  Matrix gate_up;                 // bf16 [rows, 2 I], likewise; or e4m3, rows at multiples of 8 bytes
  const float* gate_up_scale = nullptr;   // e4m3 only: [2 I / 128, gate_up_scale_stride], rows contiguous
  int64_t gate_up_scale_stride = 0;
  RowWeight weight;

  // Groups of rows, each padded to 128 on its own, as quantize::ColumnsArguments has them.
  const int32_t* offsets = nullptr;
  int32_t* padded_offsets = nullptr;
  int64_t groups = 0;

  int64_t padded_rows = 0;
  void* q = nullptr;              // [rows, 2 I]
  float* scale = nullptr;
  void* q_t = nullptr;            // [2 I, padded_rows]
  float* scale_t = nullptr;
  void* act_t = nullptr;          // [I, padded_rows]
  float* act_scale_t = nullptr;
  float* dweight = nullptr;       // [rows], exactly when there is a weight, by way of
  double* workspace = nullptr;    // fp64 [I / 128, rows]
  bool pow2 = false;
  bool programmatic = true;
};
void swiglu_backward_quantize(const SwigluBackwardQuantizeArguments& arguments, hopper::Stream stream);

}  // namespace activation
