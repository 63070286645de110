// D = A B^T over tokens, both operands e4m3 and stored transposed with a scale for each channel and 128 tokens: the
// gradient of weights (report 3.3), of one matrix or of every expert over its own tokens. Arguments, limits, launch.
//
// The meaning, bit by bit (docs/numerics.md "FP8 GEMM"; deepseek_ops/reference/gemm.py with accumulation="hopper"):
// per 128 tokens, ascending,   acc = fma(p, fl32(scale_a * scale_b), acc)   with p the tensor core's partial sum, then
// D = acc or D = D + acc in fp32, rounded once to D's type. The same bits come out for every tile, cluster and number
// of SMs, and in every run.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/tile_chooser.h"
#include "../hopper/launch.h"
#include "fp8_gemm.h"

struct Fp8WgradArguments {
  // A [m, tokens] and B [n, tokens], e4m3, tokens contiguous. Bytes between rows: a multiple of 16, as TMA asks.
  const void* a = nullptr;
  const void* b = nullptr;
  int64_t m = 0, n = 0, tokens = 0;
  int64_t a_stride = 0, b_stride = 0;

  // [ceil(tokens/128), m or n padded to 4], channels contiguous: the layout that the quantiser writes. Strides in
  // elements between rows, multiples of 4.
  const float* scale_a = nullptr;
  const float* scale_b = nullptr;
  int64_t scale_a_stride = 0, scale_b_stride = 0;

  // null: one group over all tokens. Otherwise [groups + 1] on the device: group g owns tokens offsets[g] to
  // offsets[g+1], multiples of 128. Of anything else only the whole slices that exist count; descending: none.
  const int32_t* offsets = nullptr;
  int64_t groups = 1;

  // D [groups, m, n], n contiguous, strides in elements. Any alignment is served; bf16 rows at multiples of 16 bytes
  // fastest. A group without tokens gives zeros; accumulating into one of `offsets` touches nothing.
  void* d = nullptr;
  int64_t d_stride = 0, d_group_stride = 0;
  OutputType d_type = OutputType::fp32;
  bool accumulate = false;      // D = D + A B^T

  int32_t num_sms = 0;          // how many multiprocessors may be used; 0: all
  bool programmatic = true;     // start before the previous kernel of the stream has ended (PDL)

  // Instead of the cost model's choice: one of kFp8WgradTiles, and with it how a cluster shares loads.
  std::optional<TileShape> tile;
  std::optional<Multicast> multicast;
};

inline constexpr TileShape kFp8WgradTiles[] = {{128, 192}, {128, 160}, {128, 128}, {64, 128}};
inline constexpr int kFp8WgradTileCount = sizeof(kFp8WgradTiles) / sizeof(kFp8WgradTiles[0]);

// Launches on `stream`; never synchronises, allocates nothing. Throws before anything is launched, with a sentence
// that names the argument, the rule it broke and its value.
void fp8_wgrad(const Fp8WgradArguments& arguments, hopper::Stream stream);

// The tile and cluster that the call would use.
TileChoice fp8_wgrad_choice(const Fp8WgradArguments& arguments);
