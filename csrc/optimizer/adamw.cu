// Host side of adamw: the constants of the step, the list cut into launches.
#include "adamw.cuh"

#include <cmath>

#include "../common/checks.h"

namespace optimizer {
namespace {

using namespace optimizer_kernels;

void check(const AdamwArguments& a) {
  require(a.step >= 1, "step", "must be at least 1", a.step);
  require(a.first_index >= 0, "first_index", "must not be negative", a.first_index);
  for (size_t i = 0; i < a.tensor_count; ++i) {
    const AdamwTensor& t = a.tensors[i];
    require(t.count >= 0, "params", "must not have a negative number of elements", t.count);
    require(ceil_div(t.count, kAdamwChunk) < int64_t{1} << 31, "params",
            "must have fewer than 2^31 chunks of 2048 elements each", t.count);
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

uint32_t noise_key(int64_t seed, int64_t step) {
  uint32_t key = 0;
  for (const int64_t word : {seed, seed >> 32, step, step >> 32}) key = next_key(key, static_cast<uint32_t>(word));
  return key;
}

// Constants are rounded from double once, as torch rounds a Python number to the tensor's type.
AdamwStep step_of(const AdamwArguments& a) {
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
struct Launches {
  static constexpr int kKinds = 8;
  static int kind(const AdamwTensor& t) {
    return 4 * (t.grad_type == Type::fp32) + 2 * (t.exp_avg_type == Type::fp32) + (t.exp_avg_sq_type == Type::fp32);
  }

  AdamwParams params[kKinds] = {};

  void flush(int kind, const hopper::LaunchConfig& common) {
    AdamwParams& p = params[kind];
    if (p.table.count == 0) return;
    hopper::LaunchConfig config = common;
    config.grid = dim3(p.table.chunks());
    const auto with = [&](auto grad, auto first, auto second) {
      hopper::launch(config, adamw_kernel<decltype(grad), decltype(first), decltype(second)>, p);
    };
    const auto with_moments = [&](auto grad) {
      switch (kind % 4) {
        case 0: return with(grad, bf16{}, bf16{});
        case 1: return with(grad, bf16{}, float{});
        case 2: return with(grad, float{}, bf16{});
        default: return with(grad, float{}, float{});
      }
    };
    kind / 4 ? with_moments(float{}) : with_moments(bf16{});
    p.table.count = 0;
  }
};

}  // namespace

void adamw(const AdamwArguments& a, hopper::Stream stream) {
  check(a);
  hopper::LaunchConfig config{};
  config.block = dim3(kThreads);
  config.programmatic = a.programmatic;
  config.stream = stream;
  config.name = "adamw";
  Launches launches;
  for (AdamwParams& p : launches.params) {
    p.step = step_of(a);
    p.grad_scale = a.grad_scale_tensor;
  }
  int64_t index = a.first_index;
  for (size_t i = 0; i < a.tensor_count; ++i) {
    const AdamwTensor& t = a.tensors[i];
    if (t.count == 0) continue;
    const int kind = Launches::kind(t);
    auto& table = launches.params[kind].table;
    const AdamwEntry entry{t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.out, t.count, index,
                           static_cast<float>(a.lr * t.weight_decay), t.weight_decay != 0.0};
    const int64_t chunks = ceil_div(t.count, kAdamwChunk);
    if (!table.add(entry, chunks)) {
      launches.flush(kind, config);
      table.add(entry, chunks);
    }
    index += t.count;
  }
  for (int kind = 0; kind < Launches::kKinds; ++kind) launches.flush(kind, config);
}

}  // namespace optimizer
