// Tensor copies by TMA, and bulk copies: where bytes land, what fills the outside, who receives a multicast, what a
// reduction does. Cases: bench/proof/probe_tma.py.
#include "../../csrc/hopper/tensor_map.h"
#include "probe.h"

namespace {

using hopper::Element;
using hopper::Reduce;
using hopper::TensorMap;

enum Mode : int64_t { kLoad, kStore, kMulticast, kTensorReduce, kBulkReduce, kBulkCopy };

struct Shared {
  hopper::Mbarrier barrier;
};
constexpr uint32_t kImage = 1024;   // offset of the image behind the barrier: swizzles need 1024-aligned starts

struct Params {
  uint8_t* image;      // loads: where the dump goes, and what shared memory holds before; stores: what it holds
  uint32_t bytes;      // of the image
  uint32_t box_bytes;  // that land
  int32_t at[5];
  bool partial;        // multicast
};

template <int rank>
HOPPER_DEVICE void load(void* to, const TensorMap& map, hopper::Mbarrier* barrier, const int32_t* at) {
  if constexpr (rank == 1) hopper::tma_load(to, map, barrier, {at[0]});
  if constexpr (rank == 2) hopper::tma_load(to, map, barrier, {at[0], at[1]});
  if constexpr (rank == 3) hopper::tma_load(to, map, barrier, {at[0], at[1], at[2]});
  if constexpr (rank == 4) hopper::tma_load(to, map, barrier, {at[0], at[1], at[2], at[3]});
  if constexpr (rank == 5) hopper::tma_load(to, map, barrier, {at[0], at[1], at[2], at[3], at[4]});
}
template <int rank>
HOPPER_DEVICE void store(const TensorMap& map, const void* from, const int32_t* at) {
  if constexpr (rank == 1) hopper::tma_store(map, from, {at[0]});
  if constexpr (rank == 2) hopper::tma_store(map, from, {at[0], at[1]});
  if constexpr (rank == 3) hopper::tma_store(map, from, {at[0], at[1], at[2]});
  if constexpr (rank == 4) hopper::tma_store(map, from, {at[0], at[1], at[2], at[3]});
  if constexpr (rank == 5) hopper::tma_store(map, from, {at[0], at[1], at[2], at[3], at[4]});
}

HOPPER_DEVICE hopper::Mbarrier* one_barrier() {
  auto& shared = *reinterpret_cast<Shared*>(hopper::dynamic_smem());
  if (threadIdx.x == 0) {
    hopper::mbarrier_init(&shared.barrier, 1);
    hopper::fence_mbarrier_init();
  }
  hopper::block_sync();
  return &shared.barrier;
}

template <int rank>
HOPPER_KERNEL(128)
load_kernel(HOPPER_GRID_CONSTANT const TensorMap map, HOPPER_GRID_CONSTANT const Params p) {
  uint8_t* image = hopper::dynamic_smem() + kImage;
  hopper::Mbarrier* barrier = one_barrier();
  probe::fill(image, p.image, p.bytes);
  if (threadIdx.x == 0) {
    hopper::mbarrier_arrive_expect_tx(barrier, p.box_bytes);
    load<rank>(image, map, barrier, p.at);
  }
  hopper::mbarrier_wait(barrier, 0);
  probe::dump(p.image, image, p.bytes);
}

template <int rank>
HOPPER_KERNEL(128)
store_kernel(HOPPER_GRID_CONSTANT const TensorMap map, HOPPER_GRID_CONSTANT const Params p) {
  uint8_t* image = hopper::dynamic_smem() + kImage;
  probe::fill(image, p.image, p.bytes);
  if (threadIdx.x == 0) {
    store<rank>(map, image, p.at);
    hopper::bulk_commit();
    hopper::bulk_wait<0>();
  }
}

// CTA r loads its slice of 8 rows to the same place in every CTA of the mask.
HOPPER_KERNEL(128)
multicast_kernel(HOPPER_GRID_CONSTANT const TensorMap map, HOPPER_GRID_CONSTANT const Params p) {
  uint8_t* image = hopper::dynamic_smem() + kImage;
  hopper::Mbarrier* barrier = one_barrier();
  const uint32_t rank = hopper::cluster_rank(), size = hopper::cluster_size();
  uint8_t* mine = p.image + rank * p.bytes;
  probe::fill(image, mine, p.bytes);
  const uint32_t next = (rank + 1) % size;
  const uint16_t mask = static_cast<uint16_t>(p.partial ? 1u << rank | 1u << next : (1u << size) - 1);
  if (threadIdx.x == 0) hopper::mbarrier_arrive_expect_tx(barrier, (p.partial ? 2 : size) * p.box_bytes);
  hopper::cluster_sync();
  if (threadIdx.x == 0)
    hopper::tma_load(image + rank * p.box_bytes, map, barrier, {0, static_cast<int32_t>(8 * rank)}, mask);
  hopper::mbarrier_wait(barrier, 0);
  probe::dump(mine, image, p.bytes);
  hopper::cluster_sync();
}

template <Reduce reduction>
HOPPER_KERNEL(128)
tensor_reduce_kernel(HOPPER_GRID_CONSTANT const TensorMap map, HOPPER_GRID_CONSTANT const Params p) {
  uint8_t* image = hopper::dynamic_smem() + kImage;
  probe::fill(image, p.image, p.bytes);
  if (threadIdx.x == 0) {
    hopper::tma_reduce<reduction>(map, image, {0, 0});
    hopper::bulk_commit();
    hopper::bulk_wait<0>();
  }
}

template <Reduce reduction, Element element>
HOPPER_KERNEL(128)
bulk_reduce_kernel(uint8_t* out, HOPPER_GRID_CONSTANT const Params p) {
  uint8_t* image = hopper::dynamic_smem() + kImage;
  probe::fill(image, p.image, p.bytes);
  if (threadIdx.x == 0) {
    hopper::bulk_reduce<reduction, element>(out, image, p.bytes);
    hopper::bulk_commit();
    hopper::bulk_wait<0>();
  }
}

HOPPER_KERNEL(128)
bulk_copy_kernel(uint8_t* out, HOPPER_GRID_CONSTANT const Params p) {
  uint8_t* image = hopper::dynamic_smem() + kImage;
  hopper::Mbarrier* barrier = one_barrier();
  if (threadIdx.x == 0) {
    hopper::mbarrier_arrive_expect_tx(barrier, p.bytes);
    hopper::bulk_load(image, p.image, p.bytes, barrier);
    hopper::mbarrier_wait(barrier, 0);
    hopper::bulk_store(out, image, p.bytes);
    hopper::bulk_commit();
    hopper::bulk_wait<0>();
  }
}

constexpr uint32_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 2, 4, 8};   // by Element

