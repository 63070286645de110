// Schedulers and tile chooser on the CPU, exhaustively: every tile once, group bounds honoured, clusters in one group.
// Prints nothing and returns 0 when all hold; otherwise one line per broken rule.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "../../../csrc/common/tile_chooser.h"

namespace {

int failures = 0;

#define EXPECT(condition, ...)                              \
  do {                                                      \
    if (!(condition)) {                                     \
      ++failures;                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                             \
      std::printf("\n");                                    \
    }                                                       \
  } while (false)

using Key = std::tuple<int, int, int>;   // group, row, column

// Walks the list as a persistent grid of `clusters` does and counts how often each tile is taken.
template <class Tiles>
std::map<Key, int> walk(const Tiles& tiles, uint32_t clusters, int pair, std::map<Key, std::vector<Key>>* mates) {
  std::map<Key, int> visits;
  for (uint32_t cluster = 0; cluster < clusters; ++cluster) {
    std::vector<Tiles> walks(pair, tiles);
    for (uint32_t i = cluster;; i += clusters) {
      std::vector<Key> taken;
      for (int rank = 0; rank < pair; ++rank) {
        Tile tile;
        if (!walks[rank].find(i, rank, tile)) break;
        taken.emplace_back(tile.group, tile.row, tile.column);
        ++visits[taken.back()];
      }
      if (taken.empty()) break;
      EXPECT(static_cast<int>(taken.size()) == pair, "the two CTAs of a cluster must agree that tile %u exists", i);
      if (mates) (*mates)[taken[0]] = taken;
    }
  }
  return visits;
}

constexpr Multicast kAll[] = {Multicast::none, Multicast::a, Multicast::b};

void check_pairs(const std::map<Key, std::vector<Key>>& mates, const TileGrid& grid) {
  for (const auto& [first, both] : mates) {
    if (both.size() < 2) continue;
    const auto [g0, r0, c0] = both[0];
    const auto [g1, r1, c1] = both[1];
    EXPECT(g0 == g1, "cluster straddles groups %d and %d", g0, g1);
    const bool a = grid.multicast == Multicast::a;
    EXPECT(r1 - r0 == (a ? 0 : int(grid.tile_rows)) && c1 - c0 == (a ? int(grid.tile_columns) : 0),
           "tiles (%d,%d) and (%d,%d) do not share the operand", r0, c0, r1, c1);
  }
}

// Every tile that exists is visited once; a surplus tile lies past the end of its group or of N.
void check_cover(const std::map<Key, int>& visits, const TileGrid& grid, const std::vector<std::pair<int, int>>& groups) {
  std::map<Key, int> wanted;
  for (size_t g = 0; g < groups.size(); ++g)
    for (int r = groups[g].first; r < groups[g].second; r += grid.tile_rows)
      for (int c = 0; c < grid.n; c += grid.tile_columns) wanted[{int(g), r, c}] = 1;
  for (const auto& [key, count] : visits) {
    const auto [g, r, c] = key;
    EXPECT(count == 1, "tile (%d: %d,%d) visited %d times", g, r, c, count);
    if (wanted.erase(key) == 0)
      EXPECT(grid.multicast != Multicast::none && (r >= groups[g].second || c >= grid.n), "tile (%d: %d,%d) does not exist", g, r, c);
  }
  EXPECT(wanted.empty(), "%zu tiles were never visited", wanted.size());
}

void dense() {
  for (const int m : {1, 63, 64, 65, 128, 129, 1000, 4097})
    for (const int n : {1, 8, 112, 113, 576, 2112, 7176})
      for (const auto& [rows, columns] : {std::pair{128, 128}, {64, 256}, {128, 112}, {256, 128}})
        for (const Multicast multicast : kAll)
          for (const uint32_t clusters : {1u, 3u, 66u, 132u}) {
            const TileGrid grid{n, uint32_t(rows), uint32_t(columns), multicast};
            const DenseTiles tiles = dense_tiles(grid, m, clusters);
            std::map<Key, std::vector<Key>> mates;
            const auto visits = walk(tiles, clusters, multicast == Multicast::none ? 1 : 2, &mates);
            check_cover(visits, grid, {{0, m}});
            check_pairs(mates, grid);
            EXPECT(visits.size() == tiles.raster.count() * mates.begin()->second.size(), "m %d n %d", m, n);
          }
}

void bands() {
  // One wave of 132 CTAs on 64 x 64 tiles of 128 x 128 must touch at most 8 + 17 panels; row by row it would be 67.
  const TileGrid grid{8192, 128, 128, Multicast::none};
  const DenseTiles tiles = dense_tiles(grid, 8192, 132);
  std::set<int> rows, columns;
  for (uint32_t i = 0; i < 132; ++i) {
    Tile tile;
    tiles.find(i, 0, tile);
    rows.insert(tile.row);
    columns.insert(tile.column);
  }
  EXPECT(rows.size() + columns.size() <= 25, "%zu + %zu panels", rows.size(), columns.size());
}

void grouped() {
  std::vector<std::vector<int>> cases = {{},       {0},         {0, 0, 0},        {0, 9, 0, 0},      {5, 0, 128, 1},
                                         {192, 3}, {1, 1, 1, 1}, {129, 256, 0, 64}, {1408, 1408, 768}, {}};
  unsigned state = 1;
  for (int g = 0; g < 257; ++g) {   // skewed: most experts idle, some with hundreds of rows
    state = state * 1664525u + 1013904223u;
    cases.back().push_back(state >> 30 ? int(state >> 24) % 7 : int(state >> 20) % 700);
  }
  for (const auto& sizes : cases)
    for (const int first : {0, 3})
      for (const int n : {8, 768, 1408})
        for (const Multicast multicast : kAll)
          for (const uint32_t clusters : {1u, 5u, 66u}) {
            const TileGrid grid{n, 128, 128, multicast};
            std::vector<int32_t> offsets{first}, masked;
            std::vector<std::pair<int, int>> packed, batch;
            for (const int size : sizes) {
              packed.emplace_back(offsets.back(), offsets.back() + size);
              batch.emplace_back(0, size);
              masked.push_back(size);
              offsets.push_back(offsets.back() + size);
            }
            const int pair = multicast == Multicast::none ? 1 : 2, groups = int(sizes.size());
            for (const bool by_offsets : {true, false}) {
              std::map<Key, std::vector<Key>> mates;
              const auto visits = by_offsets
                  ? walk(grouped_tiles(grid, RowsByOffsets{offsets.data()}, groups), clusters, pair, &mates)
                  : walk(grouped_tiles(grid, RowsByMask{masked.data()}, groups), clusters, pair, &mates);
              check_cover(visits, grid, by_offsets ? packed : batch);
              check_pairs(mates, grid);
            }
          }
  // Offsets that descend cannot be refused on the device: the group counts as empty.
  const int32_t bad[] = {0, 100, 50, 60};
  auto tiles = grouped_tiles(TileGrid{128, 128, 128, Multicast::none}, RowsByOffsets{bad}, 3);
  Tile tile;
  EXPECT(tiles.find(0, 0, tile) && tile.group == 0 && tile.row == 0 && tile.row_end == 100, "first group");
  EXPECT(tiles.find(1, 0, tile) && tile.group == 2 && tile.row == 50 && tile.row_end == 60, "third group");
  EXPECT(!tiles.find(2, 0, tile), "the end");
}

constexpr TileShape kTiles[] = {{256, 128}, {128, 256}, {128, 192}, {128, 160}, {128, 128},
                                {128, 112}, {128, 96},  {64, 128},  {64, 256}};

// Prints the choices for the V3 shapes; the Python side compares them with the pinned table.
void choices() {
  const long shapes[][2] = {{2112, 7168},  {576, 7168},   {1536, 7168}, {24576, 1536}, {32768, 512},
                            {7168, 16384}, {36864, 7168}, {7168, 18432}, {4096, 7168}, {7168, 2048}};
  for (const auto& [n, k] : shapes)
    for (const long m : {64, 128, 512, 4096, 16384}) {
      const TileChoice choice = choose_tile({m, n, k, 132}, kTiles, 9);
      const char* names[] = {"", "/a", "/b"};
      std::printf("%ld %ld %ld %dx%d%s\n", m, n, k, choice.shape.rows, choice.shape.columns, names[int(choice.multicast)]);
    }
}

// kFp8GroupedTiles of csrc/gemm/fp8_gemm.h.
constexpr TileShape kGroupedTiles[] = {{128, 256}, {128, 192}, {128, 160}, {128, 128}, {64, 128}, {64, 256}};

void grouped_choices() {
  const long shapes[][2] = {{4096, 7168}, {7168, 2048}, {7168, 4096}, {2048, 7168}};
  for (const auto& [n, k] : shapes)
    for (const long groups : {4, 8, 16, 32})
      for (const long rows : {16, 128, 512, 2048, 8192}) {
        const TileChoice choice = choose_tile({groups * rows, n, k, 132, true, groups}, kGroupedTiles, 6);
        const char* names[] = {"", "/a", "/b"};
        std::printf("%ld %ld %ld %ld %dx%d%s\n", groups, rows, n, k, choice.shape.rows, choice.shape.columns,
                    names[int(choice.multicast)]);
      }
}

void chooser() {
  // Bytes per tensor clock of research/gemm-quant.md 6.2: the cap of the shared memory port.
  const auto port = [](TileShape tile) { return slice_clocks(tile, tile.rows > tile.columns ? Multicast::a : Multicast::b); };
  EXPECT(port({128, 128}) == 640 && port({256, 128}) == 1152 && port({128, 192}) == 832 && port({128, 160}) == 736,
         "%lu %lu", (unsigned long)port({128, 128}), (unsigned long)port({256, 128}));
  // 112 wide tiles fill 128 of 132 SMs where 128 wide ones fill 112.
  EXPECT(gemm_clocks({256, 7168, 7168, 132}, {128, 112}, Multicast::none) <
             gemm_clocks({256, 7168, 7168, 132}, {128, 128}, Multicast::none), "112 must beat 128");
  // Of a group the last tile is half full on average, so that tall tiles lose where groups are short.
  const TileProblem groups{32 * 96, 4096, 7168, 132, true, 32};
  EXPECT(gemm_clocks(groups, {64, 256}, Multicast::a) < gemm_clocks(groups, {256, 128}, Multicast::a), "96 rows a group");
  EXPECT(gemm_clocks({5, 4096, 7168, 132, true, 512}, {128, 128}, Multicast::none) <=
             gemm_clocks({640, 4096, 7168, 132}, {128, 128}, Multicast::none), "5 rows are at most 5 tiles");
  for (const long m : {1, 64, 4097}) {
    EXPECT(choose_tile({m, 4096, 7168, 1}, kTiles, 9).multicast == Multicast::none, "one SM has no pairs");
    EXPECT(choose_tile({m, 4096, 7168, 132, false}, kTiles, 9).multicast == Multicast::none, "clusters refused");
    EXPECT(choose_tile({m, 4096, 0, 132}, kTiles, 9).clocks < 100000, "no slices, only epilogues");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    argv[1][0] == 'g' ? grouped_choices() : choices();
    return 0;
  }
  dense();
  bands();
  grouped();
  chooser();
  return failures == 0 ? 0 : 1;
}
