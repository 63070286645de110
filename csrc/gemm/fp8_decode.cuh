// FP8 GEMM for decoding, at most 64 rows of A in a group: the weights are the 64-row operand of wgmma, the tokens its
// columns, and the CTAs of a cluster divide K. The schedule is drawn in README.md beside this file.
// Read kernel, producer, math, epilogue in this order.
#pragma once

#include <type_traits>

#include "../common/pipeline.h"
#include "../common/roles.h"
#include "../common/shared_tile.h"
#include "../hopper/front.h"
#include "fp8_decode.h"

namespace fp8_decode_kernels {

using hopper::bf16;
using hopper::e4m3;
using hopper::Swizzle;
using hopper::TensorMap;

constexpr int kSliceK = 128;               // one scale tile of K: 128 bytes, the span of the widest swizzle
constexpr int kStepK = 32;                 // of one e4m3 wgmma
constexpr int kBlockRows = 128;            // weight rows of a CTA: one scale block, so one scale per slice
constexpr int kMathGroups = 2, kGroupRows = kBlockRows / kMathGroups;
constexpr int kMathWarps = 4 * kMathGroups, kThreads = 32 * (kMathWarps + 1);   // and one warp that loads
constexpr int kMaxTokens = kDecodeRows, kMaxSplit = 8, kMaxGroups = kDecodeGroups;

// The groups that have work, so that item i is a division away and empty groups cost nothing.
struct WorkList {
  struct Entry { uint16_t group, rows; } entry[kMaxGroups];
  int32_t count;
};

template <int Tokens, bool Clustered>
struct Config {
  static constexpr int kTokens = Tokens;
  static constexpr bool kClustered = Clustered;
  // Clusters are few (the rule for split_k keeps them within one wave), so that a CTA may use a whole SM; without a
  // cluster two CTAs share one, and one loads while the other drains.
  static constexpr int kBlocksPerSm = Clustered || Tokens == 64 ? 1 : 2;
  static constexpr int kSmemLimit = kBlocksPerSm == 2 ? (228 * 1024) / 2 - 1024 : 227 * 1024;

  using Staged = float[Tokens][kGroupRows];
  struct Nothing {};
  struct Fixed {
    alignas(128) Staged staged[kMathGroups];                                       // D^T turned into rows of D
    alignas(128) std::conditional_t<Clustered, Staged, Nothing> landed[kMathGroups];   // the same of the peers
    hopper::Mbarrier pieces_landed[kMathGroups], pieces_read[kMathGroups];
    WorkList work;
  };
  struct alignas(128) ScaleRow { float token[Tokens]; };

  static constexpr int kStageBytes = (kBlockRows + Tokens) * kSliceK + Tokens * static_cast<int>(sizeof(float));
  static constexpr int kStageRoom = (kBlockRows + Tokens) * kSliceK + static_cast<int>(sizeof(ScaleRow));
  static constexpr int kFitting = (kSmemLimit - static_cast<int>(sizeof(Fixed)) - 1024) / kStageRoom;
  static constexpr int kStages = kFitting < 8 ? kFitting : 8;
  struct Shared {
    SharedTile<e4m3, kBlockRows, kSliceK, Swizzle::b128> weights[kStages];
    SharedTile<e4m3, Tokens, kSliceK, Swizzle::b128> tokens[kStages];
    ScaleRow scale_a[kStages];
    Fixed fixed;
    Pipeline<kStages> pipeline;
  };
  static_assert(sizeof(Shared) <= kSmemLimit, "stages and staging must fit into shared memory");
  static_assert(kBlocksPerSm * kStages * kBlockRows * kSliceK >= 64 * 1024, "64 KiB of weights in flight on an SM");
  static_assert(Tokens + 40 <= 65536 / (kBlocksPerSm * kThreads) / 8 * 8, "sums, partial sums and addresses in registers");
  static_assert(Tokens % 8 == 0 && Tokens >= kMaxSplit && Tokens <= kMaxTokens, "each rank of a cluster owns whole tokens");
};

struct Params {
  int32_t m, n, groups;
  int32_t tiles;              // ceil(N / 128)
  int32_t slices;             // ceil(K / 128)
  int32_t split;              // CTAs of a cluster
  const int32_t* masked_m;    // [groups], or null: all m rows of the one group exist
  bool fill;                  // rows from masked_m on become zero
  bool prefetch_weights;      // before the previous kernel has ended
  const float* scale_b;
  int64_t scale_b_stride, scale_b_group_stride;
  void* d;
  int64_t d_stride, d_group_stride;
  bool fp32, wide_store;      // wide: every (row, column % 4 == 0) of D is aligned to four elements
};

struct Item {
  int32_t group, rows, column;   // matrix, its rows that exist, first weight row
};

// What is one CTA's of all work: an item, one after the other, and of its slices those of the CTA's rank.
template <class C>
struct Share {
  const WorkList& work;
  const Params& p;
  int32_t rank;

