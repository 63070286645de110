#include "toy.h"

#include "../../../csrc/hopper/front.h"

namespace toy {
namespace {

constexpr int kThreads = 128;

HOPPER_KERNEL(kThreads) axpy_kernel(const AxpyArguments p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < p.n + (p.past_end ? 1 : 0)) p.out[i] = p.a * p.x[i < p.n ? i : 0] + (p.y ? p.y[i < p.n ? i : 0] : 0.0f);
}

HOPPER_KERNEL(kThreads) reverse_kernel(const float* x, float* out, int64_t n) {
  auto* tile = reinterpret_cast<float*>(hopper::dynamic_smem());
  const int64_t first = int64_t{blockIdx.x} * kThreads;
  const int size = static_cast<int>(n - first < kThreads ? n - first : kThreads);
  const int i = static_cast<int>(threadIdx.x);
  if (i < size) tile[i] = x[first + i];
  hopper::block_sync();
  if (i < size) out[first + i] = tile[size - 1 - i];
}

hopper::LaunchConfig config(int64_t n, size_t smem, const char* name, hopper::Stream stream) {
  hopper::LaunchConfig c{};
  c.grid = dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads));
  c.block = dim3(kThreads);
  c.smem_bytes = smem;
  c.stream = stream;
  c.name = name;
  return c;
}

}  // namespace

void axpy(const AxpyArguments& p, hopper::Stream stream) {
  if (p.n > 0) hopper::launch(config(p.n, 0, "axpy", stream), axpy_kernel, p);
}

void reverse(const float* x, float* out, int64_t n, hopper::Stream stream) {
  if (n > 0) hopper::launch(config(n, kThreads * sizeof(float), "reverse", stream), reverse_kernel, x, out, n);
}

}  // namespace toy
