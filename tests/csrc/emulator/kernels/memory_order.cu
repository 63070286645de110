// Flags between blocks: order, scope, fences, read-modify-writes.
#include "cases.h"

using namespace planted;

namespace {

// A producer block writes 32 words with relaxed stores and raises a flag; consumers read them.
HOPPER_KERNEL(32) flag(uint32_t* payload, uint32_t* flags, uint32_t* out, int bug) {
  const uint32_t t = threadIdx.x;
  if (blockIdx.x == 0) {
    if (bug == 9)
      payload[t] = t + 1;                                   // a plain store is as good, if it is released
    else
      store<Order::relaxed, Scope::gpu>(payload + t, t + 1);
    syncwarp();
    if (t != 0) return;
    if (bug == 1) {
      store<Order::relaxed, Scope::gpu>(flags, 1u);
    } else if (bug == 2) {
      store<Order::release, Scope::cta>(flags, 1u);
    } else if (bug == 3) {
      fence<Scope::cta>();
      store<Order::relaxed, Scope::gpu>(flags, 1u);
    } else if (bug == 4) {
      fence<Scope::gpu>();
      store<Order::relaxed, Scope::cta>(flags, 1u);
    } else if (bug == 5) {
      reduce_add<Order::relaxed, Scope::gpu>(flags, 1);
    } else if (bug == 6) {
      flags[0] = 1;                                         // a plain store of a flag that others poll
    } else if (bug == 0 && blockDim.y == 1) {
      fence<Scope::gpu>();
      store<Order::relaxed, Scope::gpu>(flags, 1u);
    } else {
      store<Order::release, Scope::gpu>(flags, 1u);
    }
    return;
  }
  if (t == 0) {
    if (bug == 7) {
      while (load<Order::relaxed, Scope::gpu>(flags) == 0) {
      }
    } else if (bug == 8) {
      while (load<Order::relaxed, Scope::gpu>(flags) == 0) {
      }
      fence<Scope::cta>();
    } else if (blockIdx.x == 1) {
      while (load<Order::relaxed, Scope::gpu>(flags) == 0) {
      }
      fence<Scope::gpu>();
    } else {
      while (load<Order::acquire, Scope::gpu>(flags) == 0) {
      }
    }
  }
  syncwarp();
  out[blockIdx.x * 32 + t] = bug == 9 ? payload[t + 32] : payload[t];
}

// The last block to arrive adds up what all have written: a counter with acq_rel.
HOPPER_KERNEL(32) last_block(uint32_t* parts, uint32_t* counter, uint32_t* out, int bug) {
  const uint32_t t = threadIdx.x;
  parts[blockIdx.x * 32 + t] = t;
  if (bug != 4) syncwarp();
  uint32_t before = 0;
  if (t == 0) {
    if (bug == 1)
      before = atomic_add<Order::relaxed, Scope::gpu>(counter, 1);
    else if (bug == 2)
      before = atomic_add<Order::release, Scope::gpu>(counter, 1);
    else if (bug == 3)
      before = atomic_add<Order::acq_rel, Scope::cluster>(counter, 1);
    else
      before = atomic_add<Order::acq_rel, Scope::gpu>(counter, 1);
  }
  before = shuffle(before, 0);
  syncwarp();
  if (before + 1 != gridDim.x) return;
  uint32_t sum = 0;
  for (uint32_t b = 0; b < gridDim.x; ++b) sum += parts[b * 32 + (t ^ 1)];
  out[t] = sum;
}

// Orders that the instructions do not have: the wrappers refuse them at compile time, the twins at run time.
HOPPER_KERNEL(32) orders(uint32_t* p, int bug) {
  uint32_t value = 1;
  if (threadIdx.x != 0) return;
  if (bug == 1)
    emulator::load(&value, p, 4, Order::release, Scope::gpu, HOPPER_HERE);
  else if (bug == 2)
    emulator::store(p, &value, 4, Order::acquire, Scope::gpu, HOPPER_HERE);
  else if (bug == 3)
    emulator::atomic(Reduce::and_, Element::f32, p, &value, nullptr, Order::relaxed, Scope::gpu, HOPPER_HERE);
  else if (bug == 4)
    emulator::fence(Order::relaxed, Scope::gpu, HOPPER_HERE);
  else
    emulator::atomic(Reduce::or_, Element::u32, p, &value, nullptr, Order::relaxed, Scope::gpu, HOPPER_HERE);
}

// Compare-and-swap as a lock around plain memory.
HOPPER_KERNEL(32) lock(uint32_t* mutex, uint32_t* guarded, int bug) {
  if (threadIdx.x != 0) return;
  const uint32_t free = 0, taken = 1;
  uint32_t old = 1;
  while (old) emulator::atomic_compare_exchange(mutex, &free, &taken, &old, 4, bug == 1 ? Order::relaxed : Order::acquire, Scope::gpu, HOPPER_HERE);
  *guarded += 1;
  if (bug == 2)
    store<Order::relaxed, Scope::gpu>(mutex, 0u);
  else
    store<Order::release, Scope::gpu>(mutex, 0u);
}

}  // namespace

CASE(memory_flag, "race|data", "race|data", "race|data", "race|data", "race|data", "race|livelock|data", "race|data", "race|data", "global.bounds") {
  Buffer<uint32_t> payload(32, "payload", true), flags(1, "flag", true), out(96, "out", true);
  launch(shape(3, 32, 1024), flag, payload.data(), flags.data(), out.data(), bug);
  for (int i = 32; i < 96; ++i)
    if (out[i] != static_cast<uint32_t>(i % 32) + 1) throw WrongData("element " + std::to_string(i) + " is " + std::to_string(out[i]));
}

CASE(memory_last_block, "race|data", "race|data", "race|data", "race|data") {
  Buffer<uint32_t> parts(128, "parts", true), counter(1, "counter", true), out(32, "out", true);
  launch(shape(4, 32, 1024), last_block, parts.data(), counter.data(), out.data(), bug);
  out.expect([](size_t t) { return 4 * (t ^ 1); });
}

CASE(memory_orders, "memory.order", "memory.order", "memory.order", "memory.order") {
  Buffer<uint32_t> p(1, "p", true);
  launch(shape(1, 32, 1024), orders, p.data(), bug);
  p.expect([](size_t) { return 1u; });
}

CASE(memory_lock, "race|data", "race|data") {
  Buffer<uint32_t> mutex(1, "mutex", true), guarded(1, "guarded", true);
  launch(shape(4, 32, 1024), lock, mutex.data(), guarded.data(), bug);
  guarded.expect([](size_t) { return 4u; });
}