  HOPPER_DEVICE Share(const typename C::Shared& shared, const Params& params)
      : work(shared.fixed.work), p(params), rank(C::kClustered ? hopper::cluster_rank() : 0) {}

  HOPPER_DEVICE uint32_t first() const { return C::kClustered ? blockIdx.x / p.split : blockIdx.x; }
  HOPPER_DEVICE uint32_t step() const { return C::kClustered ? gridDim.x / p.split : gridDim.x; }
  HOPPER_DEVICE bool batch() const { return !C::kClustered && p.masked_m; }
  HOPPER_DEVICE uint32_t count() const { return p.tiles * (batch() ? work.count : 1); }
  HOPPER_DEVICE Item item(uint32_t i) const {
    if (!batch()) return {0, p.m, static_cast<int32_t>(i) * kBlockRows};
    const WorkList::Entry entry = work.entry[i / p.tiles];
    return {entry.group, entry.rows, static_cast<int32_t>(i % p.tiles) * kBlockRows};
  }

  // Range r of K: slices r S / split up to (r + 1) S / split, rounded down. It may be empty.
  HOPPER_DEVICE int32_t first_slice() const { return C::kClustered ? rank * p.slices / p.split : 0; }
  HOPPER_DEVICE int32_t past_slice(const Item& item) const {
    if (item.rows == 0) return first_slice();   // only zeros to write
    return C::kClustered ? (rank + 1) * p.slices / p.split : p.slices;
  }

