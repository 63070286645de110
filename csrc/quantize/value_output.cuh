// Values on their way out of fp8 and E5M6: 16 bytes of bf16, fp32 or fp64 at once, or single elements.
#pragma once

#include "../hopper/front.h"

namespace quantize_kernels {

HOPPER_DEVICE void set(hopper::bf16& to, float x) { to = hopper::to_bf16(x); }
HOPPER_DEVICE void set(float& to, float x) { to = x; }
HOPPER_DEVICE void set(double& to, double x) { to = x; }

// Values of one thread, of which `present` exist; kVector: all do, and `out` is a multiple of 16 bytes.
template <bool kVector, class Out, class Value, int kValues>
HOPPER_DEVICE void store_values(Out* out, const Value (&values)[kValues], int present) {
  static_assert(kValues * sizeof(Out) == 16);
  struct alignas(16) Piece { Out values[kValues]; } piece;
  HOPPER_UNROLL
  for (int i = 0; i < kValues; ++i) set(piece.values[i], values[i]);
  if constexpr (kVector) {
    hopper::store_stream(reinterpret_cast<Piece*>(out), piece);
  } else {
    HOPPER_UNROLL
    for (int i = 0; i < kValues; ++i)
      if (i < present) out[i] = piece.values[i];
  }
}

}  // namespace quantize_kernels
