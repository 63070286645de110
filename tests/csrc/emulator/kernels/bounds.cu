// Where a kernel may read and write.
#include "cases.h"

using namespace planted;

namespace {

struct Table {
  int values[4];
};
const Table kTable = {{1, 2, 3, 4}};   // a constant of the program

HOPPER_KERNEL(64) bounds(const float* in, float* out, uint64_t* mailbox, Table argument, int bug) {
  auto* s = reinterpret_cast<float*>(dynamic_smem());
  const uint32_t t = threadIdx.x;
  float local[4] = {1, 2, 3, 4};
  if (bug != 8) s[t] = in[t];
  block_sync();
  float v = s[63 - t] + static_cast<float>(kTable.values[t % 4] + argument.values[t % 4]) + local[t % 4];
  if (bug == 1) v += in[t + 1];                                            // past the end, by the last thread
  if (bug == 2) const_cast<float*>(in)[t] = v;                             // an input
  if (bug == 3) v += s[t + 1024 / 4];                                      // past the block's shared memory
  if (bug == 4) mailbox[t] = reinterpret_cast<uint64_t>(&local[0]);
  if (bug == 5) v += *reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(in) + (t < 63 ? 2 : 0));   // misaligned
  if (bug == 6) store<Order::relaxed, Scope::gpu>(reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(out) + 2), 0u);
  if (bug == 7) shared_address(in);                                        // not shared memory
  block_sync();
  if (bug == 4) v += *reinterpret_cast<const float*>(mailbox[t ^ 1]);      // another thread's registers
  if (bug == 9 && t == 63) out[t + 1] = v;
  out[t] = v;
}

}  // namespace

CASE(bounds, "global.bounds", "global.read_only", "smem.bounds", "stack.foreign", "alignment", "alignment", "smem.bounds", "smem.uninitialised",
     "global.bounds") {
  Buffer<float> in(64, "in", false), out(64, "out", true);
  Buffer<uint64_t> mailbox(64, "mailbox", true);
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  launch(shape(1, 64, 1024), bounds, in.data(), out.data(), mailbox.data(), kTable, bug);
  out.expect([](size_t i) { return static_cast<float>(63 - i + 3 * (i % 4 + 1)); });
}
