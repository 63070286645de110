// Every wrapper of csrc/hopper in every form: all n and operand classes of wgmma, ranks, hints, orders, scopes, types.
// One kernel per family, so that test_every_form.py can count the instructions of each in the SASS. Compiled by nvcc
// for sm_90a and by g++ against the twins; never run: these kernels make no sense.
#include <type_traits>

#include "../../../csrc/hopper/front.h"
#include "../../../csrc/hopper/tensor_map.h"

using namespace hopper;

namespace {

struct Shared {
  alignas(1024) uint8_t tile[16384];
  alignas(16) uint32_t words[1024];
  Mbarrier barrier[2];
};

HOPPER_DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(dynamic_smem()); }

// ---- mbarrier.h, fence.h ----

HOPPER_KERNEL(128) use_mbarrier(uint32_t* out, uint32_t parity) {
  Mbarrier* b = shared().barrier;
  if (threadIdx.x == 0) {
    mbarrier_init(b, 128);
    fence_mbarrier_init();
  }
  block_sync();
  mbarrier_expect_tx(b, 16);
  mbarrier_arrive(b);
  mbarrier_arrive(b, 2);
  mbarrier_arrive_expect_tx(b, 32);
  mbarrier_arrive_cluster(b, 1);
  if (mbarrier_test_wait(b, parity)) out[0] = 1;
  mbarrier_wait(b, parity);
  out[1] = 2;
  block_sync();
  mbarrier_invalidate(b);
}

HOPPER_KERNEL(128) use_cluster_wait(uint32_t* out, uint32_t parity) {
  if (mbarrier_test_wait<Scope::cluster>(shared().barrier, parity)) out[0] = 1;
  mbarrier_wait<Scope::cluster>(shared().barrier, parity);
  out[1] = 2;
}

HOPPER_KERNEL(128) use_fence(uint32_t* out, const TensorMap* map) {
  out[0] = 1;
  fence<Scope::cta>();
  out[0] = 2;
  fence<Scope::cluster>();
  out[0] = 3;
  fence<Scope::gpu>();
  out[0] = 4;
  fence<Scope::sys>();
  out[0] = 5;
  fence_proxy_async();
  fence_proxy_async<Space::shared>();
  fence_proxy_async<Space::global>();
  fence_proxy_async<Space::all>();
  fence_proxy_tensormap_acquire<Scope::gpu>(map);
  fence_proxy_tensormap_acquire<Scope::sys>(map);
}

// ---- tma.h, bulk.h, cp_async.h ----

template <CacheHint hint>
HOPPER_KERNEL(128) use_tma_load(HOPPER_GRID_CONSTANT const TensorMap map, uint16_t mask) {
  Shared& s = shared();
  tma_prefetch(map);
  tma_prefetch(map, {1});
  tma_prefetch(map, {1, 2});
  tma_prefetch(map, {1, 2, 3});
  tma_prefetch(map, {1, 2, 3, 4});
  tma_prefetch(map, {1, 2, 3, 4, 5});
  tma_load<hint>(s.tile, map, s.barrier, {1});
  tma_load<hint>(s.tile, map, s.barrier, {1, 2});
  tma_load<hint>(s.tile, map, s.barrier, {1, 2, 3});
  tma_load<hint>(s.tile, map, s.barrier, {1, 2, 3, 4});
  tma_load<hint>(s.tile, map, s.barrier, {1, 2, 3, 4, 5});
  tma_load<hint>(s.tile, map, s.barrier, {1}, 3);
  tma_load<hint>(s.tile, map, s.barrier, {1, 2}, 3);
  tma_load<hint>(s.tile, map, s.barrier, {1, 2, 3}, 3);
  tma_load<hint>(s.tile, map, s.barrier, {1, 2, 3, 4}, 3);
  tma_load<hint>(s.tile, map, s.barrier, {1, 2, 3, 4, 5}, 3);
  tma_load<hint>(s.tile, map, s.barrier, {1, 2}, mask);   // known at run time: both forms
}

