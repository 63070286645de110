#include "clock.h"

#include <algorithm>
#include <array>

namespace emulator {
namespace {

Ref<BlockClock> join_entries(const Ref<BlockClock>& a, const Ref<BlockClock>& b) {
  if (a == b) return a;
  const size_t n = a->generic.size();
  bool a_covers = true, b_covers = true;
  for (size_t i = 0; i < n; ++i) {
    a_covers &= a->generic[i] >= b->generic[i] && a->async[i] >= b->async[i];
    b_covers &= b->generic[i] >= a->generic[i] && b->async[i] >= a->async[i];
  }
  if (a_covers) return a;
  if (b_covers) return b;
  Ref<BlockClock> r(new BlockClock(*a));
  r->references = 1;
  for (size_t i = 0; i < n; ++i) {
    r->generic[i] = std::max(a->generic[i], b->generic[i]);
    r->async[i] = std::max(a->async[i], b->async[i]);
  }
  return r;
}

ClockRef copy(const ClockRef& c) {
  auto* fresh = c ? new Clock(*c) : new Clock;
  fresh->references = 0;
  return ClockRef(fresh);
}

// The entries of `block` in a clock that is still private, ready to be written.
BlockClock& writable(Clock& c, uint32_t block, uint32_t actors) {
  auto at = std::lower_bound(c.parts.begin(), c.parts.end(), block,
                             [](const Clock::Part& p, uint32_t b) { return p.block < b; });
  if (at == c.parts.end() || at->block != block) {
    at = c.parts.insert(at, {block, Ref<BlockClock>(new BlockClock(actors))});
  } else if (at->entries->references > 1) {
    auto* fresh = new BlockClock(*at->entries);
    fresh->references = 0;
    at->entries = Ref<BlockClock>(fresh);
  }
  return *at->entries;
}

// A small direct-mapped memo. Keys hold references, so that an address is never reused while it is a key.
struct JoinMemo { ClockRef a, b, result; };
struct EntryMemo { ClockRef a; Epoch e; bool async = false; ClockRef result; };
struct FenceMemo { ClockRef a, result; };
std::array<JoinMemo, 512> joins;
std::array<EntryMemo, 512> entries;
std::array<FenceMemo, 128> fences;

uint64_t given_entries = 0;

// Memos too are counted: what they hold depends on addresses, and the count must not. Blocks of a clock are of one size.
void count(const ClockRef& c) {
  if (c && !c->parts.empty()) given_entries += c->parts.size() * c->parts.front().entries->generic.size();
}

size_t hash(const void* a, uint64_t b) {
  uint64_t h = reinterpret_cast<uintptr_t>(a) * 0x9E3779B97F4A7C15ull ^ b * 0xC2B2AE3D27D4EB4Full;
  return static_cast<size_t>(h >> 40);
}

}  // namespace

const BlockClock* Clock::find(uint32_t block) const {
  for (const Part& p : parts)
    if (p.block == block) return p.entries.get();
  return nullptr;
}

ClockRef join(const ClockRef& a, const ClockRef& b) {
  count(a), count(b);
  if (!b || a == b) return a;
  if (!a) return b;
  JoinMemo& memo = joins[hash(a.get(), reinterpret_cast<uintptr_t>(b.get())) % joins.size()];
  if (memo.a == a && memo.b == b) return memo.result;
  ClockRef r(new Clock);
  bool same_as_a = true, same_as_b = true;
  auto i = a->parts.begin();
  auto j = b->parts.begin();
  while (i != a->parts.end() || j != b->parts.end()) {
    if (j == b->parts.end() || (i != a->parts.end() && i->block < j->block)) {
      r->parts.push_back(*i++);
      same_as_b = false;
    } else if (i == a->parts.end() || j->block < i->block) {
      r->parts.push_back(*j++);
      same_as_a = false;
    } else {
      r->parts.push_back({i->block, join_entries(i->entries, j->entries)});
      same_as_a &= r->parts.back().entries == i->entries;
      same_as_b &= r->parts.back().entries == j->entries;
      ++i, ++j;
    }
  }
  r->finished = a->finished;
  if (b->finished.size() > r->finished.size()) r->finished.resize(b->finished.size());
  for (size_t k = 0; k < b->finished.size(); ++k) r->finished[k] = std::max(r->finished[k], b->finished[k]);
  same_as_a &= r->finished == a->finished;
  same_as_b &= r->finished == b->finished;
  memo = {a, b, same_as_a ? a : same_as_b ? b : r};  // share what exists: the threads behind a barrier hold one clock
  return memo.result;
}

ClockRef with_entry(const ClockRef& a, const Epoch& e, uint32_t actors, bool async) {
  count(a);
  EntryMemo& memo = entries[hash(a.get(), e.block * 31ull + e.actor * 1000003ull + e.time * 7919ull) % entries.size()];
  if (memo.result && memo.a == a && memo.async == async && memo.e.block == e.block && memo.e.actor == e.actor && memo.e.time == e.time)
    return memo.result;
  ClockRef r;
  const BlockClock* part = a ? a->find(e.block) : nullptr;
  if (part && part->generic[e.actor] >= e.time && (!async || part->async[e.actor] >= e.time)) {
    r = a;
  } else {
    r = copy(a);
    BlockClock& entries = writable(*r, e.block, actors);
    entries.generic[e.actor] = std::max(entries.generic[e.actor], e.time);
    if (async) entries.async[e.actor] = std::max(entries.async[e.actor], e.time);
  }
  memo = {a, e, async, r};
  return r;
}

ClockRef with_async_visible(const ClockRef& a) {
  count(a);
  if (!a) return a;
  FenceMemo& memo = fences[hash(a.get(), 1) % fences.size()];
  if (memo.a == a) return memo.result;
  bool already = true;
  for (const auto& p : a->parts) already &= p.entries->async == p.entries->generic;
  ClockRef r = a;
  if (!already) {
    r = copy(a);
    for (auto& p : r->parts) {
      auto* fresh = new BlockClock(*p.entries);
      fresh->references = 0;
      fresh->async = fresh->generic;
      p.entries = Ref<BlockClock>(fresh);
    }
  }
  memo = {a, r};
  return r;
}

ClockRef with_finished(const ClockRef& a, uint32_t rank, uint32_t grid) {
  ClockRef r = copy(a);
  if (r->finished.size() <= rank) r->finished.resize(rank + 1);
  r->finished[rank] = std::max(r->finished[rank], grid);
  return r;
}

void Release::add(const Stamp& s, uint32_t actors) {
  seen_ = join(seen_, s.seen);
  own_.push_back({s.self, s.async_time, actors});
}

void Release::add_entry(const Epoch& e, uint32_t actors, bool async) { own_.push_back({e, async ? e.time : 0, actors}); }

void Release::add_clock(const ClockRef& c) { seen_ = join(seen_, c); }

ClockRef Release::take() {
  ClockRef r = std::move(seen_);
  seen_ = ClockRef();
  count(r);
  if (!own_.empty()) {
    r = copy(r);
    for (const Own& o : own_) {
      BlockClock& entries = writable(*r, o.epoch.block, o.actors);
      entries.generic[o.epoch.actor] = std::max(entries.generic[o.epoch.actor], o.epoch.time);
      entries.async[o.epoch.actor] = std::max(entries.async[o.epoch.actor], o.async_time);
    }
    own_.clear();
  }
  return r;
}

uint64_t take_clock_entries() { return std::exchange(given_entries, 0); }

void forget_clocks() {
  joins.fill({});
  entries.fill({});
  fences.fill({});
}

}  // namespace emulator
