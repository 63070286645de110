// TMA tiles of one to five dimensions: load, store, reduction, multicast, with and without a swizzle.
#include "cases.h"

using namespace planted;

namespace {

// A tensor of `rank` dimensions of 4 words each (dimension 0: 32 words), moved whole.
constexpr uint32_t words_of(int rank) { return 32u << (2 * (rank - 1)); }

TensorMap map_of(const void* base, int rank, Swizzle swizzle = Swizzle::none) {
  TensorMapShape s;
  s.rank = rank;
  int64_t stride = 128;
  for (int i = 0; i < rank; ++i) {
    s.size[i] = i ? 4 : 32;
    s.box[i] = static_cast<int32_t>(s.size[i]);
    if (i + 1 < rank) s.stride_bytes[i] = stride, stride *= 4;
  }
  return make_tensor_map(base, Element::u32, s, swizzle);
}

template <int rank>
HOPPER_KERNEL(64)
copy(HOPPER_GRID_CONSTANT const TensorMap from, HOPPER_GRID_CONSTANT const TensorMap to, int bug) {
  uint8_t* tile = dynamic_smem();
  constexpr uint32_t kBytes = 4 * words_of(rank);
  auto* b = reinterpret_cast<Mbarrier*>(tile + kBytes);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(b, kBytes);
    int32_t c[rank] = {};
    tma_load(bug == 1 ? tile + 16 : tile, from, b, c);
  }
  block_sync();
  if (bug != 2) mbarrier_wait(b, 0);
  auto* words = reinterpret_cast<uint32_t*>(tile);
  for (uint32_t i = threadIdx.x; i < words_of(rank); i += 64) words[i] += 1;
  if (bug != 3) fence_proxy_async();
  block_sync();
  if (threadIdx.x == 0) {
    int32_t c[rank] = {};
    if (bug == 4) c[0] = 4;   // legal: the words past the edge are not written, the others land elsewhere
    tma_store(to, tile, c);
    if (bug != 5) bulk_commit();
    if (bug != 6) bulk_wait_read<0>();
  }
}

template <int rank>
void run_copy(int bug) {
  const uint32_t n = words_of(rank);
  Buffer<uint32_t> in(n, "in", false), out(n, "out", true);
  for (uint32_t i = 0; i < n; ++i) in[i] = i;
  launch(shape(1, 64, 4 * n + 1024), copy<rank>, map_of(in.data(), rank), map_of(out.data(), rank), bug);
  out.expect([](size_t i) { return i + 1; });
}

HOPPER_KERNEL(32) wrong_rank(HOPPER_GRID_CONSTANT const TensorMap from, uint32_t* out, int bug) {
  uint8_t* tile = dynamic_smem();
  auto* b = reinterpret_cast<Mbarrier*>(tile + 512);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(b, 512);
    if (bug == 1)
      tma_load(tile, from, b, {0});
    else if (bug == 2)
      tma_load(tile + (1 << 16), from, b, {0, 0});
    else
      tma_load(tile, from, b, {0, 0});
  }
  syncwarp();
  mbarrier_wait(b, 0);
  out[threadIdx.x] = reinterpret_cast<uint32_t*>(tile)[threadIdx.x];
}

// Blocks add their tiles to one output.
HOPPER_KERNEL(32) add_up(HOPPER_GRID_CONSTANT const TensorMap to, const uint32_t* plain, int bug) {
  auto* tile = reinterpret_cast<uint32_t*>(dynamic_smem());
  for (int i = 0; i < 4; ++i) tile[i * 32 + threadIdx.x] = threadIdx.x + 1;
  fence_proxy_async();
  syncwarp();
  if (threadIdx.x == 0) {
    if (bug == 1)
      tma_store(to, tile, {0, 0});   // overwrites what others add
    else
      tma_reduce<Reduce::add>(to, tile, {0, 0});
    bulk_commit();
    if (bug == 2) {
      tile[0] = plain[0];            // the engine may not have read it
      bulk_wait<0>();
    } else {
      bulk_wait<0>();
      tile[0] = 0;
    }
  }
}

// A tile of both CTAs, each half loaded once.
HOPPER_KERNEL(32) multicast(HOPPER_GRID_CONSTANT const TensorMap from, uint32_t* out, int bug) {
  uint8_t* tile = dynamic_smem();
  auto* b = reinterpret_cast<Mbarrier*>(tile + 512);
  if (threadIdx.x == 0) {
    mbarrier_init(b, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(b, 512);
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    const int32_t rows = static_cast<int32_t>(cluster_rank()) * 2;
    tma_load(tile + rows * 128, from, b, {0, rows}, bug == 1 ? 0 : 3);   // bug 1: half of the bytes never come
  }
  if (bug != 2) mbarrier_wait(b, 0);
  for (int i = 0; i < 4; ++i) out[blockIdx.x * 128 + i * 32 + threadIdx.x] = reinterpret_cast<uint32_t*>(tile)[i * 32 + threadIdx.x];
  // No cluster barrier at the end: each CTA has waited for all that its peer writes here.
}

}  // namespace

CASE(tma_1d, "tma.arguments", "race|smem.uninitialised", "proxy", "data", "bulk.uncommitted", "bulk.unread_at_exit") { run_copy<1>(bug); }
CASE(tma_2d, "tma.arguments", "race|smem.uninitialised", "proxy", "data", "bulk.uncommitted", "bulk.unread_at_exit") { run_copy<2>(bug); }
CASE(tma_3d, "tma.arguments", "race|smem.uninitialised", "proxy", "data") { run_copy<3>(bug); }
CASE(tma_4d, "tma.arguments", "race|smem.uninitialised", "proxy", "data") { run_copy<4>(bug); }
CASE(tma_5d, "tma.arguments", "race|smem.uninitialised", "proxy", "data") { run_copy<5>(bug); }

CASE(tma_arguments, "tma.arguments", "smem.bounds") {
  Buffer<uint32_t> in(128, "in", false), out(32, "out", true);
  launch(shape(1, 32, 1024), wrong_rank, map_of(in.data(), 2), out.data(), bug);
}

CASE(tma_reduce, "race|data", "race|proxy") {
  Buffer<uint32_t> out(128, "out", true), one(1, "one", false);
  launch(shape(4, 32, 1024), add_up, map_of(out.data(), 2), one.data(), bug);
  out.expect([](size_t i) { return 4 * (i % 32 + 1); });
}

CASE(tma_multicast, "deadlock", "race|smem.uninitialised") {
  Buffer<uint32_t> in(128, "in", false), out(256, "out", true);
  for (int i = 0; i < 128; ++i) in[i] = i;
  TensorMapShape half;   // two of four rows
  half.rank = 2;
  half.size[0] = half.box[0] = 32;
  half.size[1] = 4;
  half.box[1] = 2;
  half.stride_bytes[0] = 128;
  launch(shape(2, 32, 1024, 2), multicast, make_tensor_map(in.data(), Element::u32, half, Swizzle::none), out.data(), bug);
  out.expect([](size_t i) { return i % 128; });
}
