#include "tile_chooser.h"

#include <algorithm>

namespace {

constexpr uint64_t kSlice = 128;                // bytes of K in a slice, also its elements
constexpr uint64_t kTensorElements = 32;        // of D per clock and slice: 128x128 takes 512 clocks (8192 FLOP/clock)
constexpr uint64_t kSharedBytes = 128;          // of the shared memory port per clock
constexpr uint64_t kL2Bytes = 48;               // that L2 sustains per SM and clock (40-60 in the literature)
constexpr uint64_t kTileClocks = 500;           // barriers and drain of an epilogue that nothing hides
constexpr uint64_t kElementsPerClock = 48;      // of D through conversion and staging
constexpr uint64_t kClusterPercent = 2;         // two CTAs wait for each other

// Tiles (or pairs of them) along M. Of a group only the expected size is known, m / groups; its last tile is half
// full on average, and no group with rows has less than one.
uint64_t units_along_m(const TileProblem& problem, const TileGrid& grid) {
  if (problem.groups <= 1) return grid.m_units(problem.m);
  const uint64_t rows = uint64_t{grid.tile_rows} * grid.m_pair(), groups = problem.groups, m = problem.m;
  return std::max((m + groups * rows / 2 + rows - 1) / rows, std::min(groups, m));
}

}  // namespace

uint64_t slice_clocks(TileShape tile, Multicast multicast) {
  const MathGroupShape group = math_group_shape(tile);
  const uint64_t rows = tile.rows, columns = tile.columns;
  const uint64_t tensor = rows * columns / kTensorElements;
  // TMA writes both operands once; every wave reads its 64 rows of A and its columns of B.
  const uint64_t reads = 2 * static_cast<uint64_t>(group.waves) * (64 + group.wave_columns);
  const uint64_t shared = (rows + columns + reads) * kSlice / kSharedBytes;
  // A shared operand is fetched once for two CTAs.
  const uint64_t fetched = rows / (multicast == Multicast::a ? 2 : 1) + columns / (multicast == Multicast::b ? 2 : 1);
  const uint64_t l2 = fetched * kSlice / kL2Bytes;
  return std::max({tensor, shared, l2});
}

uint64_t gemm_clocks(const TileProblem& problem, TileShape tile, Multicast multicast) {
  const uint64_t pair = multicast == Multicast::none ? 1 : 2;
  const TileGrid grid{static_cast<int32_t>(problem.n), static_cast<uint32_t>(tile.rows),
                      static_cast<uint32_t>(tile.columns), multicast};
  const uint64_t units = units_along_m(problem, grid) * grid.n_units();
  const uint64_t clusters = std::max<uint64_t>(problem.sms / pair, 1);
  const uint64_t waves = (units + clusters - 1) / clusters;
  const uint64_t slices = (problem.k + kSlice - 1) / kSlice;
  const uint64_t main_loop = slices * slice_clocks(tile, multicast) * (100 + (pair - 1) * kClusterPercent) / 100;
  return waves * (main_loop + kTileClocks + uint64_t(tile.rows) * tile.columns / kElementsPerClock);
}

TileChoice choose_tile(const TileProblem& problem, const TileShape* shapes, size_t count) {
  TileChoice best{shapes[0], Multicast::none, ~uint64_t{0}};
  for (const Multicast multicast : {Multicast::none, Multicast::a, Multicast::b}) {
    if (multicast != Multicast::none && (!problem.clusters || problem.sms < 2)) continue;
    for (size_t i = 0; i < count; ++i) {
      const uint64_t clocks = gemm_clocks(problem, shapes[i], multicast);
      if (clocks < best.clocks) best = {shapes[i], multicast, clocks};
    }
  }
  return best;
}