template <int rank>
void launch_copy(bool loads, const TensorMap& map, const Params& p) {
  const auto config = probe::grid(1, 128, kImage + p.bytes);
  if (loads) {
    hopper::launch(config, load_kernel<rank>, map, p);
  } else {
    hopper::launch(config, store_kernel<rank>, map, p);
  }
}

template <Reduce reduction, Element... elements>
bool try_bulk(int64_t wanted, Element element, uint8_t* out, const Params& p) {
  if (wanted != static_cast<int64_t>(reduction)) return false;
  return ((element == elements &&
           (hopper::launch(probe::grid(1, 128, kImage + p.bytes), bulk_reduce_kernel<reduction, elements>, out, p), true)) ||
          ...);
}

template <Reduce reduction>
bool try_tensor(int64_t wanted, const TensorMap& map, const Params& p) {
  if (wanted != static_cast<int64_t>(reduction)) return false;
  hopper::launch(probe::grid(1, 128, kImage + p.bytes), tensor_reduce_kernel<reduction>, map, p);
  return true;
}

void run(const probe::Parameters& given, probe::Memory& memory) {
  const int64_t mode = given[0];
  const auto element = static_cast<Element>(given[1]);
  const auto rank = static_cast<uint32_t>(given[2]);
  const uint32_t size = kBytes[given[1]];
  Params p{};
  p.box_bytes = size;
  for (uint32_t i = 0; i < rank; ++i) {
    p.at[i] = static_cast<int32_t>(given[13 + i]);
    p.box_bytes *= static_cast<uint32_t>(given[8 + i]);
  }
  // Loads: tensor, image. Everything else: image, tensor.
  const bool loads = mode == kLoad || mode == kMulticast;
  const uint32_t image = loads ? 1 : 0;
  auto* tensor = memory.at<uint8_t>(1 - image);
  const auto cluster = static_cast<uint32_t>(given[21]);
  p.image = memory.at<uint8_t>(image);
  p.bytes = static_cast<uint32_t>(memory.bytes(image)) / cluster;

  TensorMap map{};
  if (mode != kBulkCopy && mode != kBulkReduce) {
    hopper::TensorMapShape shape{};
    shape.rank = static_cast<int>(rank);
    int64_t stride = size;
    for (uint32_t i = 0; i < rank; ++i) {
      shape.size[i] = given[3 + i];
      shape.box[i] = static_cast<int32_t>(given[8 + i]);
      stride *= given[3 + i];
      if (i + 1 < rank) shape.stride_bytes[i] = stride;
    }
    shape.fill_nan = given[19] != 0;
    map = hopper::make_tensor_map(tensor, element, shape, static_cast<hopper::Swizzle>(given[18]));
  }
  const int64_t reduction = given[20];
  using enum Reduce;
  using enum Element;
  bool known = true;
  switch (mode) {
    case kLoad:
    case kStore:
      if (rank == 1) launch_copy<1>(loads, map, p);
      if (rank == 2) launch_copy<2>(loads, map, p);
      if (rank == 3) launch_copy<3>(loads, map, p);
      if (rank == 4) launch_copy<4>(loads, map, p);
      if (rank == 5) launch_copy<5>(loads, map, p);
      break;
    case kMulticast:
      p.partial = given[13] != 0;
      hopper::launch(probe::grid(cluster, 128, kImage + p.bytes, cluster), multicast_kernel, map, p);
      break;
    case kTensorReduce:
      known = try_tensor<add>(reduction, map, p) || try_tensor<min>(reduction, map, p) || try_tensor<max>(reduction, map, p) ||
              try_tensor<inc>(reduction, map, p) || try_tensor<dec>(reduction, map, p) || try_tensor<and_>(reduction, map, p) ||
              try_tensor<or_>(reduction, map, p) || try_tensor<xor_>(reduction, map, p);
      break;
    case kBulkReduce:
      known = try_bulk<add, u32, s32, u64, f16, Element::bf16, f32, f64>(reduction, element, tensor, p) ||
              try_bulk<min, u32, s32, Element::bf16>(reduction, element, tensor, p) ||
              try_bulk<max, u32, s32, Element::bf16>(reduction, element, tensor, p) ||
              try_bulk<inc, u32>(reduction, element, tensor, p) || try_bulk<dec, u32>(reduction, element, tensor, p) ||
              try_bulk<and_, u32>(reduction, element, tensor, p) || try_bulk<or_, u32>(reduction, element, tensor, p) ||
              try_bulk<xor_, u32>(reduction, element, tensor, p);
      break;
    case kBulkCopy:
      hopper::launch(probe::grid(1, 128, kImage + p.bytes), bulk_copy_kernel, tensor, p);
      break;
    default: known = false;
  }
  if (!known) throw std::runtime_error("tma.cu has no instance for this case: add it there");
}

}  // namespace

PROBE(run)
