// Global memory with order and scope: store buffers, flags, atomics. PTX ISA: "Memory Consistency Model".
//
// In checked runs a relaxed or weak store through the vocabulary is delayed and drained later, in any order: a flag may
// overtake the data it announces, unless a release (a release store, a fence, an arrive, a barrier) stands between. A
// release drains every buffered store that happens before it, its own thread's and those it has observed. Loads see
// their own thread's stores, and those that happen before them.
#include <algorithm>
#include <cstring>

#include "reduction.h"
#include "shadow.h"

namespace emulator {
namespace {

struct BufferedStore : AsyncOperation {
  void* target = nullptr;
  uint8_t value[16];
  uint32_t bytes = 0;
  Thread* thread = nullptr;
  Stamp stamp;
  ClockRef releases;      // what a later acquire of this location gets (relaxed store after a fence)
  Scope scope = Scope::cta;

  void act() override;
};

std::vector<std::weak_ptr<BufferedStore>> buffered;   // of the running world, oldest first

bool overlaps(const BufferedStore& s, const void* p, size_t bytes) {
  auto a = reinterpret_cast<uintptr_t>(s.target), b = reinterpret_cast<uintptr_t>(p);
  return a < b + bytes && b < a + s.bytes;
}

bool happens_before(const Epoch& e, const Thread* t) {
  if (e.block == t->block->uid && e.actor == t->actor) return true;
  const BlockClock* part = t->seen ? t->seen->find(e.block) : nullptr;
  return part && part->generic[e.actor] >= e.time;
}

// The narrowest scope that includes both the one who released and the reader. A release and an acquire synchronise only
// if both name at least this (PTX ISA: "Scope", "Morally strong operations").
Scope needed_scope(const Flag& flag, const Thread* reader) {
  const Block* b = reader->block;
  if (flag.block == b->uid) return Scope::cta;
  if (flag.cluster == b->cluster->block[0]->uid) return Scope::cluster;
  return flag.rank == b->grid->rank ? Scope::gpu : Scope::sys;
}

Flag& flag_at(const void* p) { return world().flags[reinterpret_cast<uintptr_t>(p)]; }

void set_flag(const void* p, const ClockRef& clock, Scope scope, const Thread* t, bool joins) {
  World& w = world();
  if (!clock && !joins) {
    w.flags.erase(reinterpret_cast<uintptr_t>(p));
    return;
  }
  if (!clock) return;
  Flag& f = flag_at(p);
  f.clock = joins && f.clock ? join(f.clock, clock) : clock;
  f.scope = scope;
  f.rank = t->block->grid->rank;
  f.block = t->block->uid;
  f.cluster = t->block->cluster->block[0]->uid;
}

void check_alignment(const void* p, uint32_t size, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % size) {
    report("alignment", site, std::to_string(size) + "-byte access to " + place(p) + ", which is not aligned to it");
    world().stop();
  }
}

void record(const void* p, uint32_t size, bool write, Order order, Site site, const char* what) {
  World& w = world();
  if (!w.checking) return;
  Access a = generic_access(w.current, write, site, what);
  a.kind = order == Order::weak ? Kind::generic : Kind::atomic;
  access(p, size, a);
}

ClockRef release_clock(Thread* t) {
  World& w = world();
  drain_before_release(t);
  if (!w.checking) return ClockRef();
  Release r;
  r.add(w.stamp(t), t->block->actors);
  return r.take();
}

void acquire_from(const void* p, Order order, Scope scope, Thread* t) {
  World& w = world();
  if (!w.checking) return;
  auto it = w.flags.find(reinterpret_cast<uintptr_t>(p));
  if (it == w.flags.end() || !it->second.clock) return;
  const Flag& f = it->second;
  const Scope needed = needed_scope(f, t);
  if (f.scope < needed || scope < needed) return;   // released, or read, for a narrower circle
  if (order == Order::acquire || order == Order::acq_rel) {
    w.acquire(t, f.clock);
  } else if (t->relaxed_loads.empty() || !(t->relaxed_loads.back().first == f.clock)) {
    t->relaxed_loads.emplace_back(f.clock, needed);
  }
}

}  // namespace

void BufferedStore::act() {
  std::memcpy(target, value, bytes);
  set_flag(target, releases, scope, thread, false);
  --thread->stores_buffered;
  finished = sources_read = true;
}

void drain_before_release(Thread* t) {
  if (buffered.empty()) return;
  World& w = world();
  std::vector<std::weak_ptr<BufferedStore>> keep;
  for (auto& weak : buffered) {
    auto s = weak.lock();
    if (!s || s->finished) continue;
    if (s->thread == t || happens_before(s->stamp.self, t))
      w.finish_now(s);
    else
      keep.push_back(weak);
  }
  buffered.swap(keep);
}

void drain_for_read(Thread* t, const void* p, size_t bytes) {
  if (buffered.empty()) return;
  World& w = world();
  for (auto& weak : buffered) {
    auto s = weak.lock();
    if (!s || s->finished || !overlaps(*s, p, bytes)) continue;
    if (s->thread == t || happens_before(s->stamp.self, t)) w.finish_now(s);
  }
}

