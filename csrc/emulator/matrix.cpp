// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements between shared memory and the registers of a warp.
// PTX ISA: "ldmatrix", "stmatrix". Row r of matrix m has the address that lane 8m + r gives.
#include <cstring>
#include <set>

#include "banks.h"
#include "fragments.h"
#include "shadow.h"

namespace emulator {
namespace {

// The rows of a warp's move, gathered lane by lane; then each lane moves its own elements.
struct Move {
  std::array<uint8_t*, 32> row{};
};
std::map<const Warp*, Move> moves;

uint16_t& element(Move& m, int matrix, uint32_t row, uint32_t column) {
  return reinterpret_cast<uint16_t*>(m.row[matrix * 8 + row])[column];
}

// Rows of one 8x8 matrix that fall into the same banks cost a wavefront more each.
void count_bank_conflicts(const Move& m, int matrices, Site site, const char* what) {
  size_t wavefronts = 0;
  for (int i = 0; i < matrices; ++i) {
    std::array<std::set<uintptr_t>, 8> of_bank_group;
    for (int r = 0; r < 8; ++r) {
      const auto a = reinterpret_cast<uintptr_t>(m.row[i * 8 + r]);
      of_bank_group[a / 16 % 8].insert(a);
    }
    size_t worst = 0;
    for (const auto& s : of_bank_group) worst = std::max(worst, s.size());
    wavefronts += worst;
  }
  bank_matrix(site, what, wavefronts, matrices);
}

void check_row(const void* row, int matrices, Site site, bool write) {
  Thread* t = me();
  if (static_cast<int>(t->identity.lane) >= 8 * matrices) return;   // its address is not used
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    report("matrix.arguments", site, std::string(write ? "stmatrix" : "ldmatrix") + " row at " + place(row) + ": not 16-byte aligned");
    world().stop();
  }
  shared_address(row, site);
  access(row, 16, generic_access(t, write, site, write ? "stmatrix" : "ldmatrix"));
}

}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* row, Site site) {
  Thread* t = me();
  check_row(row, matrices, site, false);
  Move& m = moves[t->warp];
  m.row[t->identity.lane] = static_cast<uint8_t*>(const_cast<void*>(row));
  vote(Vote::ballot, true, 0xffffffffu, site);   // all lanes have given their addresses
  Move& now = moves[t->warp];
  if (t->identity.lane == 0) count_bank_conflicts(now, matrices, site, "ldmatrix");
  const Place p = matrix_place(t->identity.lane);
  for (int i = 0; i < matrices; ++i) {
    const uint32_t low = transposed ? element(now, i, p.column, p.row) : element(now, i, p.row, p.column);
    const uint32_t high = transposed ? element(now, i, p.column + 1, p.row) : element(now, i, p.row, p.column + 1);
    registers[i] = low | high << 16;
  }
  // Nobody gives the next move's address before all have taken this one's.
  vote(Vote::ballot, true, 0xffffffffu, site);
}

void stmatrix(void* row, const uint32_t* registers, int matrices, bool transposed, Site site) {
  if (dropped_here("stmatrix", site)) return;
  Thread* t = me();
  check_row(row, matrices, site, true);
  Move& m = moves[t->warp];
  m.row[t->identity.lane] = static_cast<uint8_t*>(row);
  vote(Vote::ballot, true, 0xffffffffu, site);
  Move& now = moves[t->warp];
  if (t->identity.lane == 0) count_bank_conflicts(now, matrices, site, "stmatrix");
  const Place p = matrix_place(t->identity.lane);
  for (int i = 0; i < matrices; ++i) {
    const auto low = static_cast<uint16_t>(registers[i]), high = static_cast<uint16_t>(registers[i] >> 16);
    if (transposed) {
      element(now, i, p.column, p.row) = low;
      element(now, i, p.column + 1, p.row) = high;
    } else {
      element(now, i, p.row, p.column) = low;
      element(now, i, p.row, p.column + 1) = high;
    }
  }
  vote(Vote::ballot, true, 0xffffffffu, site);
}

void forget_moves() { moves.clear(); }

}  // namespace emulator
