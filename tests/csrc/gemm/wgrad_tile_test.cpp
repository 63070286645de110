// The schedule of fp8_wgrad on the CPU, exhaustively: every tile of every group once, clusters within one group, slices
// that exist whatever stands in the offsets. Prints nothing and returns 0 when all hold.
#include <climits>
#include <cstdio>
#include <map>
#include <tuple>
#include <vector>

#include "../../../csrc/gemm/fp8_wgrad_tiles.h"

namespace {

int failures = 0;

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      ++failures;                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

using Key = std::tuple<int, int, int>;   // group, row, column

void every_tile_once(int m, int n, int groups, int rows, int columns, Multicast multicast, uint32_t clusters) {
  const TileGrid grid{n, uint32_t(rows), uint32_t(columns), multicast};
  std::vector<int32_t> offsets{0};
  for (int g = 0; g < groups; ++g) offsets.push_back(offsets.back() + 128 * (g * 7 % 5));
  WgradTiles tiles = wgrad_tiles(grid, m, groups, clusters);
  tiles.slices = offsets.back() / 128;
  tiles.offsets = offsets.data();
  const int pair = multicast == Multicast::none ? 1 : 2;
  std::map<Key, int> visits;
  for (uint32_t cluster = 0; cluster < clusters; ++cluster) {
    std::vector<WgradTile> tile(pair);
    for (uint32_t i = cluster;; i += clusters) {
      int found = 0;
      for (int rank = 0; rank < pair; ++rank) found += tiles.find(i, rank, tile[rank]);
      EXPECT(found == 0 || found == pair, "both CTAs of a cluster must agree that tile %u exists", i);
      if (found == 0) break;
      const int g = tile[0].group;
      for (const WgradTile& t : tile) {
        ++visits[{t.group, t.row, t.column}];
        EXPECT(t.group == g, "cluster straddles groups %d and %d", g, t.group);
        EXPECT(t.slice == offsets[g] / 128 && t.slice_end == offsets[g + 1] / 128, "group %d", g);
      }
      if (pair == 2) {
        const bool a = multicast == Multicast::a;
        EXPECT(tile[1].row - tile[0].row == (a ? 0 : rows) && tile[1].column - tile[0].column == (a ? columns : 0),
               "tiles (%d,%d) and (%d,%d) do not share the operand", tile[0].row, tile[0].column, tile[1].row, tile[1].column);
      }
    }
  }
  size_t wanted = 0;
  for (int g = 0; g < groups; ++g)
    for (int r = 0; r < m; r += rows)
      for (int c = 0; c < n; c += columns, ++wanted) {
        const auto at = visits.find({g, r, c});
        EXPECT(at != visits.end() && at->second == 1, "tile (%d: %d,%d)", g, r, c);
      }
  for (const auto& [key, count] : visits) {
    const auto [g, r, c] = key;
    if (r < m && c < n) continue;
    EXPECT(multicast != Multicast::none, "tile (%d: %d,%d) does not exist", g, r, c);
  }
  EXPECT(visits.size() >= wanted, "%zu of %zu", visits.size(), wanted);
}

void nonsense() {
  // Every pair of these: negative, no multiples, past the end, the ends of int32.
  const int32_t values[] = {INT_MIN, -129, -128, -1, 0, 1, 127, 128, 129, 384, 511, 512, 513, 640, 641, INT_MAX - 127, INT_MAX};
  for (const int32_t slices : {0, 1, 4, 5, (INT_MAX - 511) / 128}) {
    for (const int32_t first : values)
      for (const int32_t past : values) {
        const int32_t offsets[] = {first, past};
        WgradTiles tiles;
        tiles.slices = slices;
        tiles.offsets = offsets;
        int32_t begin = -1, end = -1;
        tiles.slices_of(0, begin, end);
        EXPECT(0 <= begin && begin <= end && end <= slices, "%d %d of %d: %d %d", first, past, slices, begin, end);
        int64_t inside = 0;   // slices that lie wholly between the offsets, counted near them
        for (int64_t s = 0; s < slices && s < 8; ++s) inside += first <= s * 128 && (s + 1) * 128 <= past;
        if (slices <= 8) EXPECT(end - begin == inside, "%d %d of %d: %d %d", first, past, slices, begin, end);
      }
  }
}

}  // namespace

int main() {
  for (const int m : {1, 64, 65, 192, 1408})
    for (const int n : {8, 193, 1408})
      for (const int groups : {1, 2, 8, 33})
        for (const auto& [rows, columns] : {std::pair{128, 192}, {128, 160}, {64, 128}})
          for (const Multicast multicast : {Multicast::none, Multicast::a, Multicast::b})
            for (const uint32_t clusters : {1u, 5u, 66u}) every_tile_once(m, n, groups, rows, columns, multicast, clusters);
  nonsense();
  return failures == 0 ? 0 : 1;
}
