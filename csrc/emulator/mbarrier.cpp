// mbarrier objects. PTX ISA: "mbarrier". Their state lives beside shared memory, keyed by address: a stray write over a
// barrier is reported by shadow memory, and a report can say where it was initialised.
#include "shadow.h"

namespace emulator {

MbarrierState* find_mbarrier(const void* p, Site site, const char* what) {
  World& w = world();
  Block* b = w.block_of(p);
  if (!b) {
    if (w.ended_block_of(p))
      report("smem.dead_block", site, std::string(what) + " of an mbarrier of a block that has ended: a cluster barrier must keep it alive "
             "(PTX ISA: Distributed shared memory)");
    else
      report("mbarrier.misuse", site, std::string(what) + " of an mbarrier at " + place(p) + ": not shared memory of a running block");
    w.stop();
  }
  auto it = b->mbarriers.find(w.shared_offset(p));
  if (it == b->mbarriers.end() || !it->second.initialised) {
    report("mbarrier.uninitialised", site, std::string(what) + " of the mbarrier at " + place(p) + ", which is not initialised");
    w.stop();
  }
  MbarrierState& m = it->second;
  if (w.rule("mbarrier.uninitialised") && w.current) {
    const Stamp s = w.peek(w.current);
    const BlockClock* part = s.seen ? s.seen->find(m.init_epoch.block) : nullptr;
    const bool own = m.init_epoch.block == s.self.block && m.init_epoch.actor == s.self.actor;
    if (!own && !(part && part->generic[m.init_epoch.actor] >= m.init_epoch.time))
      report("mbarrier.uninitialised", site, std::string(what) + " of the mbarrier at " + place(p) + " is not ordered after its initialisation at " +
             at(m.init_site) + " (a barrier is missing)");
  }
  return &m;
}

namespace {

// A phase completes when nobody is awaited and no bytes are outstanding.
void complete_if_due(MbarrierState& m) {
  World& w = world();
  if (m.pending != 0 || m.tx != 0) return;
  ++m.phase;
  m.pending = m.count;
  m.released = w.checking ? m.release.take() : ClockRef();
  ++w.progress;
  std::vector<Thread*> still;
  for (Thread* t : m.waiting) {
    if ((m.phase & 1) != t->wait_detail) {
      w.acquire(t, m.released);
      w.make_ready(t);
    } else {
      still.push_back(t);
    }
  }
  m.waiting.swap(still);
}

void count_arrivals(MbarrierState& m, uint32_t count, Site site) {
  if (count == 0 || count > m.pending) {
    report("mbarrier.misuse", site, "arrives " + std::to_string(count) + " times at an mbarrier (init " + at(m.init_site) + ") that expects " +
           std::to_string(m.pending) + " more in this phase");
    world().stop();
  }
  m.pending -= count;
}

// Waiting for another CTA's barrier does not exist (PTX ISA: mbarrier.test_wait, "shared::cta").
MbarrierState& own_mbarrier(const void* p, Site site, const char* what) {
  MbarrierState& m = *find_mbarrier(p, site, what);
  if (m.block != me()->block) {
    report("mbarrier.misuse", site, std::string(what) + " of the mbarrier at " + place(p) + ": only arrivals reach another CTA's barrier");
    world().stop();
  }
  return m;
}

}  // namespace

uint64_t mbarrier_phase(const MbarrierState& m) { return m.phase; }

void mbarrier_init(Mbarrier* p, uint32_t count, Site site) {
  World& w = world();
  Thread* t = w.current;
  Block* b = w.block_of(p);
  if (!b || b != t->block) {
    report("mbarrier.misuse", site, "initialises an mbarrier at " + place(p) + ": must be the block's own shared memory");
    w.stop();
  }
  if (reinterpret_cast<uintptr_t>(p) % 8 || count == 0 || count >= (1u << 20)) {
    report("mbarrier.misuse", site, "mbarrier at " + place(p) + " with count " + std::to_string(count) + ": 8-byte aligned, count 1..2^20-1");
    w.stop();
  }
  MbarrierState& m = b->mbarriers[w.shared_offset(p)];
  if (m.initialised)
    report("mbarrier.misuse", site, "initialises the mbarrier at " + place(p) + " again (first at " + at(m.init_site) + "): invalidate it first");
  m = MbarrierState{};
  m.count = m.pending = count;
  m.init_site = site;
  m.block = b;
  m.initialised = true;
  m.init_epoch = {b->uid, t->actor, t->time};
  access(p, 8, generic_access(t, true, site, "mbarrier_init"));
}

void mbarrier_invalidate(Mbarrier* p, Site site) { find_mbarrier(p, site, "mbarrier_invalidate")->initialised = false; }

void mbarrier_arrive(Mbarrier* p, uint32_t count, Site site) {
  if (dropped_here("mbarrier_arrive", site)) return;
  World& w = world();
  MbarrierState& m = *find_mbarrier(p, site, "arrive");
  drain_before_release(w.current);
  if (m.block != w.current->block) m.block->touched(w.peek(w.current).self, site, "its arrival");
  if (w.checking) m.release.add(w.stamp(w.current), w.current->block->actors);
  count_arrivals(m, count, site);
  ++w.progress;
  complete_if_due(m);
}

void mbarrier_expect_tx(Mbarrier* p, uint32_t bytes, Site site) {
  if (dropped_here("mbarrier_expect_tx", site)) return;
  MbarrierState& m = own_mbarrier(p, site, "expect_tx");
  m.tx += bytes;
  ++world().progress;
}

void mbarrier_arrive_expect_tx(Mbarrier* p, uint32_t bytes, Site site) {
  if (!dropped_here("expect_tx", site)) mbarrier_expect_tx(p, bytes, site);
  mbarrier_arrive(p, 1, site);
}

bool mbarrier_test_wait(Mbarrier* p, uint32_t parity, Site site) {
  World& w = world();
  MbarrierState& m = own_mbarrier(p, site, "test_wait");
  if ((m.phase & 1) != (parity & 1)) {
    w.acquire(w.current, m.released);
    return true;
  }
  w.poll(site, p);
  return false;
}

void mbarrier_wait(Mbarrier* p, uint32_t parity, Site site) {
  if (dropped_here("mbarrier_wait", site)) return;
  World& w = world();
  MbarrierState& m = own_mbarrier(p, site, "wait");
  if ((m.phase & 1) != (parity & 1)) {
    w.acquire(w.current, m.released);
    return;
  }
  m.waiting.push_back(w.current);
  w.wait(Wait::mbarrier, p, parity & 1, site);
}

void mbarrier_complete_tx(MbarrierState& m, uint32_t bytes, const Epoch& e, uint32_t actors) {
  m.tx -= bytes;
  if (world().checking) m.release.add_entry(e, actors);
  complete_if_due(m);
}

void mbarrier_arrive_by_operation(MbarrierState& m, const std::vector<Epoch>& moments, uint32_t actors) {
  if (world().checking)
    for (const Epoch& e : moments) m.release.add_entry(e, actors, false);
  if (m.pending == 0) {
    world().hazard("mbarrier.misuse", "cp.async arrive" + at(m.init_site), "a cp.async arrival comes to an mbarrier (init " + at(m.init_site) +
                   ") that expects no more in this phase: with no_increment each thread's arrival must be counted by mbarrier_init");
    return;
  }
  --m.pending;
  complete_if_due(m);
}

}  // namespace emulator
