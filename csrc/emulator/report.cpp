// Reports for people: what happened, where, who, and what would have ordered it.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "world.h"

namespace emulator {
namespace {

std::string index_text(uint3 i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

std::string rank_text(int rank) { return world().grids.size() > 1 ? "rank " + std::to_string(rank) + " " : ""; }

std::string base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

// "0-3, 5" of ascending numbers.
std::string ranges(const std::vector<uint32_t>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]) + (last > i ? "-" + std::to_string(numbers[last]) : "");
    i = last + 1;
  }
  return text;
}

std::string hex(uint64_t v) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

}  // namespace

std::string at(Site s) { return s.file && *s.file ? base_name(s.file) + ":" + std::to_string(s.line) : "?"; }

std::string place_of_block(const Block* b) { return index_text(b->index); }

std::string where(const Thread* t) {
  return rank_text(t->block->grid->rank) + "block " + index_text(t->block->index) + " warp " + std::to_string(t->identity.warp) +
         " lane " + std::to_string(t->identity.lane);
}

std::string where(const Epoch& e) {
  const BlockInfo& i = world().info[e.block];
  std::string text = rank_text(i.rank) + "block " + index_text(i.index);
  if (world().grids[i.rank].size() > 1) text = i.grid + " " + text;
  if (e.actor < i.threads) return text + " warp " + std::to_string(e.actor / 32) + " lane " + std::to_string(e.actor % 32);
  for (auto& b : world().blocks)
    if (b->uid == e.block) {
      const uint32_t issuer = b->slot_issuer[e.actor - i.threads];
      return text + " engine, issued by warp " + std::to_string(issuer / 32) + " lane " + std::to_string(issuer % 32);
    }
  return text + " engine";
}

std::string place(const void* p) {
  World& w = world();
  const auto* b = static_cast<const uint8_t*>(p);
  if (static_cast<size_t>(b - window_region()) < kMaxWindows * kWindowBytes) {
    const uint32_t off = w.shared_offset(p);
    std::string of;
    if (Block* owner = w.block_of(p); owner && w.current && owner != w.current->block) of = " of block " + index_text(owner->index);
    return "shared memory +" + hex(off - kSmemStart) + of;
  }
  if (Buffer* buffer = w.buffer_of(reinterpret_cast<uintptr_t>(p)))
    return "buffer '" + buffer->name + "' +" + hex(reinterpret_cast<uintptr_t>(p) - buffer->begin);
  if (static_cast<size_t>(b - stack_region()) < stack_region_bytes()) return "local memory";
  if (Buffer* buffer = w.buffer_near(reinterpret_cast<uintptr_t>(p))) {
    const auto a = reinterpret_cast<uintptr_t>(p);
    return a >= buffer->end ? std::to_string(a - buffer->end) + " bytes past the end of buffer '" + buffer->name + "'"
                            : std::to_string(buffer->begin - a) + " bytes before buffer '" + buffer->name + "'";
  }
  return "address " + hex(reinterpret_cast<uintptr_t>(p));
}

// File and line of an instruction, by addr2line where it is installed. Reports are rare: a process each is fine.
std::string source_line(uintptr_t pc) {
  static std::map<uintptr_t, std::string> known;
  auto it = known.find(pc);
  if (it != known.end()) return it->second;
  std::string text;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(pc), &info) && info.dli_fname) {
    const uintptr_t offset = pc - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;  // pc is a return address
    // Innermost inlined frame first; a frame in the vocabulary is less telling than the kernel that called it.
    std::string command = std::string("addr2line -i -e '") + info.dli_fname + "' " + hex(offset) + " 2>/dev/null";
    if (FILE* pipe = popen(command.c_str(), "r")) {
      char line[1024];
      std::string first;
      while (std::fgets(line, sizeof line, pipe)) {
        std::string s(line);
        while (!s.empty() && (s.back() == '\n' || s.back() == ' ')) s.pop_back();
        if (auto d = s.find(" (discriminator"); d != std::string::npos) s.resize(d);
        if (s.empty() || s[0] == '?') continue;
        if (first.empty()) first = base_name(s.c_str());
        if (s.find("/hopper/") == std::string::npos) {
          text = base_name(s.c_str());
          break;
        }
      }
      pclose(pipe);
      if (text.empty()) text = first;
    }
    if (text.empty()) text = base_name(info.dli_fname) + "+" + hex(offset);
  }
  if (text.empty()) text = hex(pc);
  return known[pc] = text;
}

std::string symbolize(uintptr_t pc) { return "a plain access at " + source_line(pc); }

void World::hazard(const char* rule_name, const std::string& key, const std::string& text) {
  if (options.off.count(rule_name)) return;
  if (!seen_reports.insert(key).second) return;
  if (reports.size() >= options.max_reports) {
    fatal = true;
    return;
  }
  reports.push_back("[" + std::string(rule_name) + "] " + text + "\n");
}

