// Uses every wrapper of the vocabulary once, so that both compilers see each body. Compiled, never run.
#include "../../../csrc/hopper/front.h"
#include "../../../csrc/hopper/tensor_map.h"

using namespace hopper;

namespace {

HOPPER_KERNEL(128)
copies(HOPPER_GRID_CONSTANT const TensorMap map, uint32_t* words, float* floats) {
  uint8_t* smem = dynamic_smem();
  auto* barrier = reinterpret_cast<Mbarrier*>(smem);
  if (threadIdx.x == 0) {
    tma_prefetch(map);
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  block_sync();
  grid_dependency_wait();
  if (elect_one()) {
    mbarrier_expect_tx(barrier, 128);
    mbarrier_arrive_expect_tx(barrier, 128);
    tma_load(smem + 1024, map, barrier, {0});
    tma_load(smem + 1024, map, barrier, {0, 1});
    tma_load(smem + 1024, map, barrier, {0, 1, 2});
    tma_load(smem + 1024, map, barrier, {0, 1, 2, 3});
    tma_load(smem + 1024, map, barrier, {0, 1, 2, 3, 4});
    tma_load(smem + 1024, map, barrier, {0, 1}, 3);
    bulk_load(smem, words, 16, barrier);
    bulk_load(smem, words, 16, barrier, 3);
    fence_proxy_async();
    fence_proxy_async<Space::global>();
    fence_proxy_async<Space::all>();
    tma_store(map, smem, {0});
    tma_store(map, smem, {0, 1});
    tma_store(map, smem, {0, 1, 2});
    tma_store(map, smem, {0, 1, 2, 3});
    tma_store(map, smem, {0, 1, 2, 3, 4});
    tma_reduce<Reduce::add>(map, smem, {0, 1});
    tma_reduce<Reduce::min>(map, smem, {0, 1});
    tma_reduce<Reduce::max>(map, smem, {0, 1});
    tma_reduce<Reduce::or_>(map, smem, {0, 1});
    bulk_store(words, smem, 16);
    bulk_reduce<Reduce::add, Element::f32>(floats, smem, 16);
    bulk_reduce<Reduce::add, Element::bf16>(floats, smem, 16);
    bulk_reduce<Reduce::max, Element::s32>(words, smem, 16);
    bulk_copy_cluster(map_shared(smem, 1), smem, 16, map_shared(barrier, 1));
    bulk_commit();
    bulk_wait_read<1>();
    bulk_wait<0>();
  }
  syncwarp();
  while (!mbarrier_test_wait(barrier, 0)) {
  }
  mbarrier_wait(barrier, 0);
  mbarrier_arrive(barrier);
  mbarrier_arrive_cluster(barrier, 1);
  cp_async<4>(smem, words);
  cp_async<8>(smem, words);
  cp_async<16>(smem, words, 8);
  cp_async_commit();
  cp_async_wait<0>();
  cp_async_mbarrier_arrive<true>(barrier);
  cp_async_mbarrier_arrive<false>(barrier);
  mbarrier_invalidate(barrier);
  barrier_sync<1>(128);
  barrier_arrive<2>(128);
  cluster_arrive(false);
  cluster_wait();
  cluster_sync();
  if (cluster_rank() < cluster_size()) *map_shared(words, 1) = shared_address(smem);
  grid_dependency_launch();
}

HOPPER_KERNEL(128)
memory_and_warps(uint32_t* words, uint64_t* longs, float* floats) {
  fence<Scope::cta>();
  fence<Scope::cluster>();
  fence<Scope::gpu>();
  fence<Scope::sys>();
  uint32_t x = load<Order::acquire, Scope::gpu>(words) + load<Order::relaxed, Scope::sys>(words);
  const uint64_t y = load<Order::acquire, Scope::sys>(longs) + load<Order::relaxed, Scope::cluster>(longs);
  store<Order::release, Scope::sys>(words, x);
  store<Order::relaxed, Scope::gpu>(words, x);
  store<Order::release, Scope::cta>(longs, y);
  reduce_add<Order::release, Scope::gpu>(words, x);
  reduce_add<Order::relaxed, Scope::sys>(words, x);
  x += atomic_add<Order::relaxed, Scope::gpu>(words, 1) + atomic_add<Order::acquire, Scope::gpu>(words, 1);
  x += atomic_add<Order::release, Scope::gpu>(words, 1) + atomic_add<Order::acq_rel, Scope::gpu>(words, 1);
  x += shuffle(x, 0) + shuffle_xor(x, 1) + shuffle_up(x, 1) + shuffle_down(x, 1) + hopper::ballot(x != 0) + hopper::any(x != 0) + hopper::all(x != 0);
  x += warp_max(x) + warp_min(x) + warp_sum(x);
  floats[threadIdx.x] = static_cast<float>(x) + shuffle(floats[0], 3) + to_float(to_e4m3(floats[1])) + to_float(to_bf16(floats[2])) +
                        static_cast<float>(pack_bf16(floats[3], floats[4]) + to_e4m3x2(floats[5], floats[6])) +
                        div_rn(mul_rn(floats[7], 3.0f), add_rn(floats[8], 1.0f)) + hopper::fma(floats[1], floats[2], floats[3]) +
                        exp2_approximate(floats[1]) + log2_approximate(floats[2]) + rsqrt_approximate(floats[3]) +
                        reciprocal_approximate(floats[4]) + bits_float(float_bits(floats[5]));
  store_stream(reinterpret_cast<uint4*>(words), load_stream(reinterpret_cast<const uint4*>(longs)));
  store_stream(reinterpret_cast<uint2*>(words), load_stream(reinterpret_cast<const uint2*>(longs)));
  store_stream(words + 1, load_stream(words + 2));
  const Deadline deadline(1000);
  if (deadline.passed() || dropped("never")) trap("late");
}

// Accumulators stay in registers: a chain, a wait, a store.
template <int n, Operand form, Major a_major, Major b_major, bool registers>
HOPPER_KERNEL(128)
multiply(const uint32_t* words, float* out) {
  uint8_t* smem = dynamic_smem();
  float d[n / 2] = {};
  uint32_t a[4] = {words[0], words[1], words[2], words[3]};
  const uint64_t b_matrix = matrix_descriptor<Swizzle::b128>(smem + 16384);
  register_fence(d);
  wgmma_fence();
  if constexpr (registers)
    Wgmma<n, form, form, a_major, b_major>::issue(d, a, b_matrix, true);
  else
    Wgmma<n, form, form, a_major, b_major>::issue(d, matrix_descriptor(smem, Swizzle::b64, 16, 512), advance(b_matrix, 32), true);
  wgmma_commit();
  wgmma_wait<0>();
  register_fence(d);
  HOPPER_UNROLL for (int i = 0; i < n / 2; ++i) out[threadIdx.x * (n / 2) + i] = d[i];
}

HOPPER_KERNEL(384)
roles(uint32_t* words) {
  uint8_t* row = dynamic_smem() + 16 * (threadIdx.x % 32);
  if (threadIdx.x < 128) {
    set_max_registers_down<40>();
    uint32_t one[1], two[2], four[4];
    ldmatrix<1>(one, row);
    ldmatrix<2>(two, row);
    ldmatrix<4>(four, row);
    stmatrix<1>(row, one);
    stmatrix<2>(row, two);
    stmatrix<4>(row, four);
    ldmatrix<1, true>(one, row);
    ldmatrix<2, true>(two, row);
    ldmatrix<4, true>(four, row);
    stmatrix<1, true>(row, one);
    stmatrix<2, true>(row, two);
    stmatrix<4, true>(row, four);
  } else {
    set_max_registers_up<232>();
    words[threadIdx.x] = 1;
  }
}

template <int... i>
void all_shapes(const LaunchConfig& c, const uint32_t* w, float* o) {
  (launch(c, multiply<8 * i, Operand::e4m3, Major::k, Major::k, false>, w, o), ...);
  (launch(c, multiply<8 * i, Operand::bf16, Major::k, Major::mn, false>, w, o), ...);
}

}  // namespace

void use_everything(const TensorMap& map, uint32_t* words, uint64_t* longs, float* floats) {
  LaunchConfig c;
  c.cluster = 2;
  c.programmatic = true;
  launch(c, copies, map, words, floats);
  launch(c, memory_and_warps, words, longs, floats);
  launch(c, roles, words);
  all_shapes<1, 2, 3, 7, 8, 12, 14, 16, 20, 24, 31, 32>(c, words, floats);
  launch(c, multiply<64, Operand::e5m2, Major::k, Major::k, false>, words, floats);
  launch(c, multiply<64, Operand::f16, Major::mn, Major::k, false>, words, floats);
  launch(c, multiply<64, Operand::bf16, Major::mn, Major::mn, false>, words, floats);
  launch(c, multiply<64, Operand::e4m3, Major::k, Major::k, true>, words, floats);
  launch(c, multiply<64, Operand::bf16, Major::k, Major::mn, true>, words, floats);
  launch(c, multiply<64, Operand::e5m2, Major::k, Major::k, true>, words, floats);
  launch(c, multiply<64, Operand::f16, Major::k, Major::k, true>, words, floats);
  (void)sm_count();
}
