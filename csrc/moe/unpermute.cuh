// Rows back to their tokens, and the gradient. A block a token; a thread takes units of 8 neighbouring columns, which
// are 16 bytes of bf16 and a group of docs/numerics.md, "Sums".
#pragma once

#include "../common/sums.h"

namespace moe_kernels {

constexpr int kUnpermuteThreads = 128;
constexpr int kUnpermuteWarps = kUnpermuteThreads / 32;

// The inverse of `source`. Nonsense in it writes nothing outside, and may leave rows that nobody named.
HOPPER_KERNEL(256) invert_kernel(const int64_t* source, int64_t stride, int64_t rows, int32_t* row_of_slot) {
  const int64_t row = int64_t{blockIdx.x} * 256 + threadIdx.x;
  hopper::grid_dependency_wait();
  if (row >= rows) return;
  const int64_t slot = source[row * stride];
  hopper::grid_dependency_launch();
  if (slot >= 0 && slot < rows) row_of_slot[slot] = static_cast<int32_t>(row);
}

// What stands there is a row, whatever was in `source`.
HOPPER_DEVICE int64_t clamped(int32_t row, int64_t rows) { return row >= 0 && row < rows ? row : 0; }

HOPPER_DEVICE float to_fp32(float x) { return x; }
HOPPER_DEVICE float to_fp32(hopper::bf16 x) { return hopper::to_float(x); }

// Eight neighbours of a row as they lie in memory.
template <class T, bool kVector>
struct Unit;

template <bool kVector>
struct Unit<hopper::bf16, kVector> {
  uint4 words;
  HOPPER_DEVICE void values(float (&v)[8]) const {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    HOPPER_UNROLL for (int i = 0; i < 4; ++i) {
      const float2 pair = hopper::bf16x2_to_float2(w[i]);
      v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
  }
  HOPPER_DEVICE void set(const float (&v)[8]) {
    words = {hopper::pack_bf16(v[0], v[1]), hopper::pack_bf16(v[2], v[3]), hopper::pack_bf16(v[4], v[5]),
             hopper::pack_bf16(v[6], v[7])};
  }
  HOPPER_DEVICE void load(const hopper::bf16* row, int64_t column, int64_t stride, int64_t columns) {
    if constexpr (kVector) {
      words = hopper::load_vector<uint4>(row + column);
    } else {
      uint32_t bits[8];
      HOPPER_UNROLL for (int i = 0; i < 8; ++i) bits[i] = column + i < columns ? row[(column + i) * stride].bits : 0u;
      words = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16};
    }
  }
  HOPPER_DEVICE void store(hopper::bf16* row, int64_t column, int64_t columns) const {
    if constexpr (kVector) {
      hopper::store_vector(row + column, words);
    } else {
      const uint32_t w[4] = {words.x, words.y, words.z, words.w};
      HOPPER_UNROLL for (int i = 0; i < 8; ++i)
        if (column + i < columns) row[column + i] = {static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2)))};
    }
  }
};

template <bool kVector>
struct Unit<float, kVector> {
  float v_[8];
  HOPPER_DEVICE void values(float (&v)[8]) const { HOPPER_UNROLL for (int i = 0; i < 8; ++i) v[i] = v_[i]; }
  HOPPER_DEVICE void set(const float (&v)[8]) { HOPPER_UNROLL for (int i = 0; i < 8; ++i) v_[i] = v[i]; }
  // With vectors `columns` is a multiple of 4: half a unit may end the row.
  HOPPER_DEVICE void load(const float* row, int64_t column, int64_t stride, int64_t columns) {
    if constexpr (kVector) {
      HOPPER_UNROLL for (int i = 0; i < 8; i += 4) {
        const float4 four = column + i < columns ? hopper::load_vector<float4>(row + column + i) : float4{};
        v_[i] = four.x, v_[i + 1] = four.y, v_[i + 2] = four.z, v_[i + 3] = four.w;
      }
    } else {
      HOPPER_UNROLL for (int i = 0; i < 8; ++i) v_[i] = column + i < columns ? row[(column + i) * stride] : 0.0f;
    }
  }
  HOPPER_DEVICE void store(float* row, int64_t column, int64_t columns) const {
    if constexpr (kVector) {
      HOPPER_UNROLL for (int i = 0; i < 8; i += 4)
        if (column + i < columns) hopper::store_vector(row + column + i, float4{v_[i], v_[i + 1], v_[i + 2], v_[i + 3]});
    } else {
      HOPPER_UNROLL for (int i = 0; i < 8; ++i)
        if (column + i < columns) row[column + i] = v_[i];
    }
  }
};

struct UnpermuteParams {
  const void* y;
  int64_t row_stride, column_stride;
  const float* weights;      // or null: ones
  int64_t weights_strides[2];
  const int32_t* row_of_slot;
  int64_t rows, columns;
  int32_t top_k;
  void* out;                 // [tokens, columns]
};

