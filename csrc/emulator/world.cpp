// Running a world: admission of clusters, the scheduler, asynchronous engines, the end of threads and blocks.
#include "world.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "banks.h"
#include "shadow.h"
#include "signals.h"

namespace emulator {

namespace {

World* running_world = nullptr;
std::unique_ptr<World> collecting_world;
Statistics statistics_of_last;
std::vector<DropSite> drops_of_last;
std::vector<Buffer> registered;

}  // namespace

void thread_main();

Options& options() {
  static Options o;
  return o;
}
const Statistics& last_statistics() { return statistics_of_last; }
std::vector<DropSite> last_drop_sites() { return drops_of_last; }
World& world() { return *running_world; }
World* running() { return running_world; }

const Identity& identity() { return running_world->current->identity; }

uint32_t sm_count() { return options().sm_count; }

void register_buffer(const void* begin, size_t bytes, const char* name, bool writable, int rank) {
  auto at = reinterpret_cast<uintptr_t>(begin);
  if (bytes == 0) return;
  for (Buffer& b : registered) {  // two arguments may be views of one storage
    if (at < b.end && b.begin < at + bytes) {
      b.begin = std::min(b.begin, at);
      b.end = std::max(b.end, at + bytes);
      b.writable |= writable;
      b.name += std::string(", ") + name;
      return;
    }
  }
  registered.push_back({at, at + bytes, name, writable, rank, nullptr, 0});
}

void clear_buffers() {
  for (Buffer& b : registered) drop_shadow(b);
  registered.clear();
}

// ---- life of a world ----------------------------------------------------------------------------------------------

uint8_t* window_region() {
  static uint8_t* region = [] {
    void* p = mmap(nullptr, kMaxWindows * kWindowBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: cannot reserve address space for shared memory");
    return static_cast<uint8_t*>(p);
  }();
  return region;
}

World::World(int ranks) : options(emulator::options()), grids(ranks), active(ranks, 0) {
  checking = options.check;
  info.resize(1);  // uid 0 is nobody
  random_state = options.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  for (size_t i = kMaxFibers; i-- > 0;) free_stacks.push_back(i);
  for (size_t i = kMaxWindows; i-- > 0;) free_windows.push_back(i);
}

World::~World() {
  for (auto& b : blocks) mprotect(b->window, kWindowBytes, PROT_NONE);
}

uint64_t World::random() {  // xorshift64*: small, and the same everywhere
  uint64_t x = random_state ? random_state : 1;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  random_state = x;
  return x * 0x2545F4914F6CDD1Dull;
}

void World::mix(uint64_t v) { statistics.digest = (statistics.digest ^ v) * 0x100000001B3ull + (statistics.digest >> 29); }

void World::queue(std::unique_ptr<Grid> grid) {
  grid->rank = selected_rank;
  auto& of_rank = grids[selected_rank];
  grid->sequence = static_cast<uint32_t>(of_rank.size()) + 1;
  of_rank.push_back(std::move(grid));
}

// The grid after the running ones may start when they are finished, or - launched as programmatic - when every block of the
// one before it has passed launch_dependents or ended (PTX ISA: griddepcontrol).
bool World::may_start(int rank, size_t i) const {
  if (i == 0) return true;
  for (size_t k = active[rank]; k + 1 < i; ++k)
    if (!grids[rank][k]->finished()) return false;
  const Grid& before = *grids[rank][i - 1];
  if (before.finished()) return true;
  return grids[rank][i]->shape.programmatic && before.next_block == before.blocks &&
         before.launched_dependents == before.blocks;
}

bool World::admit() {
  if (resident >= options.resident_clusters * grids.size()) return false;
  const int ranks = static_cast<int>(grids.size());
  const int first = ranks > 1 ? static_cast<int>(random(ranks)) : 0;
  for (int k = 0; k < ranks; ++k) {
    const int rank = (first + k) % ranks;
    for (size_t i = active[rank]; i < grids[rank].size() && may_start(rank, i); ++i) {
      if (grids[rank][i]->next_block < grids[rank][i]->blocks) {
        start_cluster(*grids[rank][i]);
        return true;
      }
    }
  }
  return false;
}

void World::start_cluster(Grid& grid) {
  const LaunchShape& shape = grid.shape;
  auto cluster = std::make_unique<Cluster>();
  const uint32_t per_block = shape.block.x * shape.block.y * shape.block.z;
  for (uint32_t r = 0; r < shape.cluster; ++r) {
    auto block = std::make_unique<Block>();
    Block* b = block.get();
    const uint64_t linear = grid.next_block++;
    b->grid = &grid;
    b->cluster = cluster.get();
    b->index = {static_cast<unsigned>(linear % shape.grid.x), static_cast<unsigned>(linear / shape.grid.x % shape.grid.y),
                static_cast<unsigned>(linear / shape.grid.x / shape.grid.y)};
    b->uid = static_cast<uint32_t>(info.size());
    b->rank_in_cluster = r;
    b->threads = b->live = per_block;
    b->actors = per_block + kAsyncSlots;
    b->life = Life::running;
    b->slot_time.assign(kAsyncSlots, 0);
    b->slot_busy.assign(kAsyncSlots, 0);
    b->slot_issuer.assign(kAsyncSlots, 0);
    info.push_back({grid.rank, grid.sequence, b->index, per_block, grid.name});
    if (free_windows.empty()) throw KernelError("emulator: more than 1024 resident blocks; lower resident_clusters");
    b->window_slot = static_cast<uint32_t>(free_windows.back());
    free_windows.pop_back();
    b->window = window_region() + b->window_slot * kWindowBytes;
    window_owner[b->window_slot] = b;
    b->smem_end = kSmemStart + static_cast<uint32_t>(shape.smem_bytes);
    const size_t bytes = (b->smem_end + 4095) & ~size_t{4095};
    if (mprotect(b->window, bytes, PROT_READ | PROT_WRITE) != 0)
      throw std::runtime_error("emulator: cannot map shared memory");
    std::memset(b->window, 0xFF, bytes);  // fp32, bf16 and e4m3 NaN: what was never written shows in results
    clear_window_shadow(*b);

    const int64_t at_launch = std::min<int64_t>(255, 65536 / per_block / 8 * 8);
    b->free_registers = 65536 - at_launch * per_block;
    const uint32_t warps = (per_block + 31) / 32;
    for (uint32_t g = 0; g < (warps + 3) / 4; ++g) b->warpgroup.push_back(std::make_unique<Warpgroup>());
    // Everything of earlier grids of this rank is before this one, except - under PDL - the last one.
    uint32_t before = grid.sequence - 1;
    if (shape.programmatic && before > 0 && !grids[grid.rank][before - 1]->finished()) --before;
    ClockRef start = with_finished(ClockRef(), grid.rank, before);
    for (uint32_t w = 0; w < warps; ++w) {
      auto warp = std::make_unique<Warp>();
      warp->block = b;
      warp->index = w;
      warp->group = b->warpgroup[w / 4].get();
      for (uint32_t lane = 0; lane < 32 && w * 32 + lane < per_block; ++lane) {
        const uint32_t t = w * 32 + lane;
        auto thread = std::make_unique<Thread>();
        Thread* p = thread.get();
        p->identity.thread = {t % shape.block.x, t / shape.block.x % shape.block.y, t / shape.block.x / shape.block.y};
        p->identity.block = b->index;
        p->identity.block_dim = shape.block;
        p->identity.grid_dim = shape.grid;
        p->identity.cluster_rank = r;
        p->identity.cluster_size = shape.cluster;
        p->identity.lane = lane;
        p->identity.warp = w;
        p->warp = warp.get();
        p->block = b;
        p->actor = t;
        p->seen = start;
        p->registers = static_cast<uint32_t>(at_launch);
        if (free_stacks.empty()) throw KernelError("emulator: more than 16384 resident threads; lower resident_clusters");
        prepare_fiber(p->fiber, free_stacks.back(), thread_main);
        free_stacks.pop_back();
        warp->threads.push_back(p);
        b->thread.push_back(p);
        threads.push_back(std::move(thread));
        make_ready(p);
      }
      const uint64_t priority = random();
      for (Thread* t : warp->threads) t->priority = priority;
      b->warp.push_back(std::move(warp));
    }
    cluster->block.push_back(b);
    blocks.push_back(std::move(block));
  }
  cluster->live = cluster->expected = shape.cluster * per_block;
  clusters.push_back(std::move(cluster));
  ++resident;
  ++progress;
}

void thread_main() {
  Thread* t = running_world->current;
  Grid& grid = *t->block->grid;
  grid.body(grid.aligned_arguments);
  running_world->end_thread(t);
  switch_to_scheduler(t->fiber);
  __builtin_unreachable();
}

void World::end_thread(Thread* t) {
  t->finished = true;
  ++progress;
  Block* b = t->block;
  t->warp->exited |= 1u << t->identity.lane;
  drain_before_release(t);
  if (!t->wgmma_open.empty() || !t->wgmma_groups.empty())
    report("wgmma.unfinished", t->wait_site, "ends while a wgmma is in flight: its results were never waited for "
           "(wgmma_wait<0> before the end; PTX ISA: wgmma.wait_group)");
  // That the engine happens to have read already does not count: the thread has not waited.
  for (size_t g = t->bulk_groups_read; g < t->bulk_groups.size(); ++g)
    for (const Operation& op : t->bulk_groups[g])
      report("bulk.unread_at_exit", op->site, "its thread ends while the bulk store may still read shared memory (bulk_wait_read "
             "before the end; PTX ISA: cp.async.bulk.wait_group)");
  if (!t->bulk_open.empty())
    report("bulk.uncommitted", t->bulk_open.front()->site, "a bulk store was issued and never committed (bulk_commit)");
  if (checking && !b->remote_touches.empty()) b->seen_at_end = join(b->seen_at_end, t->seen);
  cluster_thread_ends(t);
  warp_lane_ends(t);
  if (--b->live == 0) end_block(b);
  // A barrier may now be complete without this thread; hardware counts arrivals only, so nothing to do there.
}

void Block::touched(const Epoch& who, Site site, const char* what) {
  remote_touches[uint64_t{who.block} << 32 | who.actor] = {who, site, what};
}

// Another CTA's access to this one's memory must be ordered before the end, by a cluster barrier or by a wait for what the
// access announces; that it happened to come earlier in this run does not count (PTX ISA: "Distributed shared memory").
static void check_remote_touches(World& w, Block* b) {
  if (b->remote_touches.empty() || !w.rule("smem.dead_block")) return;
  const Clock* seen = b->seen_at_end.get();
  for (const auto& [key, touch] : b->remote_touches) {
    const BlockClock* part = seen ? seen->find(touch.who.block) : nullptr;
    if (part && part->generic[touch.who.actor] >= touch.who.time) continue;
    w.hazard("smem.dead_block", "end" + at(touch.site), where(touch.who) + " at " + at(touch.site) + ": " + touch.what +
             " reaches block " + place_of_block(b) + ", whose end is not ordered after it: a cluster barrier before the end would do it "
             "(PTX ISA: Distributed shared memory)");
  }
}

void World::end_block(Block* b) {
  Grid& grid = *b->grid;
  check_remote_touches(*this, b);
  for (size_t g = 0; g < b->warpgroup.size(); ++g)
    for (size_t t = g * 128; t < std::min<size_t>((g + 1) * 128, b->thread.size()); ++t)
      if (b->thread[t]->registers != b->thread[g * 128]->registers) {
        hazard("registers", "registers of a warpgroup " + at(b->thread[t]->registers_site) + at(b->thread[g * 128]->registers_site),
               where(b->thread[t]) + " ends with a budget of " + std::to_string(b->thread[t]->registers) + " registers, the first thread of its "
               "warpgroup with " + std::to_string(b->thread[g * 128]->registers) + ": all four warps execute the same setmaxnreg (last at " +
               at(b->thread[t]->registers_site) + " and " + at(b->thread[g * 128]->registers_site) + "; PTX ISA: setmaxnreg)");
        break;
      }
  if (!b->dependents_launched) {
    b->dependents_launched = true;
    ++grid.launched_dependents;
  }
  b->life = Life::finished;
  for (auto& [address, m] : b->mbarriers)
    if (m.initialised && m.tx != 0)
      report("mbarrier.unbalanced", m.init_site, "the block ends with tx-count " + std::to_string(m.tx) + " in the mbarrier at " +
             place(b->window + address) + ": bytes expected and bytes copied differ");
  if (++grid.finished_blocks == grid.blocks)   // a grid is complete when its bulk stores are
    for (size_t i = 0; i < pending.size(); ++i) {
      const Operation op = pending[i];
      if (info[op->epoch.block].rank == grid.rank && info[op->epoch.block].grid_sequence == grid.sequence) finish_now(op);
    }
  Cluster* c = b->cluster;
  c->live -= b->threads;
  if (c->live == 0) --resident;
}

// After its threads have left their stacks, a finished cluster gives back its memory.
static void recycle(World& w) {
  for (auto& cluster : w.clusters) {
    if (!cluster || cluster->live) continue;
    bool in_flight = false;
    for (Block* b : cluster->block)
      for (uint8_t busy : b->slot_busy) in_flight |= busy;
    if (in_flight) continue;
    for (Block* b : cluster->block) {
      mprotect(b->window, kWindowBytes, PROT_NONE);
      w.free_windows.push_back(b->window_slot);
      w.window_owner[b->window_slot] = nullptr;
      for (Thread* t : b->thread)
        w.free_stacks.push_back((t->fiber.stack - stack_region()) / (kStackBytes + kGuardBytes));
    }
    for (Block* b : cluster->block) {
      auto gone = [b](const auto& t) { return t->block == b; };
      w.threads.erase(std::remove_if(w.threads.begin(), w.threads.end(), gone), w.threads.end());
    }
    for (Block* b : cluster->block)
      w.blocks.erase(std::find_if(w.blocks.begin(), w.blocks.end(), [b](const auto& p) { return p.get() == b; }));
    cluster.reset();
  }
  w.clusters.erase(std::remove(w.clusters.begin(), w.clusters.end(), nullptr), w.clusters.end());
}

// ---- scheduling ---------------------------------------------------------------------------------------------------

void World::make_ready(Thread* t) {
  t->wait = Wait::none;
  t->ready = true;
  ++progress;
  ready.push_back(t);
}

void World::wait(Wait kind, const void* object, uint64_t detail, Site site) {
  Thread* t = current;
  t->wait = kind;
  t->wait_object = object;
  t->wait_detail = detail;
  t->wait_site = site;
  ++statistics.switches;
  switch_to_scheduler(t->fiber);
}

void World::poll(Site site, const void* looks_at, uint32_t size) {
  Thread* t = current;
  t->wait = Wait::polling;
  t->wait_object = looks_at;
  t->wait_detail = size;
  t->wait_site = site;
  ++spins;
  ready.push_back(t);
  t->ready = true;
  ++statistics.switches;
  switch_to_scheduler(t->fiber);
}

void World::stop() {
  fatal = true;
  switch_to_scheduler(current->fiber);
  __builtin_unreachable();
}

Thread* World::pick() {
  if (ready.empty()) return nullptr;
  size_t i = 0;
  switch (options.schedule) {
    case Schedule::fifo: break;
    case Schedule::random: i = random(static_cast<uint32_t>(ready.size())); break;
    case Schedule::starve: {
      // One warp or one block waits as long as anybody else can run; the victim changes now and then.
      if (steps >= starve_until_) {
        // By number: the address of a finished warp may serve a new one.
        const Thread* t = ready[random(static_cast<uint32_t>(ready.size()))];
        starved_block_ = t->block->uid;
        starved_warp_ = random(2) ? t->identity.warp : kWholeBlock;
        starve_until_ = steps + 200 + random(4000);
      }
      i = random(static_cast<uint32_t>(ready.size()));
      for (size_t k = 0; k < ready.size(); ++k, i = (i + 1) % ready.size())
        if ((ready[i]->block->uid != starved_block_ || (starved_warp_ != kWholeBlock && ready[i]->identity.warp != starved_warp_)) &&
            ready[i]->wait != Wait::polling)
          break;
      break;
    }
    case Schedule::pct: {
      if (steps >= pct_change_) {  // a priority change point
        ready[random(static_cast<uint32_t>(ready.size()))]->priority = random() >> 32;
        pct_change_ = steps + 100 + random(2000);
      }
      // Those who only poll come last, or the highest priority could spin for ever.
      auto value = [](const Thread* t) { return t->wait == Wait::polling ? 0 : t->priority | 1; };
      i = random(static_cast<uint32_t>(ready.size()));
      for (size_t k = 0, j = i; k < ready.size(); ++k, j = (j + 1) % ready.size())
        if (value(ready[j]) > value(ready[i])) i = j;
      break;
    }
  }
  Thread* t = ready[i];
  if (options.schedule == Schedule::fifo) {
    ready.erase(ready.begin());
  } else {
    ready[i] = ready.back();
    ready.pop_back();
  }
  t->ready = false;
  return t;
}

void World::enqueue(Operation op) {
  op->queued = true;
  if (options.asynchrony == Asynchrony::eager) {
    finish_now(op);
  } else {
    pending.push_back(std::move(op));
  }
}

void World::finish_now(const Operation& op) {
  while (!op->finished) {
    op->act();
    ++statistics.async_operations;
    ++progress;
  }
}

bool World::act_once() {
  if (pending.empty()) return false;
  const size_t i = random(static_cast<uint32_t>(pending.size()));
  Operation op = pending[i];
  mix(i + 0x51ED);
  if (!op->finished) {
    op->act();
    ++statistics.async_operations;
    ++progress;
  }
  if (op->finished) {
    pending[i] = pending.back();
    pending.pop_back();
  }
  return true;
}

void World::run_all_pending() {
  while (act_once()) {
  }
}

void World::run() {
  running_world = this;
  const auto start = std::chrono::steady_clock::now();
  auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  for (Buffer& b : registered) b.shadow = nullptr;
  SignalGuard guard;
  uint64_t last_progress = 0, last_timer_reads = 0;
  while (!fatal) {
    while (admit()) {
    }
    ++steps;
    if (!pending.empty() && options.asynchrony == Asynchrony::random && random(16) == 0) act_once();
    // Spinning threads see no progress: nothing will change unless an engine acts.
    if (spins > 64 + 8 * ready.size()) {
      spins = 0;
      if (act_once() || progress != last_progress) {
      } else if (timer_reads != last_timer_reads && leapt < uint64_t{1} << 50) {
        last_timer_reads = timer_reads;   // they wait for a deadline
        leapt = leapt ? 2 * leapt : 1000;
      } else {
        hazard("livelock", "livelock", "every thread that can run only polls, and nothing is left that could change what they see\n" +
               describe_waits());
        fatal = true;
        break;
      }
      last_progress = progress;
    }
    Thread* t = pick();
    if (!t) {
      if (act_once()) continue;
      bool unfinished = false;
      for (auto& of_rank : grids)
        for (auto& g : of_rank) unfinished |= !g->finished();
      if (!unfinished) break;
      if (resident == 0 && admit()) continue;
      hazard("deadlock", "deadlock", "no thread can run and no engine has work left\n" + describe_waits());
      fatal = true;
      break;
    }
    mix(t->actor * 2654435761u + t->block->uid);
    if (t->wait != Wait::polling) spins = spins > 0 ? spins - 1 : 0;
    t->wait = t->wait == Wait::polling ? Wait::none : t->wait;
    current = t;
    switch_to_fiber(t->fiber);
    current = nullptr;
    if (t->finished && t->block->cluster->live == 0) {
      recycle(*this);
      for (size_t r = 0; r < grids.size(); ++r)
        while (active[r] < grids[r].size() && grids[r][active[r]]->finished()) ++active[r];
    }
    if (options.step_budget && steps > options.step_budget) {
      hazard("step_budget", "budget", "more than " + std::to_string(options.step_budget) + " scheduler steps (Options::step_budget)\n" +
             describe_waits());
      fatal = true;
    }
    if ((steps & 0xFFF) == 0 && seconds() > options.deadline_seconds) {
      hazard("deadline", "deadline", "the run took longer than " + std::to_string(options.deadline_seconds) + " s\n" + describe_waits());
      fatal = true;
    }
  }
  if (fatal && reports.empty())
    reports.push_back("[stopped] the kernel could not go on, and the rule that says why is switched off (Options::off)\n");
  run_all_pending_after_end();
  statistics.seconds = seconds();
  statistics.clock_entries = take_clock_entries();
  close_banks(statistics);
  statistics_of_last = statistics;
  drops_of_last.clear();
  for (auto& [key, count] : drops) drops_of_last.push_back({key.first, key.second, count});
  for (Buffer& b : registered) drop_shadow(b);
  forget_clocks();
  forget_buffered_stores();
  forget_moves();
  running_world = nullptr;
  if (!reports.empty()) {
    std::string text = std::to_string(reports.size()) + (reports.size() == 1 ? " hazard" : " hazards") + " in ";
    std::set<std::string> names;
    for (auto& of_rank : grids)
      for (auto& g : of_rank) names.insert(g->name);
    for (auto& n : names) text += n + " ";
    static const char* asynchrony_names[] = {"eager", "random", "lazy"};
    static const char* schedule_names[] = {"fifo", "random", "starve", "pct"};
    text += "(replay: seed=" + std::to_string(options.seed) + ", asynchrony=" +
            asynchrony_names[static_cast<int>(options.asynchrony)] + ", schedule=" +
            schedule_names[static_cast<int>(options.schedule)] + ")\n";
    for (auto& r : reports) text += "\n" + r;
    throw KernelError(text);
  }
}

// Engines finish what was begun, so that outputs are complete; after a fatal report nothing is touched any more.
void World::run_all_pending_after_end() {
  if (!fatal) run_all_pending();
}

// ---- launching ------------------------------------------------------------------------------------------------------

void launch(const LaunchShape& shape, ThreadBody body, const void* arguments, size_t bytes) {
  const uint64_t per_block = uint64_t{shape.block.x} * shape.block.y * shape.block.z;
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  auto refuse = [&](const std::string& why) { throw KernelError(std::string("launch of ") + shape.name + ": " + why); };
  if (per_block == 0 || per_block > 1024) refuse("block of " + std::to_string(per_block) + " threads (1..1024)");
  if (per_block % 32) refuse("block of " + std::to_string(per_block) + " threads (whole warps only)");
  if (blocks == 0) refuse("empty grid");
  if (shape.cluster == 0 || shape.cluster > 16 || shape.grid.x % shape.cluster)
    refuse("cluster of " + std::to_string(shape.cluster) + " along a grid of " + std::to_string(shape.grid.x));
  if (shape.smem_bytes + kSmemStart > kMaxSmem)
    refuse(std::to_string(shape.smem_bytes) + " bytes of shared memory (at most 232448)");
  auto grid = std::make_unique<Grid>();
  grid->shape = shape;
  grid->name = shape.name ? shape.name : "kernel";
  grid->shape.name = nullptr;
  grid->body = body;
  grid->blocks = blocks;
  grid->arguments.resize(bytes + 128);
  auto base = reinterpret_cast<uintptr_t>(grid->arguments.data());
  grid->aligned_arguments = grid->arguments.data() + ((128 - base % 128) % 128);
  std::memcpy(grid->aligned_arguments, arguments, bytes);
  if (collecting_world) {
    collecting_world->queue(std::move(grid));
    return;
  }
  if (running_world) throw KernelError("launch from inside a kernel: dynamic parallelism is not emulated");
  World w(1);
  w.queue(std::move(grid));
  w.run();
}

void begin_world(int ranks) {
  if (ranks < 1 || ranks > 64) throw KernelError("begin_world: ranks must be 1..64; got " + std::to_string(ranks));
  collecting_world = std::make_unique<World>(ranks);
}
void select_rank(int rank) {
  if (!collecting_world || rank < 0 || rank >= static_cast<int>(collecting_world->grids.size()))
    throw KernelError("select_rank: no world is being collected, or rank " + std::to_string(rank) + " is not in it");
  collecting_world->selected_rank = rank;
}
void run_world() {
  if (!collecting_world) throw KernelError("run_world: begin_world was not called");
  auto w = std::move(collecting_world);
  w->run();
}
void abandon_world() { collecting_world.reset(); }

// ---- clocks of threads ------------------------------------------------------------------------------------------------

Stamp World::peek(const Thread* t) const { return {t->seen, {t->block->uid, t->actor, t->time}, t->async_time}; }

Stamp World::stamp(Thread* t) {
  Stamp s = peek(t);
  ++t->time;
  return s;
}

void World::acquire(Thread* t, const ClockRef& c) {
  if (checking) t->seen = join(t->seen, c);
}

Epoch World::take_slot(Thread* t) {
  Block* b = t->block;
  const BlockClock* mine = checking && t->seen ? t->seen->find(b->uid) : nullptr;
  // A slot whose last operation the issuer has waited for can be told apart from it; failing that, any idle one.
  int64_t chosen = -1;
  for (uint32_t k = 0; k < kAsyncSlots && chosen < 0; ++k) {
    const uint32_t s = (b->next_slot + k) % kAsyncSlots;
    if (!b->slot_busy[s] && (b->slot_time[s] == 0 || (mine && mine->generic[b->threads + s] >= b->slot_time[s]))) chosen = s;
  }
  for (uint32_t k = 0; k < kAsyncSlots && chosen < 0; ++k) {
    const uint32_t s = (b->next_slot + k) % kAsyncSlots;
    if (!b->slot_busy[s]) chosen = s;
  }
  if (chosen < 0) chosen = b->next_slot % kAsyncSlots;  // all in flight: precision is lost, not correctness
  const auto s = static_cast<uint32_t>(chosen);
  b->next_slot = s + 1;
  ++b->slot_busy[s];
  b->slot_issuer[s] = t->actor;
  b->slot_time[s] += 2;  // even: sources read; odd (+1): everything done
  return {b->uid, b->threads + s, b->slot_time[s]};
}

void World::release_slot(Block* b, const Epoch& e) {
  const uint32_t s = e.actor - b->threads;
  b->slot_time[s] = std::max(b->slot_time[s], e.time + 1);
  --b->slot_busy[s];
}

void World::observe(Thread* t, const Epoch& e, bool async) {
  if (checking) t->seen = with_entry(t->seen, e, info[e.block].threads + kAsyncSlots, async);
}

Block* World::block_of(const void* p) const {
  const auto off = static_cast<size_t>(static_cast<const uint8_t*>(p) - window_region());
  if (off >= kMaxWindows * kWindowBytes) return nullptr;
  Block* b = window_owner[off / kWindowBytes];
  return b && b->life == Life::running ? b : nullptr;
}

Block* World::ended_block_of(const void* p) const {
  const auto off = static_cast<size_t>(static_cast<const uint8_t*>(p) - window_region());
  if (off >= kMaxWindows * kWindowBytes) return nullptr;
  Block* b = window_owner[off / kWindowBytes];
  return b && b->life == Life::finished ? b : nullptr;
}

uint32_t World::shared_offset(const void* p) const {
  return static_cast<uint32_t>((static_cast<const uint8_t*>(p) - window_region()) % kWindowBytes);
}

Buffer* World::buffer_of(uintptr_t a) {
  static size_t last = 0;
  if (last < registered.size() && a >= registered[last].begin && a < registered[last].end) return &registered[last];
  for (size_t i = 0; i < registered.size(); ++i)
    if (a >= registered[i].begin && a < registered[i].end) {
      last = i;
      return &registered[i];
    }
  return nullptr;
}

Buffer* World::buffer_near(uintptr_t a) {
  Buffer* nearest = nullptr;
  uintptr_t best = 8192;
  for (Buffer& b : registered) {
    const uintptr_t distance = a >= b.end ? a - b.end : b.begin - a;
    if (distance < best) {
      best = distance;
      nearest = &b;
    }
  }
  return nearest;
}

}  // namespace emulator
