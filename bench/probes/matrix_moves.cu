// ldmatrix and stmatrix of one warp. Cases: bench/proof/probe_matrix_moves.py.
#include "probe.h"

namespace {

// Shared memory is 32 rows of 16 bytes; lane l names row rows[l].
template <int count, bool transposed>
HOPPER_KERNEL(32)
load_kernel(const int32_t* rows, const uint8_t* memory, uint32_t* out) {
  uint8_t* smem = hopper::dynamic_smem();
  probe::fill(smem, memory, 512);
  uint32_t registers[count];
  hopper::ldmatrix<count, transposed>(registers, smem + 16 * rows[threadIdx.x]);
  HOPPER_UNROLL for (int i = 0; i < count; ++i) out[4 * threadIdx.x + i] = registers[i];
}

template <int count, bool transposed>
HOPPER_KERNEL(32)
store_kernel(const int32_t* rows, const uint32_t* source, uint8_t* out) {
  uint8_t* smem = hopper::dynamic_smem();
  probe::fill(smem, out, 512);
  uint32_t registers[count];
  HOPPER_UNROLL for (int i = 0; i < count; ++i) registers[i] = source[4 * threadIdx.x + i];
  hopper::stmatrix<count, transposed>(smem + 16 * rows[threadIdx.x], registers);
  probe::dump(out, smem, 512);
}

template <int count, bool transposed>
bool try_launch(const probe::Parameters& given, probe::Memory& memory) {
  if (given[1] != count || given[2] != transposed) return false;
  const auto config = probe::grid(1, 32, 512);
  if (given[0] == 0) {
    hopper::launch(config, load_kernel<count, transposed>, memory.at<const int32_t>(0), memory.at<const uint8_t>(1),
                   memory.at<uint32_t>(2));
  } else {
    hopper::launch(config, store_kernel<count, transposed>, memory.at<const int32_t>(0), memory.at<const uint32_t>(1),
                   memory.at<uint8_t>(2));
  }
  return true;
}

void run(const probe::Parameters& given, probe::Memory& memory) {
  const bool known = try_launch<1, false>(given, memory) || try_launch<2, false>(given, memory) ||
                     try_launch<4, false>(given, memory) || try_launch<1, true>(given, memory) ||
                     try_launch<2, true>(given, memory) || try_launch<4, true>(given, memory);
  if (!known) throw std::runtime_error("matrix_moves.cu has no instance for this case: add it there");
}

}  // namespace

PROBE(run)
