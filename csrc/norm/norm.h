// RMSNorm on plain pointers. Every function launches on `stream`, allocates nothing, never synchronises, and throws
// before anything is launched with a sentence that names the argument, the rule it broke and its value. Strides count
// elements. Outputs are dense.
#pragma once

#include "../quantize/quantize.h"

namespace norms {

using quantize::Matrix;
using quantize::Type;

struct Weight {                   // [columns]
  const void* data = nullptr;
  Type type = Type::bf16;         // bf16 or fp32, whatever x is
  int64_t stride = 1;
};

// y = (x rstd) weight with rstd = 1 / sqrt(mean(x^2) + eps) of each row, rounded to x's type; with q and scale instead
// of y the 1 x 128 codes of that. With a residual, x + residual (rounded, returned in new_residual) takes x's place.
struct RmsNormArguments {
  Matrix x;                       // bf16 or fp32
  Matrix residual;                // of x's type and shape; no data: none
  Weight weight;
  double eps = 1e-6;
  void* y = nullptr;              // [rows, columns] of x's type; null when q is given
  void* new_residual = nullptr;   // exactly when there is a residual
  float* rstd = nullptr;          // [rows]
  void* q = nullptr;              // e4m3, with its GEMM-ready scale
  float* scale = nullptr;
  bool pow2 = false;
  bool programmatic = true;       // may start before the previous kernel of the stream has ended (PDL)
};
void rms_norm(const RmsNormArguments& arguments, hopper::Stream stream);

// dx = (dy weight - x dot rstd^2 / columns) rstd [+ dresidual] with dot = sum over the row of dy x weight, and
// dweight = sum over rows of dy x rstd, by way of `workspace`: fp64 [parts, columns padded to 512]. Parts are summed by
// different blocks at once: any number will do, and as many as blocks that run at the same time is best.
struct RmsNormBackwardArguments {
  Matrix dy, x;                   // of one type, bf16 or fp32
  Matrix dresidual;               // no data: none
  Weight weight;
  const float* rstd = nullptr;    // [rows]
  void* dx = nullptr;             // [rows, columns] of x's type
  void* dweight = nullptr;        // [columns] of weight's type
  double* workspace = nullptr;
  int64_t parts = 0;
  bool programmatic = true;
};
void rms_norm_backward(const RmsNormBackwardArguments& arguments, hopper::Stream stream);

}  // namespace norms
