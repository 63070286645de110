// What both kernels of the step share on the host: checks, the constants of a step, the list cut into launches.
#pragma once

#include <cmath>

#include "../common/checks.h"
#include "../common/launch_config.h"
#include "adamw.cuh"

namespace optimizer {

using namespace optimizer_kernels;

constexpr int64_t kWeightTile = 128;

// Of a weight whose FP8 copies the step leaves.
inline void check_copies(const AdamwTensor& t) {
  if (!t.quantized) return;
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  require(t.batch >= 0 && t.rows >= 0 && t.columns >= 0, "params", "must not have a negative size", t.count);
  if (t.batch == 0 || t.rows == 0 || t.columns == 0) {
    require(t.count == 0, "params", "must have batch * rows * columns elements", t.count);
    return;
  }
  require(t.rows <= kMost, "params", "must have fewer than 2^31 rows", t.rows);
  require(t.columns <= kMost, "params", "must have fewer than 2^31 columns", t.columns);
  const int64_t tiles = ceil_div(t.rows, kWeightTile) * ceil_div(t.columns, kWeightTile);
  require(t.batch <= kMost / tiles, "params", "must have fewer than 2^31 tiles of 128 x 128", t.batch);
  require(t.count == t.batch * t.rows * t.columns, "params", "must have batch * rows * columns elements", t.count);
  require(t.q != nullptr, "q", "must not be null unless it is empty", "a null pointer");
  require(t.scale != nullptr && is_aligned(t.scale, 4), "scale", "must be aligned to its elements", t.scale);
  require((t.q_t == nullptr) == (t.scale_t == nullptr), "scale_t", "must be null exactly when q_t is", t.scale_t);
  require(is_aligned(t.scale_t, 4), "scale_t", "must be aligned to its elements", t.scale_t);
}

inline void check(const AdamwArguments& a) {
  require(a.step >= 1, "step", "must be at least 1", a.step);
  require(a.first_index >= 0, "first_index", "must not be negative", a.first_index);
  for (size_t i = 0; i < a.tensor_count; ++i) {
    const AdamwTensor& t = a.tensors[i];
    require(t.count >= 0, "params", "must not have a negative number of elements", t.count);
    require(ceil_div(t.count, kAdamwChunk) < int64_t{1} << 31, "params",
            "must have fewer than 2^31 chunks of 2048 elements each", t.count);
    check_copies(t);
    if (t.count == 0) continue;
    const auto check_array = [](const char* name, const void* p, Type type) {
      require(p != nullptr, name, "must not be null unless it is empty", "a null pointer");
      require(type != Type::fp64, name, "must be fp32 or bf16", "fp64");
      require(is_aligned(p, type == Type::fp32 ? 4 : 2), name, "must be aligned to its elements", p);
    };
    check_array("params", t.param, Type::fp32);
    check_array("grads", t.grad, t.grad_type);
    check_array("exp_avg", t.exp_avg, t.exp_avg_type);
    check_array("exp_avg_sq", t.exp_avg_sq, t.exp_avg_sq_type);
    require(is_aligned(t.out, 2), "out", "must be aligned to its elements", static_cast<const void*>(t.out));
  }
}

inline uint32_t noise_key(int64_t seed, int64_t step) {
  uint32_t key = 0;
  for (const int64_t word : {seed, seed >> 32, step, step >> 32}) key = next_key(key, static_cast<uint32_t>(word));
  return key;
}

// Constants are rounded from double once, as torch rounds a Python number to the tensor's type.
inline AdamwStep step_of(const AdamwArguments& a) {
  const auto step = static_cast<double>(a.step);
  AdamwStep s{};
  s.grad_scale = static_cast<float>(a.grad_scale);
  s.beta1 = static_cast<float>(a.beta1);
  s.one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  s.beta2 = static_cast<float>(a.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  s.denominator_scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(a.beta2, step)));
  s.eps = static_cast<float>(a.eps);
  s.step_size = static_cast<float>(a.lr / (1.0 - std::pow(a.beta1, step)));
  s.noise_key = noise_key(a.seed, a.step);
  s.stochastic_rounding = a.stochastic_rounding;
  return s;
}

// The list is cut by the types of its tensors: each mixture has a kernel of its own.
inline constexpr int kKinds = 8;
inline int kind_of(const AdamwTensor& t) {
  return 4 * (t.grad_type == Type::fp32) + 2 * (t.exp_avg_type == Type::fp32) + (t.exp_avg_sq_type == Type::fp32);
}

// Calls with(grad, exp_avg, exp_avg_sq), a value of each kind's types.
template <class With>
void with_types(int kind, With with) {
  const auto with_moments = [&](auto grad) {
    switch (kind % 4) {
      case 0: return with(grad, bf16{}, bf16{});
      case 1: return with(grad, bf16{}, float{});
      case 2: return with(grad, float{}, bf16{});
      default: return with(grad, float{}, float{});
    }
  };
  kind / 4 ? with_moments(float{}) : with_moments(bf16{});
}

inline AdamwEntry entry_of(const AdamwArguments& a, const AdamwTensor& t, int64_t index) {
  return {t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.out, t.count, index, static_cast<float>(a.lr * t.weight_decay),
          t.weight_decay != 0.0};
}

// Entries of each kind until a table is full, or the list ends: launch(kind, params).
template <class Params, class Launch>
class Launches {
 public:
  Launches(const AdamwArguments& a, Launch launch) : launch_(launch) {
    for (Params& p : params_) {
      p.step = step_of(a);
      p.grad_scale = a.grad_scale_tensor;
    }
  }
  template <class Entry>
  void add(int kind, const Entry& entry, int64_t chunks) {
    if (params_[kind].table.add(entry, chunks)) return;
    flush(kind);
    params_[kind].table.add(entry, chunks);
  }
  void flush() {
    for (int kind = 0; kind < kKinds; ++kind) flush(kind);
  }

 private:
  void flush(int kind) {
    if (params_[kind].table.count == 0) return;
    launch_(kind, params_[kind]);
    params_[kind].table.count = 0;
  }

  Launch launch_;
  Params params_[kKinds] = {};
};

}  // namespace optimizer