// acc = fma(weight, y, acc), slot after slot from 0; without weights acc + y. Rows of some slots are in flight together.
template <class T, bool kVector, bool kWeighted>
HOPPER_KERNEL_BLOCKS(kUnpermuteThreads, 6) unpermute_kernel(const UnpermuteParams p) {
  constexpr int kSlots = sizeof(T) == 2 ? 8 : 4;
  const int64_t token = blockIdx.x;
  T* out = static_cast<T*>(p.out) + token * p.columns;

  hopper::grid_dependency_wait();
  const int32_t* rows = p.row_of_slot + token * p.top_k;
  const float* weights = kWeighted ? p.weights + token * p.weights_strides[0] : nullptr;
  for (int64_t column = 8 * int64_t{threadIdx.x}; column < p.columns; column += 8 * kUnpermuteThreads) {
    float sum[8] = {};
    for (int32_t first = 0; first < p.top_k; first += kSlots) {
      Unit<T, kVector> units[kSlots];
      HOPPER_UNROLL for (int s = 0; s < kSlots; ++s) {
        if (first + s >= p.top_k) continue;
        const T* row = static_cast<const T*>(p.y) + clamped(rows[first + s], p.rows) * p.row_stride;
        units[s].load(row, column, p.column_stride, p.columns);
      }
      HOPPER_UNROLL for (int s = 0; s < kSlots; ++s) {
        if (first + s >= p.top_k) continue;
        float v[8];
        units[s].values(v);
        if constexpr (kWeighted) {
          const float weight = weights[(first + s) * p.weights_strides[1]];
          HOPPER_UNROLL for (int i = 0; i < 8; ++i) sum[i] = hopper::fma(weight, v[i], sum[i]);
        } else {
          HOPPER_UNROLL for (int i = 0; i < 8; ++i) sum[i] = hopper::add_rn(sum[i], v[i]);
        }
      }
    }
    Unit<T, kVector> result;
    result.set(sum);
    result.store(out, column, p.columns);
  }
  hopper::grid_dependency_launch();
}

struct UnpermuteBackwardParams {
  const void *dout, *y;
  int64_t dout_strides[2], y_strides[2];
  const float* weights;
  int64_t weights_strides[2];
  const int32_t* row_of_slot;
  int64_t rows, columns;
  int32_t top_k;
  void* dy;                  // [rows, columns]
  float* dweights;           // [tokens, top_k]
};

// dy = dout * weight; dweight = the dot product of dout and y. The token's gradient comes from L1 after the first slot.
template <class T, bool kVector>
HOPPER_KERNEL_BLOCKS(kUnpermuteThreads, 6) unpermute_backward_kernel(const UnpermuteBackwardParams p) {
  constexpr int kUnits = sizeof(T) == 2 ? 4 : 2;
  const int64_t token = blockIdx.x;
  const T* dout = static_cast<const T*>(p.dout) + token * p.dout_strides[0];
  auto* partial = reinterpret_cast<double*>(hopper::dynamic_smem());   // [top_k, warps]

  hopper::grid_dependency_wait();
  for (int32_t slot = 0; slot < p.top_k; ++slot) {
    const int64_t row = clamped(p.row_of_slot[token * p.top_k + slot], p.rows);
    const float weight = p.weights[token * p.weights_strides[0] + slot * p.weights_strides[1]];
    const T* y = static_cast<const T*>(p.y) + row * p.y_strides[0];
    T* dy = static_cast<T*>(p.dy) + row * p.columns;
    double sum = 0;
    for (int64_t first = 8 * int64_t{threadIdx.x}; first < p.columns; first += 8 * kUnpermuteThreads * kUnits) {
      Unit<T, kVector> of_y[kUnits], of_dout[kUnits];
      HOPPER_UNROLL for (int u = 0; u < kUnits; ++u) {   // all loads before any store
        const int64_t column = first + u * 8 * kUnpermuteThreads;
        if (column >= p.columns) continue;
        of_y[u].load(y, column, p.y_strides[1], p.columns);
        of_dout[u].load(dout, column, p.dout_strides[1], p.columns);
      }
      HOPPER_UNROLL for (int u = 0; u < kUnits; ++u) {
        const int64_t column = first + u * 8 * kUnpermuteThreads;
        if (column >= p.columns) continue;
        float grad[8], term[8];
        of_dout[u].values(grad);
        of_y[u].values(term);
        HOPPER_UNROLL for (int i = 0; i < 8; ++i) {
          term[i] = hopper::mul_rn(grad[i], term[i]);
          grad[i] = hopper::mul_rn(grad[i], weight);
        }
        sum += sum_of_8(term);
        of_dout[u].set(grad);
        of_dout[u].store(dy, column, p.columns);
      }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) partial[slot * kUnpermuteWarps + threadIdx.x / 32] = sum;
  }
  hopper::grid_dependency_launch();
  hopper::block_sync();
  for (int32_t slot = static_cast<int32_t>(threadIdx.x); slot < p.top_k; slot += kUnpermuteThreads) {
    double sum = 0;
    HOPPER_UNROLL for (int w = 0; w < kUnpermuteWarps; ++w) sum += partial[slot * kUnpermuteWarps + w];
    p.dweights[token * p.top_k + slot] = static_cast<float>(sum);
  }
}

}  // namespace moe_kernels
