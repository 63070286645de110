// The optimizer step on the host: arguments, limits, launches (report 3.2.3, 3.3.3). What is computed, to the bit:
// deepseek_ops/optimizer.py and docs/numerics.md; how: README.md beside this file.
//
// Every function launches on `stream`, allocates nothing, never synchronises, and throws before anything is launched.
// Tensors are dense; any alignment is right, 16 bytes (8 of bf16 moments and parameters) are fast.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../hopper/launch.h"

namespace optimizer {

enum class Type : uint8_t { bf16, fp32, fp64 };

// ---- AdamW ---------------------------------------------------------------------------------------------------------

struct AdamwTensor {
  float* param = nullptr;            // fp32 master
  const void* grad = nullptr;        // fp32 or bf16
  void* exp_avg = nullptr;           // fp32 or bf16
  void* exp_avg_sq = nullptr;        // fp32 or bf16
  hopper::bf16* out = nullptr;       // the model's parameter, or null
  Type grad_type = Type::fp32, exp_avg_type = Type::bf16, exp_avg_sq_type = Type::bf16;
  int64_t count = 0;                 // elements
  double weight_decay = 0;

  // adamw_quantize only: FP8 copies of the new master as `batch` matrices [rows, columns]; batch * rows * columns is count.
  bool quantized = false;
  int64_t batch = 1, rows = 0, columns = 0;
  void* q = nullptr;                 // e4m3, of the master's shape
  float* scale = nullptr;            // [batch, ceil(rows/128), ceil(columns/128)]
  void* q_t = nullptr;               // the transposed copy of both, or null
  float* scale_t = nullptr;
};

struct AdamwArguments {
  const AdamwTensor* tensors = nullptr;
  size_t tensor_count = 0;
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  int64_t step = 1;
  double grad_scale = 1;
  const float* grad_scale_tensor = nullptr;   // on the device, instead of grad_scale; not finite: nothing is changed
  bool stochastic_rounding = false;           // of bf16 moments
  int64_t seed = 0, first_index = 0;          // of the noise: position of the first tensor's first element
  bool pow2 = false;                          // scales of FP8 copies
  bool programmatic = true;                   // may start before the previous kernel of the stream has ended (PDL)
};
void adamw(const AdamwArguments& arguments, hopper::Stream stream);            // of tensors that are not `quantized`
void adamw_quantize(const AdamwArguments& arguments, hopper::Stream stream);   // of all; copies even where a step is skipped

// ---- the gradient norm ---------------------------------------------------------------------------------------------

constexpr int64_t kNormPartials = 8192;      // fp64 numbers of workspace, any content; waves of blocks enough on any GPU

struct NormTensor {
  const void* data = nullptr;
  Type type = Type::fp32;
  int64_t count = 0;
};

struct NormArguments {
  const NormTensor* tensors = nullptr;
  size_t tensor_count = 0;
  double max_norm = 0;
  double* partials = nullptr;        // [kNormPartials]
  float* norm = nullptr;             // one number each
  float* scale = nullptr;
  bool programmatic = true;
};
void clip_grad_norm(const NormArguments& arguments, hopper::Stream stream);

}  // namespace optimizer
