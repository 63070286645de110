// Tensor maps, copy geometry and reductions for ctypes. Compiled for the emulator, and by nvcc for the device
// target, where only what make_tensor_map says is tested.
#include "../../../csrc/hopper/tensor_map.h"

#include <cstring>
#include <string>

#ifdef HOPPER_EMULATED
#include <chrono>

#include "../../../csrc/emulator/reduction.h"
#include "../../../csrc/emulator/tensor_map.h"
#endif

using hopper::TensorMap;

namespace {

std::string last_text;
const char* keep(std::string text) {
  last_text = std::move(text);
  return last_text.c_str();
}

}  // namespace

struct FlatSpec {  // TensorMapSpec as ctypes passes it; enumerators unchecked
  const void* base;
  uint64_t sizes[5], strides_bytes[4];
  uint32_t box[5], element_strides[5];
  int32_t element, rank, swizzle, promotion, fill;
};

// Empty, or what was thrown: "invalid_argument: ..." or "runtime_error: ...".
extern "C" const char* make_map(const FlatSpec* flat, TensorMap* map) {
  hopper::TensorMapSpec spec;
  spec.base = flat->base;
  std::memcpy(spec.sizes, flat->sizes, sizeof spec.sizes);
  std::memcpy(spec.strides_bytes, flat->strides_bytes, sizeof spec.strides_bytes);
  std::memcpy(spec.box, flat->box, sizeof spec.box);
  std::memcpy(spec.element_strides, flat->element_strides, sizeof spec.element_strides);
  spec.element = static_cast<hopper::Element>(flat->element);
  spec.rank = flat->rank;
  spec.swizzle = static_cast<hopper::Swizzle>(flat->swizzle);
  spec.promotion = static_cast<hopper::L2Promotion>(flat->promotion);
  spec.fill = static_cast<hopper::Fill>(flat->fill);
  try {
    *map = hopper::make_tensor_map(spec);
    return keep("");
  } catch (const std::invalid_argument& error) {
    return keep(std::string("invalid_argument: ") + error.what());
  } catch (const std::runtime_error& error) {
    return keep(std::string("runtime_error: ") + error.what());
  }
}

// The other two ways to say the same.
extern "C" const char* make_map_2d(const void* base, int32_t element, uint64_t rows, uint64_t cols,
                                   uint64_t stride, uint32_t box_rows, uint32_t box_cols, int32_t swizzle,
                                   TensorMap* map) {
  const auto e = static_cast<hopper::Element>(element);
  const auto s = static_cast<hopper::Swizzle>(swizzle);
  try {
    *map = hopper::make_tensor_map_2d(base, e, rows, cols, stride, box_rows, box_cols, s);
    return keep("");
  } catch (const std::exception& error) {
    return keep(error.what());
  }
}
extern "C" const char* make_map_shape(const void* base, int32_t element, int64_t rows, int64_t cols,
                                      int64_t stride, int32_t box_rows, int32_t box_cols, int32_t swizzle,
                                      TensorMap* map) {
  hopper::TensorMapShape shape;
  shape.rank = 2;
  shape.size[0] = cols;
  shape.size[1] = rows;
  shape.stride_bytes[0] = stride;
  shape.box[0] = box_cols;
  shape.box[1] = box_rows;
  try {
    *map = hopper::make_tensor_map(base, static_cast<hopper::Element>(element), shape,
                                   static_cast<hopper::Swizzle>(swizzle));
    return keep("");
  } catch (const std::exception& error) {
    return keep(error.what());
  }
}

static_assert(hopper::element_of<hopper::e4m3>() == hopper::Element::u8);
static_assert(hopper::element_of<hopper::bf16>() == hopper::Element::bf16);
static_assert(hopper::element_of<float>() == hopper::Element::f32);

#ifdef HOPPER_EMULATED

namespace {

using emulator::DecodedMap;
using emulator::Piece;
enum Mode : int32_t { kLoad, kStore, kReduce };

}  // namespace

extern "C" const char* decode_map(const TensorMap* map) {
  DecodedMap decoded;
  return keep(emulator::decode(map, decoded));
}

