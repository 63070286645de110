// Warp collectives: lanes meet, the last one computes for all, everybody goes on.
// PTX ISA: "bar.warp.sync", "shfl.sync", "vote.sync", "redux.sync", "elect.sync". Only bar.warp.sync orders memory.
#include <bit>

#include "world.h"

namespace emulator {
namespace {

using Compute = void (*)(Rendezvous&, Warp&);

void meet(const char* what, uint32_t mask, uint32_t value, uint32_t argument, bool ordering, Site site, Compute compute) {
  World& w = world();
  Thread* t = w.current;
  Warp& warp = *t->warp;
  const uint32_t lane = t->identity.lane;
  if (!(mask >> lane & 1)) {
    report("warp.mask", site, std::string(what) + " by a lane that its mask does not name");
    w.stop();
  }
  if (mask & warp.exited) {
    report("warp.mask", site, std::string(what) + " names lanes that have ended");
    w.stop();
  }
  // Lanes may be apart, each group in a collective of its own. But when this lane is awaited elsewhere, by lanes that are
  // awaited here, neither collective can ever complete.
  Rendezvous* r = nullptr;
  for (Rendezvous& m : warp.meeting) {
    if (m.mask == mask && m.what == what) {
      r = &m;
    } else if ((m.mask >> lane & 1) && (m.arrived & mask)) {
      report("warp.mask", site, std::string(what) + " meets " + m.what + " at " + at(m.site) +
             ": the lanes of one collective must execute the same instruction with the same mask");
      w.stop();
    }
  }
  if (!r) {
    warp.meeting.emplace_back();
    r = &warp.meeting.back();
    r->mask = mask;
    r->what = what;
    r->site = site;
  }
  r->value[lane] = value;
  r->argument[lane] = argument;
  r->arrived |= 1u << lane;
  if (ordering && w.checking) r->release.add(w.stamp(t), t->block->actors);
  if (r->arrived != mask) {
    w.wait(Wait::warp, &warp, mask, site);
    return;
  }
  Rendezvous done = std::move(*r);
  warp.meeting.erase(warp.meeting.begin() + (r - warp.meeting.data()));
  if (compute) compute(done, warp);
  const ClockRef clock = ordering && w.checking ? done.release.take() : ClockRef();
  for (uint32_t l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Thread* other = warp.threads[l];
    if (ordering) w.acquire(other, clock);
    if (other != t) w.make_ready(other);
  }
}

}  // namespace

void warp_lane_ends(Thread* t) {
  for (const Rendezvous& m : t->warp->meeting)
    if (m.mask >> t->identity.lane & 1)
      report("warp.mask", m.site, std::string("ends, but ") + m.what + " at " + at(m.site) + " names it, and other lanes wait there");
}

void syncwarp(uint32_t mask, Site site) {
  if (dropped_here("syncwarp", site)) return;
  meet("syncwarp", mask, 0, 0, true, site, nullptr);
}

bool elect_one(uint32_t mask, Site site) {
  meet("elect_one", mask, 0, 0, false, site, [](Rendezvous& r, Warp& warp) {
    const int leader = std::countr_zero(r.mask);
    for (uint32_t l = 0; l < 32; ++l)
      if (r.mask >> l & 1) warp.threads[l]->result = static_cast<int>(l) == leader;
  });
  return me()->result;
}

uint32_t shuffle(Shuffle mode, uint32_t value, uint32_t lane_argument, uint32_t width, uint32_t mask, Site site) {
  // The source lane is worked out by each lane for itself; packed into the meeting's argument.
  const uint32_t lane = me()->identity.lane;
  const uint32_t base = lane & ~(width - 1);
  int64_t source = lane;
  switch (mode) {
    case Shuffle::idx: source = base + (lane_argument & (width - 1)); break;
    case Shuffle::up: source = int64_t{lane} - lane_argument; break;
    case Shuffle::down: source = int64_t{lane} + lane_argument; break;
    case Shuffle::xor_: source = lane ^ lane_argument; break;
  }
  if (source < base || source >= base + width) source = lane;
  meet("shuffle", mask, value, static_cast<uint32_t>(source), false, site, [](Rendezvous& r, Warp& warp) {
    for (uint32_t l = 0; l < 32; ++l)
      if (r.mask >> l & 1) {
        const uint32_t from = r.argument[l];
        if (!(r.mask >> from & 1))
          report("warp.mask", r.site, "shuffle reads lane " + std::to_string(from) + ", which the mask does not name: undefined");
        warp.threads[l]->result = r.value[from];
      }
  });
  return me()->result;
}

uint32_t vote(Vote mode, bool predicate, uint32_t mask, Site site) {
  meet("vote", mask, predicate, static_cast<uint32_t>(mode), false, site, [](Rendezvous& r, Warp& warp) {
    uint32_t ballot = 0;
    for (uint32_t l = 0; l < 32; ++l)
      if ((r.mask >> l & 1) && r.value[l]) ballot |= 1u << l;
    for (uint32_t l = 0; l < 32; ++l) {
      if (!(r.mask >> l & 1)) continue;
      const auto m = static_cast<Vote>(r.argument[l]);
      warp.threads[l]->result = m == Vote::ballot ? ballot : m == Vote::any ? ballot != 0 : ballot == r.mask;
    }
  });
  return me()->result;
}

uint32_t warp_reduce(Reduce op, uint32_t value, bool is_signed, uint32_t mask, Site site) {
  meet("warp_reduce", mask, value, static_cast<uint32_t>(op) | (is_signed ? 256u : 0u), false, site, [](Rendezvous& r, Warp& warp) {
    const uint32_t how = r.argument[std::countr_zero(r.mask)];
    const bool is_signed = how & 256;
    uint32_t all = 0;
    bool first = true;
    for (uint32_t l = 0; l < 32; ++l) {
      if (!(r.mask >> l & 1)) continue;
      const uint32_t v = r.value[l];
      if (first) {
        all = v;
        first = false;
        continue;
      }
      switch (static_cast<Reduce>(how & 255)) {
        case Reduce::add: all += v; break;
        case Reduce::min: all = is_signed ? (static_cast<int32_t>(v) < static_cast<int32_t>(all) ? v : all) : (v < all ? v : all); break;
        case Reduce::max: all = is_signed ? (static_cast<int32_t>(v) > static_cast<int32_t>(all) ? v : all) : (v > all ? v : all); break;
        case Reduce::and_: all &= v; break;
        case Reduce::or_: all |= v; break;
        case Reduce::xor_: all ^= v; break;
        default: report("memory.order", r.site, "redux.sync has add, min, max, and, or, xor"); break;
      }
    }
    for (uint32_t l = 0; l < 32; ++l)
      if (r.mask >> l & 1) warp.threads[l]->result = all;
  });
  return me()->result;
}

}  // namespace emulator
