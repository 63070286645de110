// How D leaves: whole parts of a tile by TMA, ragged ones row by row, and the rows that no group owns as zeros.
#pragma once

#include "fp8_gemm_config.cuh"

namespace fp8_gemm_kernels {

// The matrix D of a tile, as threads address it.
template <class C>
HOPPER_DEVICE GlobalRows<typename C::D> rows_of_d(const typename C::Params& p, const Tile& tile) {
  auto* base = static_cast<typename C::D*>(p.d);
  if constexpr (C::kBatched) base += tile.group * p.d_group_stride;
  return {base, p.d_stride, tile.row_end, p.n, p.paired_store};
}

// The rows of a math group's part that exist, from its staging, 16 bytes a lane: the end of a group that TMA must not
// step over, since the rows behind belong to the next one.
template <class C>
HOPPER_DEVICE void copy_rows(typename C::Staging& staging, const GlobalRows<bf16>& d, int32_t row, int32_t column) {
  constexpr int kChunks = C::Staging::kColumns / 8;
  const int32_t rows = d.rows - row;
  for (int32_t i = threadIdx.x % 128; i < rows * kChunks; i += 128) {
    const int32_t r = i / kChunks, c = i % kChunks * 8, left = d.columns - column - c;
    if (left <= 0) continue;
    const bf16* from = staging.chunk(r, c);
    bf16* to = d.base + (row + r) * d.stride + column + c;
    if (left >= 8) {
      hopper::store_vector(to, hopper::load_vector<uint4>(from));
    } else {
      for (int32_t j = 0; j < left; ++j) to[j] = from[j];
    }
  }
}

// D leaves while the next tile's slices are already landing. `row` is relative to the tile, `column` to the matrix.
template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const TensorMap& map_d, const typename C::Params& p,
                            const Tile& tile, typename C::Sums& acc, uint32_t group, int32_t row, int32_t column) {
  constexpr MathGroupShape part = C::kGroup;
  const auto d = rows_of_d<C>(p, tile);
  const bool accumulate = !C::kGrouped && p.accumulate;
  if (accumulate) {
    HOPPER_UNROLL for (int wave = 0; wave < part.waves; ++wave)
      d.template add_to<part.wave_columns>(acc.sum[wave], tile.row + row + C::wave_row(wave), column + C::wave_column(wave));
  }
  if constexpr (C::kStaged) {
    if (p.aligned_rows) {
      auto& staging = shared.staging[group];
      const bool storer = threadIdx.x % 128 == 0;
      if (storer) hopper::bulk_wait_read<0>();   // the previous tile has left the staging
      math_group_sync(group);
      HOPPER_UNROLL for (int wave = 0; wave < part.waves; ++wave)
        acc.stage_bf16(wave, staging, C::wave_row(wave), C::wave_column(wave));
      // Each writer: its writes to the staging before the TMA store reads them, its reads of D before it overwrites them.
      if (accumulate) {
        hopper::fence_proxy_async<hopper::Space::all>();
      } else {
        hopper::fence_proxy_async<hopper::Space::shared>();
      }
      math_group_sync(group);
      // TMA clips at the end of D, not at the end of a group.
      if (C::kGrouped && tile.row + row + part.rows > tile.row_end && tile.row_end != p.rows) {
        copy_rows<C>(staging, d, tile.row + row, column);
      } else if (storer) {
        HOPPER_UNROLL for (int panel = 0; panel < C::Staging::kPanels; ++panel) {
          const int32_t x = column + panel * C::Staging::kPanelColumns, y = tile.row + row;
          if constexpr (C::kBatched) {
            hopper::tma_store(map_d, staging.panel(panel), {x, y, tile.group});
          } else {
            hopper::tma_store(map_d, staging.panel(panel), {x, y});
          }
        }
        hopper::bulk_commit();
      }
      return;
    }
  }
  HOPPER_UNROLL for (int wave = 0; wave < part.waves; ++wave)
    d.template store<part.wave_columns>(acc.sum[wave], tile.row + row + C::wave_row(wave), column + C::wave_column(wave));
}

// Zeros in one row of D, by a warp.
template <class D>
HOPPER_DEVICE void clear_row(D* row, int32_t columns, bool aligned) {
  constexpr int kVector = 16 / sizeof(D);
  const int32_t lane = threadIdx.x % 32, whole = aligned ? columns / kVector * kVector : 0;
  for (int32_t c = lane * kVector; c < whole; c += 32 * kVector) hopper::store_vector(row + c, uint4{0, 0, 0, 0});
  for (int32_t c = whole + lane; c < columns; c += 32) row[c] = D{};
}

// The rows of D that no group owns, dealt out to `warps` warps in turn; this one is number `warp`. The warps of the
// producer's group that load nothing do it, beside the products.
template <class C>
HOPPER_DEVICE void clear_rest(const typename C::Shared& shared, const typename C::Params& p, uint32_t warp, uint32_t warps) {
  auto* d = static_cast<typename C::D*>(p.d);
  int64_t next = warp;   // number of the warp's next row among all that are to be cleared
  int64_t past = 0;      // and of the first row behind the ranges so far
  [[maybe_unused]] int32_t counts = 0;
  const auto range = [&](typename C::D* matrix, int32_t begin, int32_t end) {
    const int64_t first = past;
    for (past += end - begin; next < past; next += warps)
      clear_row(matrix + (begin + (next - first)) * p.d_stride, p.n, p.aligned_rows);
  };
  if constexpr (C::kBatched) {
    for (int32_t g = 0; g < p.tiles.groups; ++g) {
      const int32_t lane = threadIdx.x % 32, mine = g - g % 32 + lane;
      if (g % 32 == 0) counts = mine < p.tiles.groups ? p.tiles.rows.rows[mine] : 0;   // 32 at a time, one latency
      range(d + g * p.d_group_stride, C::Table::clamp(hopper::shuffle(counts, g % 32), p.rows), p.rows);
    }
  } else {
    range(d, 0, shared.table.bounds[0]);
    range(d, shared.table.bounds[shared.table.count], p.rows);
  }
}

}  // namespace fp8_gemm_kernels
