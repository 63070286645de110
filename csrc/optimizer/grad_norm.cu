// Host side of clip_grad_norm: the list cut into launches, then the last stage.
#include "grad_norm.cuh"

#include <algorithm>

#include "../common/checks.h"
#include "../common/launch_config.h"

namespace optimizer {
namespace {

using namespace optimizer_kernels;

int64_t size_of(Type type) { return type == Type::bf16 ? 2 : type == Type::fp32 ? 4 : 8; }
int64_t chunks_of(const NormTensor& t) { return ceil_div(t.count, kNormChunkBytes / size_of(t.type)); }

void check(const NormArguments& a) {
  require(a.max_norm > 0, "max_norm", "must be positive", a.max_norm);
  require(a.norm != nullptr && a.scale != nullptr, "norm", "must not be null, nor scale", "a null pointer");
  require(a.partials != nullptr, "partials", "must not be null", "a null pointer");
  for (size_t i = 0; i < a.tensor_count; ++i) {
    const NormTensor& t = a.tensors[i];
    require(t.count >= 0, "grads", "must not have a negative number of elements", t.count);
    require(t.count == 0 || t.data != nullptr, "grads", "must not be null unless it is empty", "a null pointer");
    require(is_aligned(t.data, static_cast<uintptr_t>(size_of(t.type))), "grads", "must be aligned to its elements", t.data);
    require(chunks_of(t) < int64_t{1} << 31, "grads", "must have fewer than 2^31 chunks of 16 KB each", t.count);
  }
}

}  // namespace

void clip_grad_norm(const NormArguments& a, hopper::Stream stream) {
  check(a);
  // All launches have the same blocks, so that each partial sum has its owner in every one of them.
  int64_t all = 0;
  for (size_t i = 0; i < a.tensor_count; ++i) all = std::min(all + chunks_of(a.tensors[i]), kNormPartials);
  const auto blocks = static_cast<uint32_t>(all);
  bool programmatic = a.programmatic;
  NormParams p{};
  p.partials = a.partials;
  p.first = true;
  const auto flush = [&] {
    if (p.table.count == 0) return;
    hopper::launch(launch_config("grad_norm", blocks, kNormThreads, programmatic, stream, sizeof(NormShared)), grad_norm_kernel, p);
    p.table.count = 0;
    p.first = false;
    programmatic = true;
  };
  for (size_t i = 0; i < a.tensor_count; ++i) {
    const NormTensor& t = a.tensors[i];
    if (t.count == 0) continue;
    const NormEntry entry{t.data, t.count, t.type};
    if (p.table.add(entry, chunks_of(t))) continue;
    flush();
    p.table.add(entry, chunks_of(t));
  }
  flush();
  hopper::launch(launch_config("clip_scale", 1, kNormThreads, programmatic, stream, sizeof(NormShared)), clip_scale_kernel, a.partials,
                 static_cast<int32_t>(blocks), static_cast<float>(a.max_norm), a.norm, a.scale);
}

}  // namespace optimizer
