#include "shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>

namespace emulator {

struct Cell {
  Epoch write;
  struct Reader { Epoch epoch; uint32_t source; } reader[2];   // the last two who read
  uint32_t write_source;
  uint8_t write_mask;        // bytes of the cell that the last write covered
  uint8_t initialised;       // bytes ever written
  uint8_t kind : 2;          // of the last write
  uint8_t tiled : 1;
  uint8_t swizzle : 2;
  uint8_t reader_atomic : 2;
  uint8_t reader_mask[2];    // bytes that each has read
};

namespace {

// Where accesses came from; cells keep an index.
struct Source { Site site; uintptr_t pc; const char* what; };
std::vector<Source> sources;
std::unordered_map<uint64_t, uint32_t> source_index;

uint32_t source_of(const Access& a) {
  const uint64_t key = a.pc ? a.pc
                            : reinterpret_cast<uintptr_t>(a.site.file) * 1000003ull + a.site.line * 8191ull +
                                  reinterpret_cast<uintptr_t>(a.what) * 31ull;
  static uint64_t last_key = 0;
  static uint32_t last = 0;
  if (key == last_key && last < sources.size()) return last;
  auto [it, fresh] = source_index.try_emplace(key, static_cast<uint32_t>(sources.size()));
  if (fresh) sources.push_back({a.site, a.pc, a.what});
  last_key = key;
  last = it->second;
  return last;
}

std::string text_of(const Source& s);

constexpr size_t kCellsPerWindow = kMaxSmem / 4;

Cell* window_cells(uint32_t slot) {
  static std::vector<Cell*> windows(kMaxWindows);
  if (!windows[slot]) {
    void* p = mmap(nullptr, kCellsPerWindow * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for shadow cells");
    windows[slot] = static_cast<Cell*>(p);
  }
  return windows[slot];
}

Cell* buffer_cells(Buffer& b) {
  if (!b.shadow) {
    b.shadow_bytes = ((b.end + 3) / 4 - b.begin / 4) * sizeof(Cell);
    void* p = mmap(nullptr, b.shadow_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: no memory for shadow cells of a buffer");
    b.shadow = static_cast<Cell*>(p);
  }
  return b.shadow;
}

// Whether the moment `e` comes before the access. `async_half`: and was made visible to the async proxy.
bool before(const Epoch& e, const Access& a, bool async_half) {
  if (e.block == 0) return true;
  const Stamp& s = a.seen;
  if (e.block == s.self.block && e.actor == s.self.actor) return async_half ? e.time <= s.async_time : e.time <= s.self.time;
  if (e.block == a.who.block && e.actor == a.who.actor) return true;  // the same operation
  if (s.seen) {
    if (const BlockClock* part = s.seen->find(e.block))
      if ((async_half ? part->async : part->generic)[e.actor] >= e.time) return true;
    const BlockInfo& i = world().info[e.block];
    if (static_cast<size_t>(i.rank) < s.seen->finished.size() && i.grid_sequence <= s.seen->finished[i.rank]) return true;
  }
  return false;
}

const char* verb(bool write, Kind kind) {
  if (kind == Kind::atomic) return "atomic access";
  if (kind == Kind::reduction) return "reduction";
  return write ? "write" : "read";
}

void race(const Access& a, uint32_t my_source, const void* p, const Epoch& other, uint32_t other_source, bool other_write,
          Kind other_kind, bool half_missing) {
  const bool proxy = half_missing;
  const char* rule = proxy ? "proxy" : "race";
  if (!world().rule(rule)) return;
  const Source mine = sources[my_source], theirs = sources[other_source];
  std::string key = std::string(rule) + text_of(mine) + text_of(theirs);
  std::string text = std::string(verb(a.write, a.kind)) + " of " + place(p) + "\n    by   " + where(a.who) + ": " + text_of(mine) +
                     "\n    and  " + verb(other_write, other_kind) + " by " + where(other) + ": " + text_of(theirs) + "\n    ";
  if (proxy)
    text += "are ordered, but the generic write was not made visible to the async proxy: a fence_proxy_async after the write "
            "(by its thread, before it releases) or before this operation would do it (PTX ISA: fence.proxy.async)";
  else
    text += "are not ordered: no barrier, mbarrier phase, release/acquire or wait connects them (PTX ISA: Memory Consistency Model)";
  world().hazard(rule, key, text);
}

}  // namespace

std::string symbolize(uintptr_t pc);

namespace {
std::string text_of(const Source& s) {
  if (s.pc) return symbolize(s.pc);
  return std::string(s.what) + " at " + at(s.site);
}
}  // namespace

Access generic_access(Thread* t, bool write, Site site, const char* what) {
  Access a;
  a.seen = world().peek(t);
  a.who = a.seen.self;
  a.write = write;
  a.site = site;
  a.what = what;
  return a;
}

void clear_window_shadow(const Block& b) {
  if (!options().check) return;
  std::memset(static_cast<void*>(window_cells(b.window_slot)), 0, (b.smem_end + 3) / 4 * sizeof(Cell));
}

void drop_shadow(Buffer& b) {
  if (b.shadow) munmap(b.shadow, b.shadow_bytes);
  b.shadow = nullptr;
}

void access(const void* pointer, size_t bytes, const Access& a) {
  World& w = world();
  if (!w.checking || bytes == 0) return;
  auto begin = reinterpret_cast<uintptr_t>(pointer);
  Cell* cells = nullptr;
  bool shared = false;
  uintptr_t origin = 0;
  const auto off = begin - reinterpret_cast<uintptr_t>(window_region());
  const uint32_t my_source = source_of(a);
  if (off < kMaxWindows * kWindowBytes) {
    Block* b = w.block_of(pointer);
    const uint32_t offset = static_cast<uint32_t>(off % kWindowBytes);
    if (!b) {
      if (w.rule("smem.dead_block"))
        w.hazard("smem.dead_block", "dead" + text_of(sources[my_source]), std::string(verb(a.write, a.kind)) + " by " + where(a.who) + ": " +
                 text_of(sources[my_source]) + "\n    touches shared memory of a block that has ended: a cluster barrier must keep it alive "
                 "(PTX ISA: Distributed shared memory)");
      return;
    }
    if (offset < kSmemStart || offset + bytes > b->smem_end) {
      if (w.rule("smem.bounds"))
        w.hazard("smem.bounds", "bounds" + text_of(sources[my_source]), std::string(verb(a.write, a.kind)) + " of " + std::to_string(bytes) + " bytes at " +
                 place(pointer) + " by " + where(a.who) + ": " + text_of(sources[my_source]) + "\n    is outside of the block's " +
                 std::to_string(b->smem_end - kSmemStart) + " bytes of shared memory");
      return;
    }
    if (b->uid != a.who.block) b->touched(a.who, a.site, a.what && *a.what ? a.what : "its access");
    cells = window_cells(b->window_slot);
    origin = reinterpret_cast<uintptr_t>(b->window);
    shared = true;
  } else {
    Buffer* b = w.buffer_of(begin);
    if (!b || begin + bytes > b->end) {
      if (w.rule("global.bounds"))
        w.hazard("global.bounds", "bounds" + text_of(sources[my_source]), std::string(verb(a.write, a.kind)) + " of " + std::to_string(bytes) +
                 " bytes at " + place(pointer) + " by " + where(a.who) + ": " + text_of(sources[my_source]) +
                 "\n    is outside of every argument of the launch");
      return;
    }
    if (a.write && !b->writable) {
      if (w.rule("global.read_only"))
        w.hazard("global.read_only", "ro" + text_of(sources[my_source]), "write of " + place(pointer) + " by " + where(a.who) + ": " +
                 text_of(sources[my_source]) + "\n    which the op declares as an input");
      return;
    }
    if (!b->writable) return;  // nobody writes it: nothing can race
    cells = buffer_cells(*b);
    origin = b->begin / 4 * 4;
  }
  const auto asynchronous = [](Kind k) { return k == Kind::async || k == Kind::reduction; };
  const auto atomic = [](Kind k) { return k == Kind::atomic || k == Kind::reduction; };
  const bool is_async = asynchronous(a.kind);
  Epoch checked{};             // runs of cells have one writer: look its order up once
  bool checked_half = false, checked_ok = true;
  auto ordered = [&](const Epoch& e, bool half) {
    if (e.block == checked.block && e.actor == checked.actor && e.time == checked.time && half == checked_half) return checked_ok;
    checked = e;
    checked_half = half;
    return checked_ok = before(e, a, half);
  };
  uintptr_t p = begin;
  const uintptr_t end = begin + bytes;
  while (p < end) {
    const uintptr_t word = p & ~uintptr_t{3};
    const uintptr_t stop = std::min(end, word + 4);
    const auto mask = static_cast<uint8_t>(((1u << (stop - word)) - 1) & ~((1u << (p - word)) - 1));
    Cell& c = cells[(word - origin) / 4];
    if (c.write.block && (c.write_mask & mask)) {
      const bool both_atomic = atomic(a.kind) && atomic(static_cast<Kind>(c.kind));
      if (!both_atomic) {
        const bool half = is_async && !asynchronous(static_cast<Kind>(c.kind));
        if (!ordered(c.write, half)) {
          const bool only_proxy = half && before(c.write, a, false);
          race(a, my_source, reinterpret_cast<void*>(p), c.write, c.write_source, true, static_cast<Kind>(c.kind), only_proxy);
        }
      }
    }
    if (a.write) {
      for (int r = 0; r < 2; ++r) {
        Cell::Reader& reader = c.reader[r];
        if (!reader.epoch.block || !(c.reader_mask[r] & mask)) continue;
        if (atomic(a.kind) && (c.reader_atomic >> r & 1)) continue;
        if (!ordered(reader.epoch, false))
          race(a, my_source, reinterpret_cast<void*>(p), reader.epoch, reader.source, false, Kind::generic, false);
        c.reader_mask[r] &= static_cast<uint8_t>(~mask);
        if (!c.reader_mask[r]) reader.epoch = {};
      }
      // One writer is remembered: bytes of an earlier writer that this one leaves alone are forgotten, never blamed on it.
      const bool same_writer = c.write.block == a.who.block && c.write.actor == a.who.actor && c.write.time == a.who.time;
      c.write_mask = same_writer ? static_cast<uint8_t>(c.write_mask | mask) : mask;
      c.write = a.who;
      c.write_source = my_source;
      c.initialised |= mask;
      c.kind = static_cast<uint8_t>(a.kind);
      c.tiled = a.tiled;
      c.swizzle = static_cast<uint8_t>(a.swizzle);
    } else {
      if (shared && (c.initialised & mask) != mask && w.rule("smem.uninitialised"))
        w.hazard("smem.uninitialised", "uninit" + text_of(sources[my_source]), "read of " + place(reinterpret_cast<void*>(p)) + " by " + where(a.who) +
                 ": " + text_of(sources[my_source]) + "\n    which nobody has written (or a TMA copy has not landed yet)");
      if (a.tiled && c.tiled && c.swizzle != static_cast<uint8_t>(a.swizzle) && w.rule("wgmma.swizzle")) {
        static const char* names[] = {"none", "32B", "64B", "128B"};
        w.hazard("wgmma.swizzle", "swizzle" + text_of(sources[my_source]), "read of " + place(reinterpret_cast<void*>(p)) + " by " + where(a.who) + ": " +
                 text_of(sources[my_source]) + "\n    with swizzle " + names[static_cast<int>(a.swizzle)] + ", written with swizzle " + names[c.swizzle] +
                 " by " + text_of(sources[c.write_source]) + " (PTX ISA: Matrix descriptor, Tensor swizzling modes)");
      }
      {
        int slot = -1;
        for (int r = 0; r < 2; ++r)
          if (c.reader[r].epoch.block == a.who.block && c.reader[r].epoch.actor == a.who.actor) slot = r;
        for (int r = 0; r < 2 && slot < 0; ++r)
          if (!c.reader[r].epoch.block || before(c.reader[r].epoch, a, false)) slot = r;
        if (slot < 0) slot = static_cast<int>((a.who.actor ^ (p >> 2)) & 1);
        const bool same = c.reader[slot].epoch.block == a.who.block && c.reader[slot].epoch.actor == a.who.actor;
        c.reader_mask[slot] = same ? static_cast<uint8_t>(c.reader_mask[slot] | mask) : mask;
        c.reader[slot] = {a.who, my_source};
        c.reader_atomic = static_cast<uint8_t>((c.reader_atomic & ~(1 << slot)) | ((a.kind == Kind::atomic) << slot));
      }
    }
    p = stop;
  }
  ++w.statistics.accesses;
}

}  // namespace emulator