  // Tokens are divided among the ranks of a cluster, each of which adds up and stores its own.
  HOPPER_DEVICE int32_t tokens_of_rank() const { return C::kTokens / p.split; }
  HOPPER_DEVICE int32_t tokens_of(int32_t r) const {
    const int32_t left = p.m - r * tokens_of_rank();
    return left < 0 ? 0 : left < tokens_of_rank() ? left : tokens_of_rank();
  }
};

// One warp: entries in the order of groups. A lane counts 16 groups, whose loads are on their way together.
HOPPER_DEVICE void list_work(WorkList& work, const Params& p) {
  constexpr int kEach = kMaxGroups / 32;
  const int32_t lane = threadIdx.x % 32, first = lane * kEach;
  int32_t rows[kEach], mine = 0;
  HOPPER_UNROLL for (int i = 0; i < kEach; ++i) rows[i] = first + i < p.groups ? p.masked_m[first + i] : 0;
  HOPPER_UNROLL for (int i = 0; i < kEach; ++i) {
    rows[i] = rows[i] < 0 ? 0 : rows[i] < p.m ? rows[i] : p.m;   // nonsense on the device stays within the tensors
    if (first + i >= p.groups || (rows[i] == 0 && !p.fill)) rows[i] = -1;
    mine += rows[i] >= 0;
  }
  int32_t at = mine;                                             // inclusive prefix sum
  for (uint32_t d = 1; d < 32; d *= 2) {
    const int32_t before = hopper::shuffle_up(at, d);
    at += lane >= static_cast<int32_t>(d) ? before : 0;
  }
  if (lane == 31) work.count = at;
  at -= mine;
  HOPPER_UNROLL for (int i = 0; i < kEach; ++i)
    if (rows[i] >= 0) work.entry[at++] = {static_cast<uint16_t>(first + i), static_cast<uint16_t>(rows[i])};
}

// ---- loading -------------------------------------------------------------------------------------------------------

// Weights are read once: they shall not push anything else out of L2.
template <class C>
HOPPER_DEVICE void load_weights(typename C::Shared& shared, const TensorMap& map_b,
                                const typename Pipeline<C::kStages>::Cursor& cursor, const Item& item, int32_t slice) {
  shared.pipeline.acquire(cursor);
  shared.pipeline.expect(cursor, C::kStageBytes);
  hopper::tma_load<hopper::CacheHint::evict_first>(shared.weights[cursor.stage].data, map_b,
                                                   shared.pipeline.full_barrier(cursor),
                                                   {slice * kSliceK, item.column, item.group});
}

// Slices of the first item whose weights are on their way before the previous kernel has ended.
template <class C>
HOPPER_DEVICE int32_t slices_ahead(const Share<C>& share) {
  if (!share.p.prefetch_weights) return 0;
  const int32_t slices = share.past_slice(share.item(share.first())) - share.first_slice();
  return slices < C::kStages ? slices : C::kStages;
}

template <class C>
HOPPER_DEVICE void prefetch(typename C::Shared& shared, const TensorMap& map_b, const Share<C>& share) {
  typename Pipeline<C::kStages>::Cursor cursor;
  const Item item = share.item(share.first());
  for (int32_t i = 0; i < slices_ahead(share); ++i, cursor.advance())
    load_weights<C>(shared, map_b, cursor, item, share.first_slice() + i);
}

// One elected lane keeps the ring full: per slice 128 weight rows, the tokens and their scales.
template <class C>
HOPPER_DEVICE void producer(typename C::Shared& shared, const TensorMap& map_a, const TensorMap& map_b,
                            const TensorMap& map_scale_a, const Share<C>& share) {
  typename Pipeline<C::kStages>::Cursor cursor;
  int32_t ahead = slices_ahead(share);
  for (uint32_t i = share.first(); i < share.count(); i += share.step()) {
    const Item item = share.item(i);
    for (int32_t slice = share.first_slice(); slice < share.past_slice(item); ++slice, cursor.advance()) {
      if (ahead > 0) {
        --ahead;
      } else {
        load_weights<C>(shared, map_b, cursor, item, slice);
      }
      hopper::Mbarrier* full = shared.pipeline.full_barrier(cursor);
      hopper::tma_load(shared.tokens[cursor.stage].data, map_a, full, {slice * kSliceK, 0, item.group});
      hopper::tma_load(&shared.scale_a[cursor.stage], map_scale_a, full, {0, slice, item.group});
    }
  }
  // The last loads are on their way: the next kernel may come and set itself up where this one leaves room.
  hopper::grid_dependency_launch();
}

// ---- multiplying ---------------------------------------------------------------------------------------------------

// The scales of 128 weight rows, one for each slice: 32 slices in a warp's lanes and the next 32 on their way.
struct WeightScales {
  const float* row;
  int32_t slice, past;
  float now, next;

  HOPPER_DEVICE WeightScales(const float* scales, int32_t first, int32_t end) : row(scales), slice(first), past(end) {
    now = load(first);
    next = load(first + 32);
    taken = 0;
  }
  HOPPER_DEVICE float take() {
    if (taken == 32) {
      taken = 0;
      slice += 32;
      now = next;
      next = load(slice + 32);
    }
    return hopper::shuffle(now, taken++);
  }