template <CacheHint hint>
HOPPER_KERNEL(128) use_tma_store(HOPPER_GRID_CONSTANT const TensorMap map) {
  Shared& s = shared();
  tma_store<hint>(map, s.tile, {1});
  tma_store<hint>(map, s.tile, {1, 2});
  tma_store<hint>(map, s.tile, {1, 2, 3});
  tma_store<hint>(map, s.tile, {1, 2, 3, 4});
  tma_store<hint>(map, s.tile, {1, 2, 3, 4, 5});
  bulk_commit();
  bulk_wait_read<0>();
}

template <CacheHint hint>
HOPPER_KERNEL(128) use_tma_reduce(HOPPER_GRID_CONSTANT const TensorMap map) {
  Shared& s = shared();
  tma_reduce<Reduce::add, hint>(map, s.tile, {1});
  tma_reduce<Reduce::min, hint>(map, s.tile, {1, 2});
  tma_reduce<Reduce::max, hint>(map, s.tile, {1, 2, 3});
  tma_reduce<Reduce::inc, hint>(map, s.tile, {1, 2, 3, 4});
  tma_reduce<Reduce::dec, hint>(map, s.tile, {1, 2, 3, 4, 5});
  tma_reduce<Reduce::and_, hint>(map, s.tile, {1});
  tma_reduce<Reduce::or_, hint>(map, s.tile, {1});
  tma_reduce<Reduce::xor_, hint>(map, s.tile, {1});
  bulk_commit();
  bulk_wait<0>();
}

template <CacheHint hint>
HOPPER_KERNEL(128) use_bulk(uint8_t* global, uint16_t mask) {
  Shared& s = shared();
  bulk_load<hint>(s.tile, global, 256, s.barrier);
  bulk_load<hint>(s.tile, global, 512, s.barrier, mask);
  bulk_store<hint>(global + 4096, s.tile, 256);
  bulk_commit();
  bulk_wait_read<1>();
  bulk_wait<0>();
  bulk_copy_cluster(map_shared(s.tile, 1), s.tile + 4096, 1024, map_shared(s.barrier, 1));
}

template <Reduce op, Element element>
HOPPER_DEVICE void reduce_if_it_exists(uint8_t* global) {
  if constexpr (detail::bulk_reduce_exists(op, element)) bulk_reduce<op, element>(global, shared().tile, 256);
}
template <Reduce op>
HOPPER_DEVICE void reduce_all_types(uint8_t* global) {
  reduce_if_it_exists<op, Element::u32>(global);
  reduce_if_it_exists<op, Element::s32>(global);
  reduce_if_it_exists<op, Element::u64>(global);
  reduce_if_it_exists<op, Element::s64>(global);
  reduce_if_it_exists<op, Element::f16>(global);
  reduce_if_it_exists<op, Element::bf16>(global);
  reduce_if_it_exists<op, Element::f32>(global);
  reduce_if_it_exists<op, Element::f64>(global);
}
HOPPER_KERNEL(128) use_bulk_reduce(uint8_t* global) {
  reduce_all_types<Reduce::add>(global);
  reduce_all_types<Reduce::min>(global);
  reduce_all_types<Reduce::max>(global);
  reduce_all_types<Reduce::inc>(global);
  reduce_all_types<Reduce::dec>(global);
  reduce_all_types<Reduce::and_>(global);
  reduce_all_types<Reduce::or_>(global);
  reduce_all_types<Reduce::xor_>(global);
  bulk_commit();
  bulk_wait<0>();
}

HOPPER_KERNEL(128) use_cp_async(const uint8_t* global, uint32_t valid) {
  Shared& s = shared();
  cp_async<4>(s.words, global);
  cp_async<8>(s.words + 4, global, valid);
  cp_async<16>(s.words + 8, global, valid);
  cp_async_commit();
  cp_async_wait<1>();
  cp_async_wait<0>();
  cp_async_mbarrier_arrive<false>(s.barrier);
  cp_async_mbarrier_arrive<true>(s.barrier);
}

