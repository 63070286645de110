// wgmma: logged lane by lane, issued when all 128 have come, executed in order by the warpgroup's engine.
// PTX ISA: "wgmma.mma_async", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group".
//
// From issue to wait the accumulators belong to the tensor core: the threads' registers are filled with NaN, and a wait
// gives them back. So a missing wait shows in results even without instrumentation, and by name with it.
#include <algorithm>
#include <cstring>

#include "fragments.h"
#include "shadow.h"
#include "tensor_core.h"
#include "wgmma_operands.h"

namespace emulator {

struct WgmmaOperation : AsyncOperation {
  WgmmaShape shape{};
  uint64_t a_descriptor = 0, b_descriptor = 0;
  bool a_in_registers = false, accumulate = false;
  uint32_t logged = 0;
  std::shared_ptr<AccumulatorTile> tile;
  std::vector<uint8_t> a_values;          // 64 x 32 bytes, from registers
  std::array<Stamp, 128> stamps;          // what each lane had seen when it issued
  Block* block = nullptr;
  Warpgroup* group = nullptr;
  uint32_t group_index = 0;
  std::vector<Thread*> waiting;

  void act() override;
};

namespace {

constexpr uint32_t kOwned = 0x7fbadbad;   // a NaN that says "the tensor core owns me"

uint32_t thread_in_group(const Thread* t) { return t->actor % 128; }

Warpgroup& group_of(Thread* t, Site site, const char* what) {
  if ((t->actor / 128 + 1) * 128 > t->block->threads) {
    report("wgmma.divergent", site, std::string(what) + " by the last warps of a block of " + std::to_string(t->block->threads) +
           " threads: a warpgroup is four whole warps, the first a multiple of four");
    world().stop();
  }
  return *t->warp->group;
}

// A thread's group of wgmmas is done when each has been executed.
bool executed(const PlannedWgmma& p, const Warpgroup& g) { return p.sequence < g.first; }

bool group_done(const std::vector<PlannedWgmma>& of, const Warpgroup& g) {
  return std::all_of(of.begin(), of.end(), [&](const PlannedWgmma& p) { return executed(p, g); });
}

// Two neighbouring columns at a time: registers i and i + 1 of a thread and their place in the tile.
template <class Visit>
void for_each_pair(uint32_t lane, AccumulatorTile& tile, Visit visit) {
  const Place top = accumulator_place(lane, 0), bottom = accumulator_place(lane, 2);
  float* upper = tile.values.data() + top.row * tile.n + top.column;
  float* lower = tile.values.data() + bottom.row * tile.n + bottom.column;
  for (uint32_t i = 0; i < tile.n / 2; i += 4, upper += 8, lower += 8) {
    visit(i, upper);
    visit(i + 2, lower);
  }
}

// The registers of the thread take their values back, unless a later wgmma owns them.
void give_back(Thread* t, AccumulatorTile& tile) {
  const uint32_t lane = thread_in_group(t);
  float* registers = tile.registers[lane];
  if (tile.uses[lane] != 0 || !registers) return;
  for_each_pair(lane, tile, [registers](uint32_t i, float* pair) { std::memcpy(registers + i, pair, 8); });
  tile.registers[lane] = nullptr;
}

void log_wgmma(const WgmmaShape& shape, float* d, const uint32_t* a_words, uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate,
               Site site) {
  World& w = world();
  Thread* t = w.current;
  Warpgroup& g = group_of(t, site, "wgmma");
  const uint32_t lane = thread_in_group(t);
  const uint64_t sequence = t->wgmma_next++;
  const uint64_t index = sequence - g.first;
  if (index >= g.log.size()) {
    auto op = std::make_shared<WgmmaOperation>();
    op->shape = shape;
    op->a_descriptor = a_descriptor;
    op->b_descriptor = b_descriptor;
    op->a_in_registers = a_words != nullptr;
    op->accumulate = accumulate;
    op->site = site;
    op->what = "wgmma";
    op->block = t->block;
    op->group = &g;
    op->epoch = w.take_slot(t);
    if (a_words) op->a_values.resize(64 * 32);
    g.log.push_back(op);
  }
  WgmmaOperation& op = *g.log[index];
  const bool same = op.shape.n == shape.n && op.shape.a == shape.a && op.shape.b == shape.b && op.shape.a_major == shape.a_major &&
                    op.shape.b_major == shape.b_major && op.b_descriptor == b_descriptor &&
                    (a_words ? op.a_in_registers : !op.a_in_registers && op.a_descriptor == a_descriptor) && op.accumulate == accumulate &&
                    op.site.line == site.line;
  if (!same) {
    report("wgmma.divergent", site, "issues another wgmma (or other descriptors) than the warpgroup's first thread did at " + at(op.site) +
           ": all four warps must execute the same one");
    w.stop();
  }
  // The accumulators: a chain on registers that are still owned goes on in the same tile.
  std::shared_ptr<AccumulatorTile> tile;
  for (auto& other : g.tiles) {
    float* r = other->registers[lane];
    if (!r) continue;
    if (r == d && other->n == shape.n) {
      tile = other;
    } else if (d < r + other->n / 2 && r < d + shape.n / 2) {
      report("wgmma.registers", site, "uses registers that another wgmma in flight owns in part");
      w.stop();
    }
  }
  if (tile && op.tile && op.tile != tile) {
    report("wgmma.divergent", site, "continues another accumulator than the other threads of the warpgroup");
    w.stop();
  }
  if (!tile) {
    if (!t->wgmma_fenced && w.options.off.count("wgmma.fence") == 0)
      report("wgmma.fence", site, "hands accumulators to wgmma without a wgmma_fence since they were last written or given back");
    if (!op.tile) {
      op.tile = std::make_shared<AccumulatorTile>();
      op.tile->n = shape.n;
      op.tile->values.assign(64 * shape.n, 0.0f);
      g.tiles.push_back(op.tile);
    }
    tile = op.tile;
    if (tile->registers[lane]) {   // others began this tile as a chain on registers that this thread does not pass
      report("wgmma.divergent", site, "passes other accumulators than the rest of the warpgroup");
      w.stop();
    }
    tile->registers[lane] = d;
    for_each_pair(lane, *tile, [d](uint32_t i, float* pair) { std::memcpy(pair, d + i, 8); });
    for (uint32_t i = 0; i < shape.n / 2; ++i) std::memcpy(&d[i], &kOwned, 4);
  }
  op.tile = tile;
  ++tile->uses[lane];
  if (a_words && w.checking) t->wgmma_a.emplace_back(reinterpret_cast<uintptr_t>(a_words), sequence);
  if (a_words)
    for (uint32_t word = 0; word < 4; ++word)
      for (uint32_t b = 0; b < 4; ++b) {
        const Place p = a_register_place(lane, word, b);
        op.a_values[p.row * 32 + p.column] = static_cast<uint8_t>(a_words[word] >> (8 * b));
      }
  if (w.checking) op.stamps[lane] = w.stamp(t);
  t->wgmma_open.push_back({sequence, tile, op.epoch});
  ++w.statistics.wgmma;
  if (++op.logged == 128) {
    ++tile->pending;
    w.enqueue(g.log[index]);
  }
}

}  // namespace

void WgmmaOperation::act() {
  World& w = world();
  // In order: those that were logged before go first.
  while (group->log.front().get() != this) group->log.front()->act();
  auto self = group->log.front();
  const uint32_t lane = w.checking ? w.random(128) : 0;
  struct Context {
    WgmmaOperation* op;
    Access a;
  } context{this, {}};
  context.a.who = epoch;
  context.a.seen = stamps[lane];
  context.a.kind = Kind::async;
  context.a.site = site;
  context.a.what = "wgmma";
  context.a.tiled = true;
  auto touch = [](void* p, uint32_t address, uint32_t bytes) {
    auto& c = *static_cast<Context*>(p);
    access(c.op->block->window + address, bytes, c.a);
  };
  uint8_t b[256 * 32];
  std::string wrong;
  if (!a_in_registers) {
    a_values.resize(64 * 32);
    context.a.swizzle = decode_descriptor(a_descriptor).swizzle;
    wrong = gather_operand(block->window, kSmemStart, block->smem_end, a_descriptor, shape.a, shape.a_major, 64, a_values.data(),
                           w.checking ? +touch : nullptr, &context);
    if (!wrong.empty()) wrong = "A: " + wrong;
  }
  if (wrong.empty()) {
    context.a.swizzle = decode_descriptor(b_descriptor).swizzle;
    wrong = gather_operand(block->window, kSmemStart, block->smem_end, b_descriptor, shape.b, shape.b_major, shape.n, b,
                           w.checking ? +touch : nullptr, &context);
    if (!wrong.empty()) wrong = "B: " + wrong;
  }
  if (!wrong.empty()) {
    w.hazard("wgmma.descriptor", "descriptor" + at(site) + wrong, where(epoch) + " at " + at(site) + ": wgmma operand " + wrong +
             " (PTX ISA: Matrix descriptor format)");
    w.fatal = true;
  } else {
    wgmma_product(shape, a_values.data(), b, tile->values.data(), accumulate,
                  w.options.fast_tensor_core ? TensorCoreMode::fp32 : TensorCoreMode::exact);
  }
  --tile->pending;
  finished = sources_read = true;
  group->log.pop_front();
  ++group->first;
  w.release_slot(block, epoch);
  for (Thread* t : block->thread)
    if (t->wait == Wait::wgmma && !t->ready && t->warp->group == group) {
      const size_t done_before = t->wgmma_groups.size() - t->wait_detail;
      bool done = true;
      for (size_t i = 0; i < done_before; ++i) done &= group_done(t->wgmma_groups[i], *group);
      if (done) w.make_ready(t);
    }
}

void wgmma(const WgmmaShape& s, float* d, uint64_t a, uint64_t b, bool accumulate, Site site) {
  log_wgmma(s, d, nullptr, a, b, accumulate, site);
}

void wgmma(const WgmmaShape& s, float* d, const uint32_t* a, uint64_t b, bool accumulate, Site site) {
  log_wgmma(s, d, a, 0, b, accumulate, site);
}

void wgmma_fence(Site site) {
  if (dropped_here("wgmma_fence", site)) return;
  me()->wgmma_fenced = true;
}

void wgmma_commit(Site site) {
  if (dropped_here("wgmma_commit", site)) return;
  Thread* t = me();
  group_of(t, site, "wgmma_commit");
  t->wgmma_groups.push_back(std::move(t->wgmma_open));
  t->wgmma_open.clear();
}

void wgmma_wait(uint32_t pending, Site site) {
  if (dropped_here("wgmma_wait", site)) return;
  World& w = world();
  Thread* t = w.current;
  Warpgroup& g = group_of(t, site, "wgmma_wait");
  bool done = true;
  for (size_t i = 0; i + pending < t->wgmma_groups.size(); ++i) done &= group_done(t->wgmma_groups[i], g);
  if (!done) w.wait(Wait::wgmma, &g, pending, site);
  const uint32_t lane = thread_in_group(t);
  while (t->wgmma_groups.size() > pending) {
    for (const PlannedWgmma& p : t->wgmma_groups.front()) --p.tile->uses[lane];
    for (const PlannedWgmma& p : t->wgmma_groups.front()) {
      give_back(t, *p.tile);
      w.observe(t, p.epoch);
    }
    for (const PlannedWgmma& p : t->wgmma_groups.front()) std::erase_if(t->wgmma_a, [&](const auto& a) { return a.second == p.sequence; });
    t->wgmma_groups.pop_front();
  }
  // Registers may now be written by others: the next accumulators need a fence again.
  if (t->wgmma_groups.empty() && t->wgmma_open.empty()) t->wgmma_fenced = false;
  g.tiles.erase(std::remove_if(g.tiles.begin(), g.tiles.end(),
                               [](const auto& tile) {
                                 return std::all_of(tile->registers.begin(), tile->registers.end(), [](float* r) { return !r; });
                               }),
                g.tiles.end());
}

// Whether an address is a register that the tensor core owns now; for the instrumented build.
bool owned_register(const Thread* t, uintptr_t address, bool write) {
  if (t->wgmma_open.empty() && t->wgmma_groups.empty()) return false;
  // A's words may be read, not written; a block-scoped array that ends before the wait hands its place to others, so that
  // kernels keep the array until then.
  if (write)
    for (auto [words, sequence] : t->wgmma_a)
      if (address - words < 16) return true;
  const uint32_t lane = t->actor % 128;
  for (const auto& tile : t->warp->group->tiles) {
    const auto r = reinterpret_cast<uintptr_t>(tile->registers[lane]);
    if (r && address >= r && address < r + tile->n / 2 * sizeof(float)) return true;
  }
  return false;
}

}  // namespace emulator
