// D = A B^T for decoding: at most 64 rows of A, alone or in each group of a batch, on the host: arguments, limits, launch.
//
// The meaning, bit by bit (deepseek_ops/reference/modelled/gemm_decode.py): the S = ceil(K / 128) slices are divided among
// `split_k` ranges, range r from slice r S / split_k up to (r + 1) S / split_k, both rounded down. Each range accumulates
// as fp8_gemm does, from zero; the sums of the ranges are added in fp32, ascending; D is that, rounded once. So split_k = 1
// gives fp8_gemm's bits, and the bits of a row depend on no other row, on M, on the machine or on num_sms.
#pragma once

#include <cstdint>
#include <optional>

#include "../common/tensor.h"
#include "../hopper/launch.h"

inline constexpr int kDecodeRows = 64;      // of A, in each group: the columns of one wgmma
inline constexpr int kDecodeGroups = 512;   // of a batch, whose list a block keeps in shared memory

struct Fp8DecodeKnobs {
  int64_t split_k = 1;             // 1, 2, 4 or 8: CTAs of a cluster that divide K
  int64_t num_sms = 0;             // how many multiprocessors may be used, at least one cluster; 0: all
  bool prefetch_weights = false;   // load weights before the previous kernel has ended: it must not write B
  bool programmatic = true;        // start before the previous kernel of the stream has ended (PDL)
};

// One product.  a [m, k], b [n, k] e4m3; scale_a [ceil(k/128), m padded to 4], scale_b [ceil(n/128), ceil(k/128)] fp32;
// d [m, n] bf16 or fp32. Rows are contiguous; those of a, b and scale_a start at multiples of 16 bytes, as TMA asks.
//
// Launches on `stream`; never synchronises, allocates nothing. Throws before anything is launched, with a sentence that
// names the argument, the rule it broke and its value.
void fp8_gemm_decode(hopper::Stream stream, const TensorView& a, const TensorView& scale_a, const TensorView& b,
                     const TensorView& scale_b, const TensorView& d, const Fp8DecodeKnobs& knobs);

// A batch: every tensor has one more dimension in front, of at most 512 groups, and masked_m [groups] int32 on the device
// says how many rows of each exist. Other rows of D become zero if `fill`, else stay as they are, and then a group
// without rows costs nothing. split_k is 1; a batch cannot be prefetched, for masked_m says whose weights are wanted.
void fp8_gemm_masked_decode(hopper::Stream stream, const TensorView& a, const TensorView& scale_a, const TensorView& b,
                            const TensorView& scale_b, const TensorView& masked_m, const TensorView& d, bool fill,
                            const Fp8DecodeKnobs& knobs);