// ---- wgmma.h, descriptor.h ----

// One accumulator array through every operand class of this n.
template <int n>
HOPPER_KERNEL(128) use_wgmma(float* out, const uint32_t* words, bool accumulate) {
  using enum Operand;
  using enum Major;
  float d[n / 2];
  HOPPER_UNROLL for (float& x : d) x = 0.0f;
  uint32_t a[4];
  HOPPER_UNROLL for (int i = 0; i < 4; ++i) a[i] = words[threadIdx.x * 4 + i];
  const uint64_t a_matrix = matrix_descriptor<Swizzle::b128>(shared().tile);
  const uint64_t b_matrix = matrix_descriptor(shared().tile + 8192, Swizzle::b64, 1024, 512);
  register_fence(d);
  wgmma_fence();
  Wgmma<n, e4m3, e4m3>::issue(d, a_matrix, b_matrix, false);
  Wgmma<n, e4m3, e4m3>::issue(d, advance(a_matrix, 32), advance(b_matrix, 32), accumulate);
  Wgmma<n, e4m3, e4m3>::issue(d, a, b_matrix, true);
  Wgmma<n, Operand::bf16, Operand::bf16>::issue(d, a_matrix, b_matrix, true);
  Wgmma<n, Operand::bf16, Operand::bf16, mn, k>::issue(d, a_matrix, b_matrix, true);
  Wgmma<n, Operand::bf16, Operand::bf16, k, mn>::issue(d, a_matrix, b_matrix, true);
  Wgmma<n, Operand::bf16, Operand::bf16, mn, mn>::issue(d, a_matrix, b_matrix, true);
  Wgmma<n, Operand::bf16, Operand::bf16>::issue(d, a, b_matrix, true);
  Wgmma<n, Operand::bf16, Operand::bf16, k, mn>::issue(d, a, b_matrix, true);
  wgmma_commit();
  wgmma_wait<1>();
  wgmma_wait<0>();
  register_fence(d);
  HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) out[i * 128 + threadIdx.x] = d[i];
}

HOPPER_KERNEL(128) use_other_formats(float* out, const uint32_t* words) {
  using enum Operand;
  float d[32] = {};
  uint32_t a[4];
  HOPPER_UNROLL for (int i = 0; i < 4; ++i) a[i] = words[threadIdx.x * 4 + i];
  const uint64_t matrix = matrix_descriptor<Swizzle::b32>(shared().tile);
  wgmma_fence();
  Wgmma<64, e5m2, e5m2>::issue(d, matrix, matrix, false);
  Wgmma<64, e5m2, e5m2>::issue(d, a, matrix, true);
  Wgmma<64, f16, f16>::issue(d, matrix, matrix, true);
  Wgmma<64, f16, f16, Major::k, Major::mn>::issue(d, a, matrix, true);
  wgmma_commit();
  wgmma_wait<0>();
  register_fence(d);
  HOPPER_UNROLL for (int i = 0; i < 32; ++i) out[i * 128 + threadIdx.x] = d[i];
}

// ---- warp.h, matrix.h, barrier.h, cluster.h, registers.h ----

