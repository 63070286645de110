// The ways a kernel dies: each becomes a report, and the process goes on.
#include "cases.h"

using namespace planted;

namespace {

volatile int zero = 0;

int recurse(int n) {   // NOLINT: without end, as asked
  volatile char room[1024];
  room[0] = static_cast<char>(n);
  return n < 0 ? room[0] : recurse(n + 1) + room[0];
}

HOPPER_KERNEL(64) die(uint32_t* out, int bug) {
  const uint32_t t = threadIdx.x;
  if (t == 33) {
    if (bug == 1) *reinterpret_cast<volatile uint32_t*>(16) = 1;
    if (bug == 2) out[1] = static_cast<uint32_t>(recurse(0));
    if (bug == 3) out[1] = 7u / static_cast<unsigned>(zero);
    if (bug == 4) trap("sixty-four is too many");
    if (bug == 5)
      while (*const_cast<volatile uint32_t*>(out + 2) == 0) {
      }
    if (bug == 6)
      while (load<Order::acquire, Scope::gpu>(out + 2) == 0) {
      }
    if (bug == 7) block_sync();   // and again below: once more than the others
    if (bug == 8) {
      Deadline deadline(1000000);
      while (load<Order::acquire, Scope::gpu>(out + 2) == 0)
        if (deadline.passed()) trap("nobody came");
    }
  }
  block_sync();
  if (t == 0) out[0] = 1;
}

}  // namespace

CASE(faults, "fault", "fault", "fault", "trap", "livelock", "livelock|deadlock", "deadlock|barrier.members", "trap") {
  Buffer<uint32_t> out(4, "out", true);
  launch(shape(1, 64, 1024), die, out.data(), bug);
  if (out[0] != 1) throw WrongData("did not run to the end");
}
