#include "tensor_map.h"

#include <cstddef>
#include <cstring>
#include <sstream>

namespace emulator {
namespace {

using hopper::Swizzle;
using hopper::TensorMap;
using hopper::TensorMapSpec;

constexpr uint64_t kMagic = 0x70616d2d726f736e;  // "nsor-map"

// What the emulator keeps in the 128 opaque bytes. The driver's own bits are secret and are not imitated.
struct Packed {
  uint64_t magic;
  uint64_t base;
  uint64_t strides_bytes[4];
  uint32_t size_minus_1[5];   // sizes go up to 2^32
  uint8_t box_minus_1[5];
  uint8_t element_strides[5];
  uint8_t rank, element, swizzle, promotion, fill;
  uint8_t reserved[37];
  uint64_t checksum;          // of everything before it
};
static_assert(sizeof(Packed) == sizeof(TensorMap) && offsetof(Packed, checksum) == 120);

uint64_t checksum_of(const Packed& p) {  // FNV-1a: any changed bit shows
  uint8_t bytes[offsetof(Packed, checksum)];
  std::memcpy(bytes, &p, sizeof bytes);
  uint64_t hash = 0xcbf29ce484222325;
  for (uint8_t b : bytes) hash = (hash ^ b) * 0x100000001b3;
  return hash;
}

}  // namespace

TensorMap encode_tensor_map(const TensorMapSpec& spec) {
  Packed p;
  std::memset(&p, 0, sizeof p);
  p.magic = kMagic;
  p.base = reinterpret_cast<uintptr_t>(spec.base);
  for (int i = 0; i < spec.rank; ++i) {
    p.size_minus_1[i] = static_cast<uint32_t>(spec.sizes[i] - 1);
    p.box_minus_1[i] = static_cast<uint8_t>(spec.box[i] - 1);
    p.element_strides[i] = static_cast<uint8_t>(spec.element_strides[i]);
    if (i + 1 < spec.rank) p.strides_bytes[i] = spec.strides_bytes[i];
  }
  p.rank = static_cast<uint8_t>(spec.rank);
  p.element = static_cast<uint8_t>(spec.element);
  p.swizzle = static_cast<uint8_t>(spec.swizzle);
  p.promotion = static_cast<uint8_t>(spec.promotion);
  p.fill = static_cast<uint8_t>(spec.fill);
  p.checksum = checksum_of(p);
  TensorMap map;
  std::memcpy(&map, &p, sizeof map);
  return map;
}

std::string decode(const TensorMap* map, DecodedMap& m) {
  std::ostringstream text;
  text << "the tensor map at " << static_cast<const void*>(map) << " ";
  // Driver API, cuTensorMapEncodeTiled: "tensorMap address must be aligned to 64 bytes".
  if (map == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    text << "is not at a multiple of 64 bytes";
    return text.str();
  }
  Packed p;
  std::memcpy(&p, map, sizeof p);
  if (p.magic != kMagic) {
    static const TensorMap kZero{};
    if (std::memcmp(map, &kZero, sizeof kZero) == 0)
      text << "is all zeros: it was left out, TMA may not use it";
    else
      text << "was not made by make_tensor_map: it starts with " << std::hex << std::showbase << p.magic;
    return text.str();
  }
  if (p.checksum != checksum_of(p)) {
    text << "has changed since make_tensor_map made it: its checksum is wrong";
    return text.str();
  }

  m = DecodedMap();
  m.base = reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(p.base));
  m.rank = p.rank;
  m.element = static_cast<hopper::Element>(p.element);
  m.element_bytes = hopper::element_bytes(m.element);
  m.swizzle = static_cast<Swizzle>(p.swizzle);
  m.fill_nan = p.fill == static_cast<uint8_t>(hopper::Fill::nan);
  m.rows = 1;
  for (int i = 0; i < 5; ++i) {
    const bool real = i < m.rank;
    m.size[i] = real ? int64_t{p.size_minus_1[i]} + 1 : 1;
    m.box[i] = real ? p.box_minus_1[i] + 1 : 1;
    m.step[i] = real ? p.element_strides[i] : 1;
    m.stride[i] = i == 0 ? m.element_bytes : real ? static_cast<int64_t>(p.strides_bytes[i - 1]) : 0;
    // Driver API, elementStrides: ceil(boxDim[i] / elementStrides[i]) elements are loaded.
    m.count[i] = (m.box[i] + m.step[i] - 1) / m.step[i];
    if (i > 0) m.rows *= static_cast<uint32_t>(m.count[i]);
  }
  m.row_bytes = static_cast<uint32_t>(m.count[0]) * m.element_bytes;
  // A row takes a whole span of the swizzle even when it is shorter. The CUDA programming guide ("Swizzle
  // modes", inner dimension) says to allocate for the full width, and no more; silicon has the last word
  // (probes `load-narrow` of bench/proof).
  m.row_pitch = std::max(m.row_bytes, hopper::swizzle_span(m.swizzle));
  // PTX ISA 5.5.3.3 "Out of Boundary Access" names OOB-NaN and gives no bits. 0x7ff7 in every 16 bits is a
  // NaN in all four formats and is what other projects report; silicon has the last word (probes `nan-*`).
  if (m.fill_nan)
    for (int i = 0; i < 16; i += 2) m.fill[i] = 0xf7, m.fill[i + 1] = 0x7f;
  return "";
}

std::string check_copy(const DecodedMap& m, int rank, uint32_t shared_address) {
  std::ostringstream text;
  // PTX ISA "cp.async.bulk.tensor": as many coordinates as .dim says, which is the rank of the tensor map.
  if (rank != m.rank)
    text << "the instruction has " << rank << " coordinate(s), the tensor map has rank " << m.rank;
  // CUDA programming guide, "Swizzle modes", requirements: 128 bytes in every mode, also without a swizzle.
  else if (shared_address % 128 != 0)
    text << "the box's address in shared memory, 0x" << std::hex << shared_address
         << ", is not a multiple of 128 bytes";
  return text.str();
}

}  // namespace emulator
