// D = A B^T of e4m3 operands with fine-grained scales, on the host: arguments, limits, launch (report 3.3); of one
// matrix, of groups of rows that meet a B each (fp8_gemm_grouped), of a padded batch (fp8_gemm_masked).
//
// The meaning, bit by bit (docs/numerics.md "FP8 GEMM"; deepseek_ops/reference/gemm.py with accumulation="hopper"):
// per 128 of K, ascending,   acc = fma(p, fl32(scale_a * scale_b), acc)   with p the tensor core's partial sum, then
// D = acc or D = D + acc in fp32, rounded once to D's type. The same bits come out for every tile, cluster and number
// of SMs, and in every run.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/tile_chooser.h"
#include "../hopper/launch.h"

enum class OutputType : uint8_t { bf16, fp32 };
constexpr int64_t bytes_of(OutputType type) { return type == OutputType::bf16 ? 2 : 4; }

struct Fp8GemmArguments {
  // A [m, k] and B [n, k], e4m3, k contiguous. Bytes between rows: a multiple of 16, as TMA asks.
  const void* a = nullptr;
  const void* b = nullptr;
  int64_t m = 0, n = 0, k = 0;
  int64_t a_stride = 0, b_stride = 0;

  // scale_a [ceil(k/128), m padded to 4], m contiguous: the layout that the quantiser writes; TMA loads it.
  // scale_b [ceil(n/128), ceil(k/128)]. Strides in elements between rows.
  const float* scale_a = nullptr;
  const float* scale_b = nullptr;
  int64_t scale_a_stride = 0, scale_b_stride = 0;

  // D [m, n], n contiguous, stride in elements. Any alignment is served; bf16 rows at multiples of 16 bytes fastest.
  void* d = nullptr;
  int64_t d_stride = 0;
  OutputType d_type = OutputType::bf16;
  bool accumulate = false;      // D = D + A B^T

  int32_t num_sms = 0;          // how many multiprocessors may be used; 0: all
  bool programmatic = true;     // start before the previous kernel of the stream has ended (PDL)

  // Instead of the cost model's choice: one of kFp8GemmTiles, and with it how a cluster shares loads.
  std::optional<TileShape> tile;
  std::optional<Multicast> multicast;
};

inline constexpr TileShape kFp8GemmTiles[] = {{256, 128}, {128, 256}, {128, 192}, {128, 160}, {128, 128},
                                              {128, 112}, {128, 96},  {64, 128},  {64, 256}};
inline constexpr int kFp8GemmTileCount = sizeof(kFp8GemmTiles) / sizeof(kFp8GemmTiles[0]);

// Launches on `stream`; never synchronises, allocates nothing. Throws before anything is launched, with a sentence
// that names the argument, the rule it broke and its value.
void fp8_gemm(const Fp8GemmArguments& arguments, hopper::Stream stream);

// The tile and cluster that the call would use.
TileChoice fp8_gemm_choice(const Fp8GemmArguments& arguments);

// ---- groups -----------------------------------------------------------------------------------------------------

// Every group has a B [n, k] and scales of its own; m is the number of rows of one A and one D.
//   fp8_gemm_grouped  one A and one D; rows of group g: offsets[g] .. offsets[g+1], no alignment
//   fp8_gemm_masked   an A, its scales and a D for each group; rows of group g: the first counts[g]
// What offsets and counts hold is known on the device alone. There it is clamped to 0 .. m, and an offset below an
// earlier one counts as that one: nonsense gives some product of some rows, within D.
struct Fp8GroupedGemmArguments : Fp8GemmArguments {
  int32_t groups = 0;                    // up to kFp8GemmMaxGroups; accumulate must be false
  const int32_t* offsets = nullptr;      // [groups + 1], on the device
  const int32_t* counts = nullptr;       // [groups], on the device
  bool clear_rest = false;               // rows of D that no group owns become zero; otherwise they are left alone

  // Elements between the matrices of two groups. Those of A and D: masked only.
  int64_t b_group_stride = 0, scale_b_group_stride = 0;
  int64_t a_group_stride = 0, scale_a_group_stride = 0, d_group_stride = 0;
};

inline constexpr int kFp8GemmMaxGroups = 512;

// Which of the dense tiles have grouped kernels. For the expert shapes of DeepSeek-V3 the cost model loses 0.1 % on
// average without the other three: 256 rows are too coarse for groups, and widths below 128 pay when one matrix fills
// the machine unevenly, which the tiles of many groups do not.
inline constexpr TileShape kFp8GroupedTiles[] = {{128, 256}, {128, 192}, {128, 160}, {128, 128}, {64, 128}, {64, 256}};

// As fp8_gemm: never synchronise, allocate nothing, throw before anything is launched.
void fp8_gemm_grouped(const Fp8GroupedGemmArguments& arguments, hopper::Stream stream);
void fp8_gemm_masked(const Fp8GroupedGemmArguments& arguments, hopper::Stream stream);
TileChoice fp8_gemm_grouped_choice(const Fp8GroupedGemmArguments& arguments);
TileChoice fp8_gemm_masked_choice(const Fp8GroupedGemmArguments& arguments);