 private:
  uint32_t taken;
  HOPPER_DEVICE float load(int32_t first) const {
    const int32_t mine = first + static_cast<int32_t>(threadIdx.x % 32);
    return mine < past ? row[mine] : 0.0f;
  }
};

// Who owns what (see common/accumulator.h, rows and columns exchanged): lane l of warp w holds, for each 8 tokens i,
//   register 4i + 0, 4i + 1    weight row 16 w + l / 4        tokens 8i + 2 (l % 4) + 0, 1
//   register 4i + 2, 4i + 3    weight row 16 w + l / 4 + 8    the same tokens
template <int Tokens>
struct TokenSums {
  float sum[Tokens / 2];
  float partial[Tokens / 2];   // owned by the tensor core from issue to wait

  HOPPER_DEVICE void clear() {
    HOPPER_UNROLL for (int i = 0; i < Tokens / 2; ++i) sum[i] = 0.0f;
  }
  HOPPER_DEVICE void promote(const float (&scale)[Tokens / 4], hopper::Site site = HOPPER_HERE) {
    if (hopper::dropped("promotion", site)) return;   // a mutation run of the emulator; constant false on Hopper
    HOPPER_UNROLL for (int r = 0; r < Tokens / 2; ++r)
      sum[r] = hopper::fma(partial[r], scale[r / 4 * 2 + r % 2], sum[r]);
  }
};

template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const Share<C>& share, const Item& item,
                            const float (&sum)[C::kTokens / 2], uint32_t group, uint32_t phase, bool more);

// A math group multiplies its 64 weight rows with all tokens, slice by slice.
template <class C>
HOPPER_DEVICE void math(typename C::Shared& shared, const Share<C>& share, uint32_t group) {
  using Multiply = hopper::Wgmma<C::kTokens, hopper::Operand::e4m3, hopper::Operand::e4m3>;
  const Params& p = share.p;
  const int32_t thread_token = threadIdx.x % 4 * 2;
  auto& pipeline = shared.pipeline;
  typename Pipeline<C::kStages>::Cursor cursor;
  TokenSums<C::kTokens> acc;
  uint32_t phase = 0;
  for (uint32_t i = share.first(); i < share.count(); i += share.step(), phase ^= 1) {
    const Item item = share.item(i);
    const int32_t past = share.past_slice(item);
    acc.clear();
    WeightScales scale_b(p.scale_b + item.group * p.scale_b_group_stride + item.column / kBlockRows * p.scale_b_stride,
                         share.first_slice(), past);
    for (int32_t slice = share.first_slice(); slice < past; ++slice, cursor.advance()) {
      const float weight_scale = scale_b.take();
      pipeline.wait(cursor);
      const uint64_t weights = hopper::matrix_descriptor<Swizzle::b128>(shared.weights[cursor.stage].row(group * kGroupRows));
      const uint64_t tokens = hopper::matrix_descriptor<Swizzle::b128>(shared.tokens[cursor.stage].data);
      hopper::wgmma_fence();
      HOPPER_UNROLL for (int k = 0; k < kSliceK; k += kStepK)
        Multiply::issue(acc.partial, hopper::advance(weights, k), hopper::advance(tokens, k), k != 0);
      hopper::wgmma_commit();
      float scale[C::kTokens / 4];
      HOPPER_UNROLL for (int t = 0; t < C::kTokens / 8; ++t) {
        const float2 pair = hopper::load_vector<float2>(&shared.scale_a[cursor.stage].token[8 * t + thread_token]);
        scale[2 * t] = pair.x * weight_scale;
        scale[2 * t + 1] = pair.y * weight_scale;
      }
      hopper::wgmma_wait<0>();
      hopper::register_fence(acc.partial);
      pipeline.template release<1>(cursor);
      acc.promote(scale);
    }
    epilogue<C>(shared, share, item, acc.sum, group, phase, i + share.step() < share.count());
  }
}

// ---- storing -------------------------------------------------------------------------------------------------------

