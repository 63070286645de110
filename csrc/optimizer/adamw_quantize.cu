// Host side of adamw_quantize: weights with FP8 copies here, the list's other tensors by adamw.
#include "adamw_quantize.cuh"

#include "adamw_host.h"

namespace optimizer {

void adamw_quantize(const AdamwArguments& a, hopper::Stream stream) {
  adamw(a, stream);   // checks everything before its first launch
  hopper::LaunchConfig config = launch_config("adamw_quantize", 0, kThreads, a.programmatic, stream, kQuantizedSmem);
  const auto launch = [&](int kind, QuantizedParams& p) {
    p.rule.pow2 = a.pow2;
    config.grid = dim3(p.table.chunks());
    with_types(kind, [&](auto grad, auto first, auto second) {
      hopper::launch(config, adamw_quantize_kernel<decltype(grad), decltype(first), decltype(second)>, p);
    });
  };
  Launches<QuantizedParams, decltype(launch)> launches(a, launch);
  int64_t index = a.first_index;
  for (size_t i = 0; i < a.tensor_count; ++i) {
    const AdamwTensor& t = a.tensors[i];
    if (t.count != 0 && t.quantized) {
      const QuantizedEntry entry{entry_of(a, t, index), static_cast<uint8_t*>(t.q), t.scale, static_cast<uint8_t*>(t.q_t),
                                 t.scale_t, static_cast<int32_t>(t.rows), static_cast<int32_t>(t.columns)};
      launches.add(kind_of(t), entry, t.batch * ceil_div(t.rows, kWeightTile) * ceil_div(t.columns, kWeightTile));
    }
    index += t.count;
  }
  launches.flush();
}

}  // namespace optimizer
