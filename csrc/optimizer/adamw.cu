// Host side of adamw: tensors without FP8 copies.
#include "adamw_host.h"

namespace optimizer {

void adamw(const AdamwArguments& a, hopper::Stream stream) {
  check(a);
  hopper::LaunchConfig config = launch_config("adamw", 0, kThreads, a.programmatic, stream);
  const auto launch = [&](int kind, const AdamwParams& p) {
    config.grid = dim3(p.table.chunks());
    with_types(kind, [&](auto grad, auto first, auto second) {
      hopper::launch(config, adamw_kernel<decltype(grad), decltype(first), decltype(second)>, p);
    });
  };
  Launches<AdamwParams, decltype(launch)> launches(a, launch);
  int64_t index = a.first_index;
  for (size_t i = 0; i < a.tensor_count; ++i) {
    const AdamwTensor& t = a.tensors[i];
    if (t.count != 0 && !t.quantized) launches.add(kind_of(t), entry_of(a, t, index), ceil_div(t.count, kAdamwChunk));
    index += t.count;
  }
  launches.flush();
}

}  // namespace optimizer