HOPPER_KERNEL(128) use_warp(uint32_t* out, float x, uint64_t key) {
  const uint32_t lane = threadIdx.x % 32;
  x *= static_cast<float>(threadIdx.x);   // shuffles of what all lanes share are optimised away
  key *= threadIdx.x;
  syncwarp();
  syncwarp(0xffff);
  if (elect_one()) out[0] = 1;
  if (elect_one(0xffffffffu)) out[1] = 1;
  x += shuffle(x, 3);
  x += shuffle_xor(x, 1);
  x += shuffle_up(x, 2, 16);
  x += shuffle_down(x, 4);
  key += shuffle_xor(key, 8);
  const float4 four = shuffle(float4{x, x + 1, x + 2, x + 3}, lane ^ 5);
  uint32_t bits = hopper::ballot(x > 1.0f) + hopper::any(x > 2.0f) + hopper::all(x > 3.0f);
  bits += warp_max(bits) + warp_min(bits + lane) + warp_sum(lane * bits);
  bits += warp_reduce<Reduce::and_>(bits + lane) + warp_reduce<Reduce::or_>(bits ^ lane) +
          warp_reduce<Reduce::xor_>(bits * lane);
  const auto number = static_cast<int32_t>(bits);
  out[lane] = bits + static_cast<uint32_t>(warp_reduce<Reduce::max>(number) + warp_reduce<Reduce::min>(number - 5) +
                                           warp_reduce<Reduce::add>(number + 7));
  out[lane + 32] = float_bits(four.x + four.y + four.z + four.w) + static_cast<uint32_t>(key >> 7);
}

template <int count, bool transposed>
HOPPER_DEVICE void move_matrices() {
  Shared& s = shared();
  uint32_t r[count];
  ldmatrix<count, transposed>(r, s.words + threadIdx.x * 4);
  stmatrix<count, transposed>(s.words + threadIdx.x * 4 + 512, r);
}
HOPPER_KERNEL(128) use_matrix() {
  move_matrices<1, false>();
  move_matrices<1, true>();
  move_matrices<2, false>();
  move_matrices<2, true>();
  move_matrices<4, false>();
  move_matrices<4, true>();
}

HOPPER_KERNEL(128) use_barrier(uint32_t* out, uint32_t threads) {
  out[threadIdx.x] = 1;
  barrier_sync<1>(128);
  out[threadIdx.x + 1] = 2;
  barrier_arrive<2>(128);
  out[threadIdx.x + 2] = 3;
  barrier_sync<3>(threads);   // a count known at run time, an id that is not
  block_sync();
}

HOPPER_KERNEL(128) use_cluster(uint32_t* out) {
  Shared& s = shared();
  cluster_arrive();
  cluster_wait();
  *map_shared(s.words, cluster_rank() ^ 1) = cluster_size();
  cluster_arrive(false);
  cluster_wait();
  cluster_sync();
  out[0] = s.words[0] + shared_address(s.tile) + blockIdx.x + gridDim.x + blockDim.x;
}

HOPPER_KERNEL(256) use_registers(uint32_t* out) {
  if (threadIdx.x < 128) {
    set_max_registers_up<232>();
    out[threadIdx.x] = 1;
  } else {
    set_max_registers_down<40>();
    out[threadIdx.x] = 2;
  }
}

// ---- memory.h ----

template <Order order, class T>
HOPPER_DEVICE T load_scopes(const T* p) {
  return static_cast<T>(load<order, Scope::cta>(p) + load<order, Scope::cluster>(p) + load<order, Scope::gpu>(p) +
                        load<order, Scope::sys>(p));
}
template <Order order, class T>
HOPPER_DEVICE void store_scopes(T* p, T value) {
  store<order, Scope::cta>(p, value);
  store<order, Scope::cluster>(p, value);
  store<order, Scope::gpu>(p, value);
  store<order, Scope::sys>(p, value);
}
template <class T>
HOPPER_KERNEL(128) use_flags(T* p) {
  const T value = load_scopes<Order::relaxed>(p) + load_scopes<Order::acquire>(p + 1);
  store_scopes<Order::relaxed>(p + 2, value);
  store_scopes<Order::release>(p + 3, value);
}

HOPPER_KERNEL(128) use_wide_flags(uint4* p) {
  uint4 x = load<Order::relaxed, Scope::gpu>(p);
  x.y += load<Order::acquire, Scope::sys>(p + 1).x;
  store<Order::relaxed, Scope::gpu>(p + 2, x);
  store<Order::release, Scope::sys>(p + 3, {1, 2, 3, x.y});
}

