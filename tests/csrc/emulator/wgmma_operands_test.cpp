// Operands of wgmma in shared memory, register fragments and the swizzle for ctypes.
#include "../../../csrc/emulator/wgmma_operands.h"

#include <cstring>
#include <vector>

#include "../../../csrc/emulator/fragments.h"
#include "../../../csrc/emulator/swizzle.h"

using namespace emulator;

namespace {
std::string last_text;
std::vector<uint32_t> touched;
void hear(void* context, uint32_t address, uint32_t bytes) {
  auto& to = *static_cast<std::vector<uint32_t>*>(context);
  to.push_back(address);
  to.push_back(bytes);
}
}  // namespace

// `memory` is the host address of shared address `begin`. Empty, or what is wrong.
extern "C" const char* gather(const uint8_t* memory, uint32_t begin, uint32_t end, uint64_t descriptor,
                              int operand, int major, uint32_t rows, uint8_t* out, int listen) {
  touched.clear();
  last_text = gather_operand(memory - begin, begin, end, descriptor, static_cast<Operand>(operand),
                             static_cast<Major>(major), rows, out, listen ? hear : nullptr, &touched);
  return last_text.c_str();
}

// Pairs of address and bytes that the last gather told of.
extern "C" uint32_t touches(uint32_t* to, uint32_t room) {
  std::memcpy(to, touched.data(), std::min<size_t>(room, touched.size()) * 4);
  return static_cast<uint32_t>(touched.size() / 2);
}

extern "C" uint64_t encode(uint32_t start, uint32_t leading, uint32_t stride, uint32_t base, int swizzle) {
  return encode_descriptor({start, leading, stride, base, static_cast<Swizzle>(swizzle)});
}

extern "C" void decode(uint64_t descriptor, uint32_t* to) {
  const MatrixDescriptor m = decode_descriptor(descriptor);
  const uint32_t values[] = {m.start_address, m.leading_byte_offset, m.stride_byte_offset, m.base_offset,
                             static_cast<uint32_t>(m.swizzle)};
  std::memcpy(to, values, sizeof values);
}

extern "C" uint32_t swizzle_address(uint32_t address, int mode) {
  return swizzled(address, static_cast<Swizzle>(mode));
}

extern "C" void accumulator(uint32_t t, uint32_t i, uint32_t* to) {
  const Place p = accumulator_place(t, i);
  to[0] = p.row, to[1] = p.column;
}

extern "C" void a_element(uint32_t t, uint32_t word, uint32_t element, uint32_t bytes, uint32_t* to) {
  const Place p = a_element_place(t, word, element, bytes);
  to[0] = p.row, to[1] = p.column;
}

extern "C" void a_byte(uint32_t t, uint32_t word, uint32_t byte, uint32_t* to) {
  const Place p = a_register_place(t, word, byte);
  to[0] = p.row, to[1] = p.column;
}

extern "C" void matrix(uint32_t lane, uint32_t r, uint32_t half, int transposed, uint32_t* to) {
  const MatrixElement e = matrix_element(lane, r, half, transposed != 0);
  to[0] = e.matrix, to[1] = e.row, to[2] = e.column;
}

static_assert(accumulator_place(0, 0) == Place{0, 0} && accumulator_place(127, 127) == Place{63, 255});
static_assert(matrix_element(31, 3, 1, true) == MatrixElement{3, 7, 7});
static_assert(swizzled(0x3f0, Swizzle::b128) == 0x380);