HOPPER_DEVICE void set(float& to, float x) { to = x; }
HOPPER_DEVICE void set(bf16& to, float x) { to = hopper::to_bf16(x); }
HOPPER_DEVICE void set4(float* to, const float4& x) { hopper::store_vector(to, x); }
HOPPER_DEVICE void set4(bf16* to, const float4& x) {
  hopper::store_vector(to, uint2{hopper::pack_bf16(x.x, x.y), hopper::pack_bf16(x.z, x.w)});
}

// Four neighbouring columns of a row of D, those of them that exist.
template <class T>
HOPPER_DEVICE void store4(const Params& p, const Item& item, int32_t row, int32_t column, const float4& x) {
  T* at = static_cast<T*>(p.d) + item.group * p.d_group_stride + row * p.d_stride + column;
  if (p.wide_store && column + 4 <= p.n) return set4(at, x);
  const float values[4] = {x.x, x.y, x.z, x.w};
  HOPPER_UNROLL for (int i = 0; i < 4; ++i)
    if (column + i < p.n) set(at[i], values[i]);
}

HOPPER_DEVICE float4 add4(const float4& x, const float4& y) {
  return {hopper::add_rn(x.x, y.x), hopper::add_rn(x.y, y.y), hopper::add_rn(x.z, y.z), hopper::add_rn(x.w, y.w)};
}

// Where a weight row lies in the staging of a token: the four lanes of a quad, which hold different pairs of tokens, write
// to different banks, and four neighbours stay together.
HOPPER_DEVICE int32_t staged_place(int32_t token, int32_t row) { return row ^ token / 2 % 4 * 8; }

// Each CTA sends every peer the sums of that peer's tokens; the group that receives pieces has announced their bytes
// before anyone may send: at the start, and again when it has read the pieces of the item before.
template <class C>
HOPPER_DEVICE void announce_pieces(typename C::Shared& shared, const Share<C>& share, uint32_t group) {
  const uint32_t bytes = (share.p.split - 1) * share.tokens_of(share.rank) * kGroupRows * sizeof(float);
  if (bytes != 0) hopper::mbarrier_arrive_expect_tx(&shared.fixed.pieces_landed[group], bytes);
}

template <class C>
HOPPER_DEVICE void send_pieces(typename C::Shared& shared, const Share<C>& share, uint32_t group) {
  auto& staged = shared.fixed.staged[group];
  const int32_t tokens = share.tokens_of_rank();
  for (int32_t peer = 0; peer < share.p.split; ++peer) {
    const uint32_t bytes = share.tokens_of(peer) * kGroupRows * sizeof(float);
    if (peer == share.rank || bytes == 0) continue;
    hopper::bulk_copy_cluster(hopper::map_shared(shared.fixed.landed[group][share.rank * tokens], peer),
                              staged[peer * tokens], bytes,
                              hopper::map_shared(&shared.fixed.pieces_landed[group], peer));
  }
}