template <class T>
HOPPER_KERNEL(128) use_hints(T* p) {
  store_stream(p + threadIdx.x, load_stream(p + 128 + threadIdx.x));
}

HOPPER_KERNEL(128) use_vectors(float* p, const hopper::bf16* q) {
  const uint4 x = load_vector<uint4>(q + 8 * threadIdx.x);
  store_vector(p + 4 * threadIdx.x, float4{float_bits(1.0f) + 0.0f, 1.0f, 2.0f, bits_float(x.x ^ x.w)});
  store_vector(p + 4096 + 2 * threadIdx.x, load_vector<uint2>(q + 4 * threadIdx.x + 4096));
}

template <Reduce op, class T>
HOPPER_DEVICE void atomics(T* p, T value) {
  if constexpr (detail::atomic_exists(op, detail::atomic_element_of<T>())) {
    reduce<op, Order::relaxed, Scope::gpu>(p, value);
    reduce<op, Order::release, Scope::sys>(p, value);
    p[1] = atomic<op, Order::relaxed, Scope::cta>(p, value);
    p[2] = atomic<op, Order::acquire, Scope::cluster>(p, value);
    p[3] = atomic<op, Order::release, Scope::gpu>(p, value);
    p[4] = atomic<op, Order::acq_rel, Scope::sys>(p, value);
  }
}
template <class T>
HOPPER_KERNEL(128) use_atomics(T* p, T value) {
  atomics<Reduce::add>(p, value);
  atomics<Reduce::min>(p, value);
  atomics<Reduce::max>(p, value);
  atomics<Reduce::inc>(p, value);
  atomics<Reduce::dec>(p, value);
  atomics<Reduce::and_>(p, value);
  atomics<Reduce::or_>(p, value);
  atomics<Reduce::xor_>(p, value);
  p[5] = atomic_exchange<Order::acq_rel, Scope::sys>(p, value);
  p[6] = atomic_compare_exchange<Order::acq_rel, Scope::gpu>(p, T{}, value);
  if constexpr (std::is_same_v<T, uint32_t>) {
    reduce_add<Order::release, Scope::gpu>(p, 1);
    p[7] = atomic_add<Order::relaxed, Scope::gpu>(p, 1);
  }
}

// ---- convert.h, math.h, time.h, grid.h, address.h ----

HOPPER_KERNEL(128) use_convert(uint32_t* out, float x, float y) {
  out[0] = to_bf16(x).bits;
  out[1] = to_e4m3(x).bits;
  out[2] = to_e4m3x2(x, y);
  out[3] = to_e4m3x4(x, y, x, y);
  out[4] = pack_bf16(x, y);
  out[5] = float_bits(to_float(hopper::bf16{static_cast<uint16_t>(out[6])}));
  out[7] = float_bits(to_float(hopper::e4m3{static_cast<uint8_t>(out[8])}));
  const float2 a = bf16x2_to_float2(out[9]), b = e4m3x2_to_float2(static_cast<uint16_t>(out[10]));
  const float4 c = e4m3x4_to_float4(out[11]);
  out[12] = float_bits(a.x + a.y + b.x + b.y + c.x + c.y + c.z + c.w);
}

HOPPER_KERNEL(128) use_single_roundings(float* out, const float* in) {
  const float* x = in + 6 * threadIdx.x;
  out[0] = mul_rn(x[0], x[1]) + x[2];
  out[1] = add_rn(x[1] * x[2], x[3]);
  out[2] = sub_rn(x[2] * x[3], x[4]);
}

HOPPER_KERNEL(128) use_math(float* out, float x, float y) {
  out[2] = hopper::fma(x, y, x);
  out[3] = div_rn(x, y);
  out[4] = sqrt_rn(x);
  out[5] = exp2_approximate(x);
  out[6] = log2_approximate(x);
  out[7] = rsqrt_approximate(x);
  out[8] = reciprocal_approximate(x);
  out[9] = exp_approximate(x);
}

