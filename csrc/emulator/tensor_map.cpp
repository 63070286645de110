#include "tensor_map.h"

namespace emulator {

std::string decode(const hopper::TensorMap* map, DecodedMap& m) {
  if (reinterpret_cast<uintptr_t>(map) % 64) return "the tensor map is not aligned to 64 bytes";
  hopper::PackedTensorMap p;
  std::memcpy(&p, map, sizeof p);
  if (p.check != hopper::tensor_map_check(p)) return "the 128 bytes are no tensor map (made by make_tensor_map, passed as HOPPER_GRID_CONSTANT?)";
  m.base = static_cast<uint8_t*>(const_cast<void*>(p.base));
  m.rank = static_cast<int>(p.flags & 255);
  m.element = static_cast<hopper::Element>(p.flags >> 8 & 255);
  m.element_bytes = hopper::tensor_map_element_bytes(m.element);
  m.swizzle = static_cast<hopper::Swizzle>(p.flags >> 16 & 255);
  m.fill_nan = p.flags >> 24;
  m.stride[0] = m.element_bytes;
  for (int i = 0; i < m.rank; ++i) {
    m.size[i] = static_cast<int64_t>(p.size_rank[i] & ((uint64_t{1} << 33) - 1)) + 1;
    m.box[i] = static_cast<int32_t>(p.size_rank[i] >> 33 & 255) + 1;
    m.step[i] = static_cast<int32_t>(p.size_rank[i] >> 41 & 255) + 1;
    if (i + 1 < m.rank) m.stride[i + 1] = static_cast<int64_t>(p.stride_bytes[i]);
  }
  return "";
}

}  // namespace emulator
