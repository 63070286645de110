#include "banks.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace emulator {

std::string source_line(uintptr_t pc);

namespace {

constexpr size_t kOpenRequests = 64;   // of one place and warp; older ones are taken as they are

struct Request {
  std::array<uintptr_t, 32> address{};
  uint32_t lanes = 0;
};

// What one warp has done at one spot.
struct Stream {
  uint64_t first = 0;                  // number of open.front()
  std::array<uint64_t, 32> visits{};
  std::deque<Request> open;
};

struct Spot {
  uintptr_t pc = 0;
  size_t bytes = 0;
  bool write = false;
  BankSite total{};
  std::map<uint64_t, Stream> warps;    // by block and warp
};

// An access that may still grow.
struct Growing {
  const Thread* thread = nullptr;      // may be gone when it is counted
  uint64_t warp = 0;
  uint32_t lane = 0;
  uintptr_t begin = 0, first_pc = 0, last_pc = 0;
  size_t bytes = 0;
  bool write = false;
} growing;
constexpr uintptr_t kOneRunOfCode = 128;

std::map<std::pair<uintptr_t, size_t>, Spot> plain;   // by instruction and width
std::map<std::pair<std::string, std::string>, BankSite> matrices;
std::vector<BankSite> sites_of_last;

void add(BankSite& site, size_t wavefronts, size_t least) {
  ++site.requests;
  site.wavefronts += wavefronts;
  site.least += least;
  site.worst = std::max<uint64_t>(site.worst, wavefronts - least);
}

// A request of 4 bytes a lane or fewer is one pass over the banks, of 8 two half warps, of 16 four quarters. In a pass
// each word is fetched once, whoever wants it.
void count(Spot& spot, const Request& request) {
  const size_t lanes = spot.bytes <= 4 ? 32 : spot.bytes == 8 ? 16 : 8;
  size_t wavefronts = 0, least = 0;
  for (size_t begin = 0; begin < 32; begin += lanes) {
    std::array<std::set<uintptr_t>, 32> words;
    for (size_t lane = begin; lane < begin + lanes; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      const uintptr_t last = (request.address[lane] + spot.bytes - 1) / 4;
      for (uintptr_t word = request.address[lane] / 4; word <= last; ++word) words[word % 32].insert(word);
    }
    size_t worst = 0;
    for (const auto& w : words) worst = std::max(worst, w.size());
    wavefronts += worst;
    least += worst > 0;
  }
  add(spot.total, wavefronts, least);
}

void close_front(Spot& spot, Stream& stream) {
  count(spot, stream.open.front());
  stream.open.pop_front();
  ++stream.first;
}

void finish_growing() {
  const Growing g = std::exchange(growing, {});
  if (!g.thread) return;
  Spot& spot = plain[{g.first_pc, g.bytes}];
  spot.pc = g.first_pc;
  spot.bytes = g.bytes;
  spot.write = g.write;
  Stream& stream = spot.warps[g.warp];
  const uint64_t visit = stream.visits[g.lane]++;
  if (visit < stream.first) return;   // the rest of its request is long counted
  while (visit - stream.first >= kOpenRequests) close_front(spot, stream);
  while (visit - stream.first >= stream.open.size()) stream.open.emplace_back();
  Request& request = stream.open[visit - stream.first];
  request.address[g.lane] = g.begin;
  request.lanes |= 1u << g.lane;
  if (visit == stream.first && std::popcount(request.lanes) == 32) close_front(spot, stream);
}

}  // namespace

void bank_access(const Thread* t, const void* p, size_t bytes, bool write, uintptr_t pc) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  Growing& g = growing;
  const size_t grown = g.bytes + bytes;
  if (t == g.thread && write == g.write && address == g.begin + g.bytes && pc - g.last_pc < kOneRunOfCode && pc != g.last_pc &&
      bytes >= 4 && grown <= 16 && g.begin % (grown > 8 ? 16 : 8) == 0) {
    g.bytes = grown;
    g.last_pc = pc;
    return;
  }
  finish_growing();
  growing = {t, uint64_t{t->block->uid} << 8 | t->warp->index, t->identity.lane, address, pc, pc, bytes, write};
}

void bank_matrix(Site site, const char* what, size_t wavefronts, size_t least) {
  add(matrices[{at(site), what}], wavefronts, least);
}

void close_banks(Statistics& statistics) {
  sites_of_last.clear();
  finish_growing();
  for (auto& [_, spot] : plain) {
    for (auto& [warp, stream] : spot.warps)
      while (!stream.open.empty()) close_front(spot, stream);
    spot.total.site = source_line(spot.pc);
    spot.total.what = std::string(spot.write ? "write of " : "read of ") + std::to_string(spot.bytes) + " B";
    sites_of_last.push_back(spot.total);
  }
  for (auto& [key, total] : matrices) {
    std::tie(total.site, total.what) = key;
    sites_of_last.push_back(total);
  }
  plain.clear();
  matrices.clear();
  std::sort(sites_of_last.begin(), sites_of_last.end(), [](const BankSite& a, const BankSite& b) {
    const uint64_t x = a.wavefronts - a.least, y = b.wavefronts - b.least;
    return std::tie(y, a.site, a.what) < std::tie(x, b.site, b.what);
  });
  for (const BankSite& s : sites_of_last) statistics.bank_conflicts += s.wavefronts - s.least;
}

std::vector<BankSite> last_bank_sites() { return sites_of_last; }

}  // namespace emulator
