// Named barriers of a block, the cluster barrier, setmaxnreg and grid dependencies.
// PTX ISA: "barrier{.cta}", "barrier.cluster", "setmaxnreg", "griddepcontrol".
#include <algorithm>

#include "world.h"

namespace emulator {
namespace {

// Completes the barrier when everybody has come: their releases become one clock that all of those who wait acquire.
void arrive(uint32_t id, uint32_t count, bool waits, Site site) {
  World& w = world();
  Thread* t = w.current;
  Block* b = t->block;
  if (id >= 16) {
    report("barrier.count", site, "barrier " + std::to_string(id) + " of 16");
    w.stop();
  }
  NamedBarrier& n = b->barrier[id];
  if (count == 0 || count % 32 || count > ((b->threads + 31) / 32) * 32) {
    report("barrier.count", site, "barrier " + std::to_string(id) + " for " + std::to_string(count) +
           " threads: must be a multiple of 32, at most the block's " + std::to_string(b->threads));
    w.stop();
  }
  if (n.arrived == 0) {
    n.expected = count;
    n.site = site;
    n.members.clear();
  } else if (n.expected != count) {
    report("barrier.count", site, "barrier " + std::to_string(id) + " for " + std::to_string(count) + " threads, but " + at(n.site) +
           " arrived at it for " + std::to_string(n.expected));
    w.stop();
  }
  if (std::find(n.members.begin(), n.members.end(), t->identity.warp) == n.members.end()) n.members.push_back(t->identity.warp);
  if (w.checking) n.release.add(w.stamp(t), b->actors);
  if (++n.arrived < n.expected) {
    if (!waits) return;
    n.waiting.push_back(t);
    w.wait(Wait::barrier, &n, id, site);
    return;
  }
  // Two groups that share one id by mistake still complete it now and then; the mixture of warps gives them away.
  std::sort(n.members.begin(), n.members.end());
  if (n.first_members.empty()) {
    n.first_members = n.members;
  } else if (n.first_members != n.members && w.rule("barrier.members")) {
    report("barrier.members", site, "barrier " + std::to_string(id) + " is completed by other warps than before: two groups must not "
           "share one barrier");
  }
  const ClockRef clock = w.checking ? n.release.take() : ClockRef();
  ++n.generation;
  n.arrived = 0;
  ++w.progress;
  std::vector<Thread*> waiting;
  waiting.swap(n.waiting);
  for (Thread* other : waiting) {
    w.acquire(other, clock);
    w.make_ready(other);
  }
  if (waits) w.acquire(t, clock);
}

}  // namespace

void barrier_sync(uint32_t id, uint32_t threads, Site site) {
  if (dropped_here("barrier_sync", site)) return;
  drain_before_release(me());
  arrive(id, threads, true, site);
}

void barrier_arrive(uint32_t id, uint32_t threads, Site site) {
  if (dropped_here("barrier_arrive", site)) return;
  drain_before_release(me());
  arrive(id, threads, false, site);
}

namespace {

void complete_if_due(Cluster& c) {
  World& w = world();
  if (c.arrived < c.expected) return;
  c.arrived = 0;
  ++c.generation;
  c.released = w.checking ? c.release.take() : ClockRef();
  ++w.progress;
  std::vector<Thread*> waiting;
  waiting.swap(c.waiting);
  for (Thread* other : waiting) {
    w.acquire(other, c.released);
    w.make_ready(other);
  }
}

}  // namespace

void cluster_arrive(bool release, Site site) {
  if (dropped_here("cluster_arrive", site)) return;
  World& w = world();
  Thread* t = w.current;
  Cluster& c = *t->block->cluster;
  auto [it, fresh] = c.arrived_generation.try_emplace(t, 0);
  if (!fresh && it->second == c.generation + 1) {
    report("cluster.order", site, "arrives twice at the cluster barrier without a wait between");
    w.stop();
  }
  it->second = c.generation + 1;
  if (release) drain_before_release(t);
  if (w.checking && release) c.release.add(w.stamp(t), t->block->actors);
  ++w.progress;
  ++c.arrived;
  complete_if_due(c);
}

// PTX ISA "barrier.cluster": it waits for all non-exited threads.
void cluster_thread_ends(Thread* t) {
  Cluster& c = *t->block->cluster;
  --c.expected;
  auto it = c.arrived_generation.find(t);
  if (it != c.arrived_generation.end() && it->second == c.generation + 1) --c.arrived;
  if (c.arrived > 0) complete_if_due(c);
}

void cluster_wait(Site site) {
  if (dropped_here("cluster_wait", site)) return;
  World& w = world();
  Thread* t = w.current;
  Cluster& c = *t->block->cluster;
  auto it = c.arrived_generation.find(t);
  if (it == c.arrived_generation.end()) {
    report("cluster.order", site, "waits at the cluster barrier without having arrived");
    w.stop();
  }
  if (it->second > c.generation) {
    c.waiting.push_back(t);
    w.wait(Wait::cluster, &c, 0, site);
  } else {
    w.acquire(t, c.released);
  }
}
void* map_shared(const void* p, uint32_t rank, Site site) {
  World& w = world();
  Block* b = w.current->block;
  if (rank >= b->cluster->block.size()) {
    report("smem.bounds", site, "map_shared to CTA " + std::to_string(rank) + " of a cluster of " + std::to_string(b->cluster->block.size()));
    w.stop();
  }
  return b->cluster->block[rank]->window + shared_address(p, site);
}

uint8_t* dynamic_smem() { return me()->block->window + kSmemStart; }

uint32_t shared_address(const void* p, Site site) {
  World& w = world();
  if (!w.block_of(p)) {
    report("smem.bounds", site, place(p) + " is not shared memory of a running block");
    w.stop();
  }
  return w.shared_offset(p);
}

void set_max_registers(bool increase, uint32_t count, Site site) {
  World& w = world();
  Thread* t = w.current;
  Block* b = t->block;
  if (count < 24 || count > 256 || count % 8) {
    report("registers", site, "setmaxnreg " + std::to_string(count) + ": must be a multiple of 8 in 24..256");
    w.stop();
  }
  if (increase ? count < t->registers : count > t->registers)
    report("registers", site, std::string("setmaxnreg.") + (increase ? "inc" : "dec") + " from " + std::to_string(t->registers) + " to " +
           std::to_string(count));
  const auto delta = static_cast<int64_t>(count) - static_cast<int64_t>(t->registers);
  while (delta > b->free_registers) w.poll(site);  // waits until others have given theirs back
  b->free_registers -= delta;
  t->registers = count;
  t->registers_site = site;
  ++w.progress;
}

void grid_dependency_wait(Site site) {
  if (dropped_here("grid_dependency_wait", site)) return;
  World& w = world();
  Thread* t = w.current;
  Grid* g = t->block->grid;
  if (g->sequence == 1) return;
  Grid* before = w.grids[g->rank][g->sequence - 2].get();
  while (!before->finished()) w.poll(site);
  if (w.checking) t->seen = with_finished(t->seen, static_cast<uint32_t>(g->rank), before->sequence);
}

void grid_dependency_launch(Site) {
  World& w = world();
  Block* b = w.current->block;
  if (b->dependents_launched) return;  // the first thread of the block counts; the instruction may be repeated
  b->dependents_launched = true;
  ++b->grid->launched_dependents;
  ++w.progress;
}

// 100 ns a scheduler step; when only time can change what pollers see, it leaps (World::run).
uint64_t global_timer() {
  World& w = world();
  ++w.timer_reads;
  return w.steps * 100 + w.leapt;
}

void trap(const char* message, Site site) {
  report("trap", site, std::string("the kernel trapped: ") + message);
  world().stop();
}

}  // namespace emulator
