// Four neighbouring elements of a dense array of fp32 or bf16: how the kernels here read and write.
//
// Why four: an fp32 group is 16 bytes and a bf16 group 8, so that 32 lanes cover 512 or 256 contiguous bytes whatever
// mixture of types an element's arrays have. Eight would leave holes of 16 bytes between the lanes' fp32 pieces.
#pragma once

#include <type_traits>

#include "../hopper/front.h"
#include "optimizer.h"

namespace optimizer_kernels {

using hopper::bf16;

constexpr int kGroup = 4;

// As it lies in memory: 4 words of fp32, or 2 of bf16.
template <class T>
struct Group {
  static constexpr int kWords = kGroup * sizeof(T) / 4;
  using Vector = std::conditional_t<sizeof(T) == 4, uint4, uint2>;

  uint32_t words[kWords];

  HOPPER_DEVICE float value(int i) const {
    if constexpr (sizeof(T) == 4) return hopper::bits_float(words[i]);
    else return hopper::bits_float(i % 2 ? words[i / 2] & 0xFFFF0000 : words[i / 2] << 16);
  }

  // kVector: all four exist, and lie at a multiple of their common size; otherwise `present` of them do.
  template <bool kVector>
  HOPPER_DEVICE void load(const T* at, int present) {
    if constexpr (kVector) {
      const Vector v = hopper::load_stream(reinterpret_cast<const Vector*>(at));
      memcpy(words, &v, sizeof(v));
    } else {
      HOPPER_UNROLL for (uint32_t& word : words) word = 0;
      HOPPER_UNROLL for (int i = 0; i < kGroup; ++i) {
        if (i >= present) continue;
        if constexpr (sizeof(T) == 4) words[i] = hopper::float_bits(at[i]);
        else words[i / 2] |= uint32_t{at[i].bits} << (16 * (i % 2));
      }
    }
  }

  template <bool kVector>
  HOPPER_DEVICE void store(T* at, int present) const {
    if constexpr (kVector) {
      Vector v;
      memcpy(&v, words, sizeof(v));
      hopper::store_stream(reinterpret_cast<Vector*>(at), v);
    } else {
      HOPPER_UNROLL for (int i = 0; i < kGroup; ++i) {
        if (i >= present) continue;
        if constexpr (sizeof(T) == 4) at[i] = hopper::bits_float(words[i]);
        else at[i].bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      }
    }
  }

  static HOPPER_DEVICE Group of(const float (&values)[kGroup]) {   // to nearest even
    Group group;
    HOPPER_UNROLL for (int i = 0; i < kWords; ++i) {
      if constexpr (sizeof(T) == 4) group.words[i] = hopper::float_bits(values[i]);
      else group.words[i] = hopper::pack_bf16(values[2 * i], values[2 * i + 1]);
    }
    return group;
  }
};

}  // namespace optimizer_kernels
