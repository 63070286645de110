// The quantisers on tensors: one function for each op of deepseek_ops/quantize.py (those with and without groups are
// one), inputs first, then the outputs that the op has allocated.
#pragma once

#include <string>

#include "../common/tensor.h"
#include "../hopper/launch.h"

namespace quantize {

void bind_1x128(const TensorView& x, const TensorView& q, const TensorView& scale, bool pow2, bool official_clamp,
                hopper::Stream stream);
void bind_128x1(const TensorView& x, const OptionalTensor& offsets, const TensorView& q_t, const TensorView& scale_t,
                const OptionalTensor& padded_offsets, bool pow2, hopper::Stream stream);
void bind_1x128_128x1(const TensorView& x, const OptionalTensor& offsets, const TensorView& q, const TensorView& scale,
                      const TensorView& q_t, const TensorView& scale_t, const OptionalTensor& padded_offsets, bool pow2,
                      hopper::Stream stream);
void bind_requantize_128x1(const TensorView& q, const TensorView& scale, const OptionalTensor& offsets,
                           const TensorView& q_t, const TensorView& scale_t, const OptionalTensor& padded_offsets,
                           hopper::Stream stream);
void bind_128x128(const TensorView& w, const TensorView& q, const TensorView& scale, const OptionalTensor& q_t,
                  const OptionalTensor& scale_t, bool pow2, hopper::Stream stream);
void bind_transpose_128x128(const TensorView& q, const TensorView& scale, const TensorView& q_t,
                            const TensorView& scale_t, hopper::Stream stream);

void bind_pack_e5m6(const TensorView& x, const TensorView& packed, const TensorView& scale, const std::string& granularity,
                    hopper::Stream stream);
void bind_unpack_e5m6(const TensorView& packed, const TensorView& scale, int64_t hidden, const std::string& granularity,
                      const TensorView& out, hopper::Stream stream);
void bind_requantize_e5m6_128x1(const TensorView& packed, const TensorView& scale, int64_t hidden, const OptionalTensor& offsets,
                                const TensorView& q_t, const TensorView& scale_t, const OptionalTensor& padded_offsets,
                                hopper::Stream stream);
void bind_dequantize_1x128(const TensorView& q, const TensorView& scale, const TensorView& out, hopper::Stream stream);
void bind_dequantize_128x1(const TensorView& q_t, const TensorView& scale, int64_t tokens, const TensorView& out,
                           hopper::Stream stream);
void bind_dequantize_128x128(const TensorView& q, const TensorView& scale, const TensorView& out, hopper::Stream stream);

}  // namespace quantize