void report(const char* rule, Site site, const std::string& text) {
  World& w = world();
  if (!w.current) {
    w.hazard(rule, rule + at(site) + text, at(site) + ": " + text);
    return;
  }
  w.hazard(rule, std::string(rule) + at(site) + (text.size() > 60 ? text.substr(0, 60) : text), where(w.current) + " at " + at(site) + ": " + text);
}

std::string describe_waits() {
  static const char* kinds[] = {"nothing", "mbarrier", "barrier", "the cluster barrier", "the lanes of", "its wgmmas", "its bulk copies",
                                "its cp.async copies", "registers", "the previous grid", "polls"};
  World& w = world();
  struct Waiters { std::string who; std::vector<uint32_t> warps; uint32_t lanes = 0; };
  std::map<std::string, Waiters> lines;   // by block and what is waited for
  std::map<std::string, std::string> texts;
  std::vector<std::string> order;
  uint32_t more = 0;
  for (auto& t : w.threads) {
    if (t->finished) continue;
    std::string text = at(t->wait_site) + " ";
    const Block* b = t->block;
    switch (t->wait) {
      case Wait::none: text += t->ready ? "can run" : "runs"; break;
      case Wait::mbarrier: {
        Block* owner = w.block_of(t->wait_object);
        text += "waits for the mbarrier at " + place(t->wait_object);
        if (owner) {
          const MbarrierState& m = owner->mbarriers[w.shared_offset(t->wait_object)];
          text += " (init " + at(m.init_site) + ") parity " + std::to_string(t->wait_detail) + "; it is in phase " + std::to_string(m.phase) +
                  ", pending arrivals " + std::to_string(m.pending) + "/" + std::to_string(m.count) + ", tx-count " + std::to_string(m.tx);
        }
        break;
      }
      case Wait::barrier: {
        const NamedBarrier& n = b->barrier[t->wait_detail];
        text += "waits at barrier " + std::to_string(t->wait_detail) + ": " + std::to_string(n.arrived) + " of " + std::to_string(n.expected) +
                " threads have arrived";
        break;
      }
      case Wait::warp: {
        char mask[16];
        std::snprintf(mask, sizeof mask, "%08x", static_cast<unsigned>(t->wait_detail));
        text += "waits for the lanes of mask " + std::string(mask);
        break;
      }
      case Wait::polling:
        text += "polls";
        if (t->wait_object) text += " " + place(t->wait_object);
        if (t->wait_detail == 4 || t->wait_detail == 8) {
          uint64_t value = 0;
          std::memcpy(&value, t->wait_object, t->wait_detail);
          text += ", which is " + std::to_string(value);
        }
        break;
      default: text += std::string("waits for ") + kinds[static_cast<int>(t->wait)];
    }
    const std::string who = rank_text(b->grid->rank) + "block " + index_text(b->index);
    auto [it, fresh] = lines.try_emplace(who + text);
    if (fresh) {
      order.push_back(who + text);
      it->second.who = "  " + who;
    }
    Waiters& waiters = it->second;
    if (waiters.warps.empty() || waiters.warps.back() != t->identity.warp) waiters.warps.push_back(t->identity.warp);
    ++waiters.lanes;
    texts.try_emplace(who + text, text);
  }
  std::string all;
  for (const std::string& key : order) {
    if (std::count(all.begin(), all.end(), '\n') >= 40) {
      ++more;
      continue;
    }
    const Waiters& x = lines[key];
    all += x.who + (x.warps.size() == 1 ? " warp " : " warps ") + ranges(x.warps) + ": " + texts[key] + " [" + std::to_string(x.lanes) +
           (x.lanes == 1 ? " lane]\n" : " lanes]\n");
  }
  if (more) all += "  ... and " + std::to_string(more) + " more lines\n";
  for (auto& of_rank : w.grids)
    for (auto& g : of_rank)
      if (!g->finished() && g->next_block < g->blocks)
        all += "  " + g->name + ": " + std::to_string(g->blocks - g->next_block) + " blocks have not started (resident_clusters=" +
               std::to_string(w.options.resident_clusters) + ")\n";
  return all;
}

bool dropped_here(const char* kind, Site site) {
  World& w = world();
  // Asked at every step: found by the addresses of the texts, which are named once.
  const uint64_t key = (reinterpret_cast<uintptr_t>(kind) * 0x9E3779B97F4A7C15ull) ^ (reinterpret_cast<uintptr_t>(site.file) * 31 + site.line);
  auto [it, fresh] = w.drop_places.try_emplace(key);
  DropPlace& place = it->second;
  if (fresh) {
    const std::string s = at(site);
    place.count = &w.drops[{kind, s}];
    place.chosen = w.options.drop_kind == kind && (w.options.drop_site.empty() || w.options.drop_site == s);
  }
  const uint64_t count = (*place.count)++;
  return place.chosen && (w.options.drop_nth < 0 || static_cast<uint64_t>(w.options.drop_nth) == count);
}

bool dropped(const char* what, Site site) { return dropped_here(what, site); }

}  // namespace emulator