HOPPER_KERNEL(128) use_time(uint32_t* flag) {
  grid_dependency_wait();
  grid_dependency_launch();
  const Deadline deadline(1000);
  while (load<Order::acquire, Scope::sys>(flag) == 0)
    if (deadline.passed()) trap("no flag came");
  if (dropped("nothing")) flag[2] = 1;
  flag[1] = static_cast<uint32_t>(global_timer());
}

template <CacheHint hint>
void launch_copies(const LaunchConfig& c, const TensorMap& map, uint8_t* global) {
  launch(c, use_tma_load<hint>, map, uint16_t{3});
  launch(c, use_tma_store<hint>, map);
  launch(c, use_tma_reduce<hint>, map);
  launch(c, use_bulk<hint>, global, uint16_t{3});
}

template <int... eighths>
void launch_wgmma(const LaunchConfig& c, float* out, const uint32_t* words, std::integer_sequence<int, eighths...>) {
  (launch(c, use_wgmma<8 * (eighths + 1)>, out, words, true), ...);
}

}  // namespace

// Instantiates everything.
void launch_all(void* memory, Stream stream) {
  LaunchConfig c{dim3(sm_count()), dim3(128), sizeof(Shared)};
  c.cluster = 2;
  c.programmatic = true;
  c.stream = stream;
  c.name = "vocabulary";
  TensorMapSpec spec;
  spec.base = memory;
  spec.rank = 1;
  spec.sizes[0] = 16384;
  spec.box[0] = 128;
  const TensorMap map = make_tensor_map(spec);
  auto* bytes = static_cast<uint8_t*>(memory);
  auto* words = static_cast<uint32_t*>(memory);
  auto* longs = static_cast<uint64_t*>(memory);
  auto* floats = static_cast<float*>(memory);
  launch(c, use_mbarrier, words, 0u);
  launch(c, use_cluster_wait, words, 0u);
  launch(c, use_fence, words, static_cast<const TensorMap*>(memory));
  launch_copies<CacheHint::normal>(c, map, bytes);
  launch_copies<CacheHint::evict_first>(c, map, bytes);
  launch_copies<CacheHint::evict_last>(c, map, bytes);
  launch(c, use_bulk_reduce, bytes);
  launch(c, use_cp_async, bytes, 3u);
  launch_wgmma(c, floats, words, std::make_integer_sequence<int, 32>());
  launch(c, use_other_formats, floats, words);
  launch(c, use_warp, words, 1.0f, uint64_t{1});
  launch(c, use_matrix);
  launch(c, use_barrier, words, 64u);
  launch(c, use_cluster, words);
  launch(c, use_registers, words);
  launch(c, use_flags<uint8_t>, bytes);
  launch(c, use_flags<uint16_t>, static_cast<uint16_t*>(memory));
  launch(c, use_flags<uint32_t>, words);
  launch(c, use_flags<uint64_t>, longs);
  launch(c, use_flags<float>, floats);
  launch(c, use_wide_flags, static_cast<uint4*>(memory));
  launch(c, use_hints<uint32_t>, words);
  launch(c, use_hints<uint2>, static_cast<uint2*>(memory));
  launch(c, use_hints<float4>, static_cast<float4*>(memory));
  launch(c, use_vectors, floats, static_cast<const hopper::bf16*>(memory));
  launch(c, use_atomics<uint32_t>, words, 1u);
  launch(c, use_atomics<int32_t>, static_cast<int32_t*>(memory), 1);
  launch(c, use_atomics<uint64_t>, longs, uint64_t{1});
  launch(c, use_atomics<int64_t>, static_cast<int64_t*>(memory), int64_t{1});
  launch(c, use_atomics<float>, floats, 1.0f);
  launch(c, use_atomics<double>, static_cast<double*>(memory), 1.0);
  launch(c, use_convert, words, 1.0f, 2.0f);
  launch(c, use_single_roundings, floats, floats);
  launch(c, use_math, floats, 1.0f, 2.0f);
  launch(c, use_time, words);
}
