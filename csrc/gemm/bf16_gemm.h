// D = A B^T of bf16 operands with either dimension contiguous, on the host: arguments, limits, launch.
//
// The meaning, bit by bit (deepseek_ops/reference/modelled/bf16_gemm.py): one accumulator of the tensor core over all of
// K in ascending steps of 16, the last one filled up with zeros; then D = acc or D = D + acc in fp32, rounded once to D's
// type. The same bits come out for every tile, cluster and number of SMs, and in every run.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/tensor.h"
#include "../common/tile_chooser.h"
#include "../hopper/launch.h"
#include "bf16_work.h"

// A batch of matrices [rows, k], strides in elements. TMA reads it where it lies: one of the two dimensions is
// contiguous, every other stride (and the base) a multiple of 16 bytes.
struct Bf16Operand {
  const void* data = nullptr;
  int64_t rows = 0, row_stride = 0, k_stride = 0;
  int64_t matrices = 1, matrix_stride = 0;
};

struct Bf16GemmArguments {
  Bf16Operand a, b;             // rows are M and N
  int64_t k = 0;

  // D [m, n], or [groups, m, n] of grouping by mask and of groups of K; n contiguous, any alignment is served,
  // bf16 rows at multiples of 16 bytes fastest.
  void* d = nullptr;
  Dtype d_type = Dtype::bf16;   // or f32
  int64_t d_stride = 0, d_matrix_stride = 0;
  bool accumulate = false;      // D = D + A B^T; groups without K are left alone
  bool clear_rest = false;      // rows that no group owns become zero instead of staying as they are

  Grouping grouping = Grouping::none;
  const int32_t* index = nullptr;   // on the device: offsets [groups + 1] or counts [groups]
  int64_t groups = 1;

  int32_t num_sms = 0;          // how many multiprocessors may be used; 0: all
  bool programmatic = true;     // start before the previous kernel of the stream has ended (PDL)

  // Instead of the cost model's choice: one of kBf16GemmTiles, and with it how a cluster shares loads.
  std::optional<TileShape> tile = std::nullopt;
  std::optional<Multicast> multicast = std::nullopt;
};

inline constexpr TileShape kBf16GemmTiles[] = {{256, 128}, {128, 256}, {128, 192}, {128, 128}, {64, 256}, {64, 128}};
inline constexpr int kBf16GemmTileCount = sizeof(kBf16GemmTiles) / sizeof(kBf16GemmTiles[0]);

// Launches on `stream`; never synchronises, allocates nothing. Throws before anything is launched, with a sentence
// that names the argument, the rule it broke and its value.
void bf16_gemm(const Bf16GemmArguments& arguments, hopper::Stream stream);

// The tile and cluster that the call would use.
TileChoice bf16_gemm_choice(const Bf16GemmArguments& arguments);
