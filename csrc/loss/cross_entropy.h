// Cross entropy of a linear head and its gradients without the matrix of logits, on the host: products by bf16_gemm, one
// chunk of the vocabulary after the other, and small kernels between them. The meaning, bit by bit: docs/numerics.md
// "Cross entropy of the output head" and deepseek_ops/reference/modelled/loss.py.
#pragma once

#include <cstdint>

#include "../hopper/launch.h"
#include "../hopper/types.h"

// bf16, as Bf16Operand asks (bf16_gemm.h): one dimension contiguous, the rest at multiples of 16 bytes.
struct LossMatrix {
  const hopper::bf16* data = nullptr;
  int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 0;
};

struct CrossEntropyArguments {
  LossMatrix h, weight;            // [tokens, width], [classes, width]
  const int64_t* labels = nullptr; // [tokens]: a class, or -100 for a token that does not count
  int64_t labels_stride = 1;
  const float* dloss = nullptr;    // [tokens], of each token's loss; null: 1
  int64_t dloss_stride = 1;

  float* token_loss = nullptr;     // [tokens], an output or workspace
  float* loss = nullptr;           // the sum; may be null
  hopper::bf16* dh = nullptr;      // [tokens, width], contiguous; null: not needed
  hopper::bf16* dweight = nullptr; // [classes, width], contiguous; null: not needed

  // Workspace. chunk: classes at a time, a multiple of 8 or all; rows of logits and dlogits are `stride` elements apart,
  // a multiple of 8 and at least chunk.
  int64_t chunk = 0, stride = 0;
  float* logits = nullptr;         // [tokens, stride]
  hopper::bf16* dlogits = nullptr; // [tokens, stride], for gradients
  float* dh_sum = nullptr;         // [tokens, width], for dh
  float* largest = nullptr;        // [tokens], and the next two
  double* sum = nullptr;
  float* at_label = nullptr;

  bool programmatic = true;        // start kernels before the previous one of the stream has ended (PDL)
};

// Launches on `stream`; never synchronises, allocates nothing. Throws before anything is launched.
void linear_cross_entropy(const CrossEntropyArguments& arguments, hopper::Stream stream);