void load(void* value, const void* p, uint32_t size, Order order, Scope scope, Site site) {
  World& w = world();
  Thread* t = w.current;
  check_alignment(p, size, site);
  if (order == Order::release || order == Order::acq_rel) report("memory.order", site, "a load is weak, relaxed or acquire");
  if (order != Order::weak) w.poll(site, p, size);   // it may be a spin: others go on, and time passes between two looks
  drain_for_read(t, p, size);
  record(p, size, false, order, site, "load");
  std::memcpy(value, p, size);
  acquire_from(p, order, scope, t);
}

void store(void* p, const void* value, uint32_t size, Order order, Scope scope, Site site) {
  World& w = world();
  Thread* t = w.current;
  check_alignment(p, size, site);
  if (order == Order::acquire || order == Order::acq_rel) report("memory.order", site, "a store is weak, relaxed or release");
  if (order == Order::release && dropped_here("release", site)) order = Order::relaxed;
  ++w.progress;
  ClockRef clock;
  if (order == Order::release) {
    clock = release_clock(t);
  } else if (order == Order::relaxed && t->fence_clock) {
    clock = t->fence_clock;
    scope = std::min(scope, t->fence_scope);   // both must include the reader
  }
  record(p, size, true, order, site, "store");
  if (!w.checking || order == Order::release) {
    drain_for_read(t, p, size);             // same address: program order
    std::memcpy(p, value, size);
    set_flag(p, clock, scope, t, false);
    return;
  }
  drain_for_read(t, p, size);
  auto s = std::make_shared<BufferedStore>();
  s->target = p;
  std::memcpy(s->value, value, size);
  s->bytes = size;
  s->thread = t;
  s->stamp = w.peek(t);
  s->releases = clock;
  s->scope = scope;
  s->site = site;
  s->what = "store";
  ++t->stores_buffered;
  if (buffered.size() > 64)
    std::erase_if(buffered, [](const auto& weak) { auto o = weak.lock(); return !o || o->finished; });
  buffered.push_back(s);
  w.enqueue(s);
}

namespace {

// Read, change, write at one moment; a release sequence goes on through it.
void read_modify_write(void* p, uint32_t size, Order order, Scope scope, Site site, void* old, bool (*change)(void*, const void*), const void* with) {
  World& w = world();
  Thread* t = w.current;
  check_alignment(p, size, site);
  if ((order == Order::release || order == Order::acq_rel) && dropped_here("release", site))
    order = order == Order::release ? Order::relaxed : Order::acquire;
  ++w.progress;
  const bool releases = order == Order::release || order == Order::acq_rel;
  ClockRef clock = releases ? release_clock(t) : t->fence_clock;
  const Scope of = releases ? scope : std::min(scope, t->fence_scope);
  for (auto& weak : buffered)   // an atomic acts on memory: earlier stores to the place, whoever made them, come first
    if (auto s = weak.lock(); s && !s->finished && overlaps(*s, p, size)) w.finish_now(s);
  record(p, size, true, Order::relaxed, site, "atomic");
  if (old) std::memcpy(old, p, size);
  acquire_from(p, order, scope, t);
  if (change(p, with)) set_flag(p, clock, of, t, true);
  if (old) w.poll(site, p, size);   // its result may be spun on
}

}  // namespace

void atomic(Reduce op, Element element, void* p, const void* value, void* old, Order order, Scope scope, Site site) {
  const std::string wrong = atomic_legal(op, element);
  if (!wrong.empty()) {
    report("memory.order", site, wrong);
    world().stop();
  }
  struct With { Reduce op; Element element; const void* value; } with{op, element, value};
  read_modify_write(p, element_bytes(element), order, scope, site, old,
                    [](void* target, const void* w) {
                      const auto& x = *static_cast<const With*>(w);
                      reduce_elements(x.op, x.element, target, x.value, element_bytes(x.element), kGlobalAtomicSubnormals);
                      return true;
                    },
                    &with);
}

void atomic_exchange(void* p, const void* value, void* old, uint32_t size, Order order, Scope scope, Site site) {
  struct With { const void* value; uint32_t size; } with{value, size};
  read_modify_write(p, size, order, scope, site, old,
                    [](void* target, const void* w) {
                      const auto& x = *static_cast<const With*>(w);
                      std::memcpy(target, x.value, x.size);
                      return true;
                    },
                    &with);
}

void atomic_compare_exchange(void* p, const void* expected, const void* value, void* old, uint32_t size, Order order, Scope scope, Site site) {
  struct With { const void *expected, *value; uint32_t size; } with{expected, value, size};
  read_modify_write(p, size, order, scope, site, old,
                    [](void* target, const void* w) {
                      const auto& x = *static_cast<const With*>(w);
                      if (std::memcmp(target, x.expected, x.size) != 0) return false;
                      std::memcpy(target, x.value, x.size);
                      return true;
                    },
                    &with);
}

void forget_buffered_stores() { buffered.clear(); }

}  // namespace emulator