// D^T leaves as rows of D: sums to shared memory as [token][weight row], then (in a cluster) to the CTA that owns the
// token, which adds the ranges of K in ascending order, and out in whole 128-byte lines.
template <class C>
HOPPER_DEVICE void epilogue(typename C::Shared& shared, const Share<C>& share, const Item& item,
                            const float (&sum)[C::kTokens / 2], uint32_t group, uint32_t phase, bool more) {
  const Params& p = share.p;
  const int32_t thread = threadIdx.x % 128, lane = thread % 32, rank = share.rank;
  auto& staged = shared.fixed.staged[group];
  // Everyone who reads the staging of the item before has read it: this group, and the copies to the peers.
  if constexpr (C::kClustered) {
    hopper::mbarrier_wait(&shared.fixed.pieces_read[group], phase ^ 1);
  } else {
    math_group_sync(group);
  }
  HOPPER_UNROLL for (int r = 0; r < C::kTokens / 2; ++r) {
    const int32_t token = r / 4 * 8 + lane % 4 * 2 + r % 2, row = thread / 32 * 16 + lane / 4 + r % 4 / 2 * 8;
    staged[token][staged_place(token, row)] = sum[r];
  }
  if constexpr (C::kClustered) hopper::fence_proxy_async();   // each writer, before the copies read
  math_group_sync(group);

  int32_t first = 0, count = p.fill ? p.m : item.rows;
  if constexpr (C::kClustered) {
    if (thread == 0) send_pieces<C>(shared, share, group);
    first = rank * share.tokens_of_rank();
    count = share.tokens_of(rank);
    if (count != 0) hopper::mbarrier_wait(&shared.fixed.pieces_landed[group], phase);
  }
  constexpr int kQuads = kGroupRows / 4;
  for (int32_t i = thread; i < count * kQuads; i += 128) {
    const int32_t token = i / kQuads, row = i % kQuads * 4, place = staged_place(first + token, row);
    float4 x{};
    if constexpr (C::kClustered) {
      const auto& landed = shared.fixed.landed[group];
      for (int32_t r = 0; r < p.split; ++r) {
        const float* piece = r == rank ? staged[first + token] : landed[r * share.tokens_of_rank() + token];
        const float4 range = hopper::load_vector<float4>(piece + place);
        x = r == 0 ? range : add4(x, range);
      }
    } else if (token < item.rows) {
      x = hopper::load_vector<float4>(staged[token] + place);
    }
    const int32_t column = item.column + static_cast<int32_t>(group) * kGroupRows + row;
    p.fp32 ? store4<float>(p, item, first + token, column, x) : store4<bf16>(p, item, first + token, column, x);
  }
  if constexpr (C::kClustered) {
    if (!more) return;   // nobody will send again
    math_group_sync(group);
    if (thread != 0) return;
    announce_pieces<C>(shared, share, group);
    for (int32_t peer = 0; peer < p.split; ++peer)
      hopper::mbarrier_arrive_cluster<hopper::Scope::cta>(&shared.fixed.pieces_read[group], peer);
  }
}

template <class C>
HOPPER_KERNEL_BLOCKS(kThreads, C::kBlocksPerSm)
fp8_decode_kernel(HOPPER_GRID_CONSTANT const TensorMap map_a, HOPPER_GRID_CONSTANT const TensorMap map_b,
                  HOPPER_GRID_CONSTANT const TensorMap map_scale_a, HOPPER_GRID_CONSTANT const Params p) {
  auto& shared = *reinterpret_cast<typename C::Shared*>(hopper::dynamic_smem());
  const uint32_t warp = hopper::shuffle(threadIdx.x / 32, 0), group = warp / 4;
  const Share<C> share(shared, p);
  if (threadIdx.x == 0) {
    if constexpr (C::kClustered) {
      for (int g = 0; g < kMathGroups; ++g) {
        hopper::mbarrier_init(&shared.fixed.pieces_landed[g], 1);
        hopper::mbarrier_init(&shared.fixed.pieces_read[g], p.split);
      }
    }
    shared.pipeline.init(kMathWarps);
    if constexpr (C::kClustered)
      for (int g = 0; g < kMathGroups; ++g) announce_pieces<C>(shared, share, g);
  }
  if constexpr (C::kClustered) {
    hopper::cluster_sync();
  } else if (!p.masked_m) {
    hopper::block_sync();   // a batch meets below, when it knows its work
  }
  if (p.prefetch_weights && warp == kMathWarps && hopper::elect_one()) prefetch<C>(shared, map_b, share);
  hopper::grid_dependency_wait();   // before anything else of global memory: the previous kernel may have written it
  if constexpr (!C::kClustered) {
    if (p.masked_m) {
      if (warp == 0) list_work(shared.fixed.work, p);
      hopper::block_sync();
    }
  }
  if (group < kMathGroups) {
    math<C>(shared, share, group);
  } else if (hopper::elect_one()) {
    producer<C>(shared, map_a, map_b, map_scale_a, share);
  }
  drain_cluster<C::kClustered ? kMaxSplit : 1>();
}

}  // namespace fp8_decode_kernels