extern "C" uint32_t map_box_bytes(const TensorMap* map) {
  DecodedMap decoded;
  return emulator::decode(map, decoded).empty() ? emulator::box_bytes(decoded) : 0;
}
extern "C" uint32_t map_shared_extent(const TensorMap* map) {
  DecodedMap decoded;
  return emulator::decode(map, decoded).empty() ? emulator::shared_extent(decoded) : 0;
}

// One copy between the tensor and `shared`, the window whose address 0 is shared[0]. Checks what every piece
// promises.
extern "C" const char* copy_box(const TensorMap* map, int32_t mode, int32_t op, int32_t rank,
                                const int32_t* at, uint8_t* shared, uint32_t address, uint64_t window) {
  DecodedMap m;
  std::string wrong = emulator::decode(map, m);
  if (wrong.empty()) wrong = emulator::check_copy(m, rank, address);
  if (!wrong.empty()) return keep(wrong);
  uint64_t moved = 0;
  uint32_t next = 0;
  emulator::for_each_piece(m, at, address, [&](uint32_t a, const Piece& p) {
    moved += p.bytes;
    if (p.bytes == 0 || p.bytes > 16 || p.bytes % m.element_bytes) wrong = "piece of a strange size";
    if (p.shared_offset / 16 != (p.shared_offset + p.bytes - 1) / 16) wrong = "piece across chunks";
    if (p.shared_offset < next) wrong = "pieces out of order";
    next = p.shared_offset + p.bytes;
    if (next > emulator::shared_extent(m)) wrong = "piece past the extent";
    if (a != emulator::swizzled(address + p.shared_offset, m.swizzle)) wrong = "piece at another address";
    if (a < address || a + p.bytes > address + emulator::shared_extent(m)) wrong = "swizzled past the extent";
    if (a + p.bytes > window) wrong = "piece outside of the window";
    if (!wrong.empty()) return;
    if (mode == kLoad)
      std::memcpy(shared + a, p.global ? p.global : m.fill, p.bytes);
    else if (p.global && mode == kStore)
      std::memcpy(p.global, shared + a, p.bytes);
    else if (p.global)
      emulator::reduce_elements(static_cast<emulator::Reduce>(op), m.element, p.global, shared + a, p.bytes);
  });
  if (wrong.empty() && moved != emulator::box_bytes(m)) wrong = "the pieces are not the box";
  return keep(wrong);
}

// Nanoseconds of one load, the best of some; also runs the three-argument form.
extern "C" double load_nanoseconds(const TensorMap* map, const int32_t* at, uint8_t* shared,
                                   int32_t repeats) {
  using Clock = std::chrono::steady_clock;
  DecodedMap m;
  if (!emulator::decode(map, m).empty()) return -1;
  double best = 1e30;
  for (int32_t i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    emulator::for_each_piece(m, at, 0, [&](uint32_t a, uint8_t* global, uint32_t bytes) {
      if (bytes == 16)
        std::memcpy(shared + a, global ? global : m.fill, 16);
      else
        std::memcpy(shared + a, global ? global : m.fill, bytes);
    });
    best = std::min(best, std::chrono::duration<double, std::nano>(Clock::now() - start).count());
  }
  return best;
}

extern "C" void reduce_bytes(int32_t op, int32_t element, void* dst, const void* src, uint64_t bytes,
                             int32_t flush) {
  const auto o = static_cast<emulator::Reduce>(op);
  const auto e = static_cast<emulator::Element>(element);
  emulator::reduce_elements(o, e, dst, src, bytes, static_cast<emulator::Subnormals>(flush));
}

extern "C" void atomic_bytes(int32_t op, int32_t element, void* p, const void* value, void* old,
                             int32_t flush) {
  const auto o = static_cast<emulator::Reduce>(op);
  const auto e = static_cast<emulator::Element>(element);
  emulator::atomic_element(o, e, p, value, old, static_cast<emulator::Subnormals>(flush));
}

extern "C" const char* legal(int32_t instruction, int32_t op, int32_t element) {
  const auto o = static_cast<emulator::Reduce>(op);
  const auto e = static_cast<emulator::Element>(element);
  return keep(instruction == 0   ? emulator::atomic_legal(o, e)
              : instruction == 1 ? emulator::bulk_reduce_legal(o, e)
                                 : emulator::tensor_reduce_legal(o, e));
}

#endif
