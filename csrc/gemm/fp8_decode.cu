// Host side of fp8_gemm_decode and fp8_gemm_masked_decode: limits, tensor maps, launch. One kernel for each number of
// tokens that wgmma multiplies at once, with and without a cluster.
#include "fp8_decode.h"

#include "fp8_decode.cuh"
#include "host.h"

namespace {

using namespace fp8_decode_kernels;
using namespace gemm_host;

struct Operands {
  const TensorView &a, &scale_a, &b, &scale_b, &d;
  int64_t groups, m, n, k;
};

// Shapes of [groups, ...] if `batch`, else without that dimension.
Operands checked(const TensorView& a, const TensorView& scale_a, const TensorView& b, const TensorView& scale_b,
                 const TensorView& d, bool batch) {
  const int first = batch ? 1 : 0;
  check_dtype(a, {Dtype::e4m3});
  check_rank(a, 2 + first);
  check_dtype(b, {Dtype::e4m3});
  check_rank(b, 2 + first);
  const Operands x{a, scale_a, b, scale_b, d, batch ? a.shape[0] : 1, a.shape[first], b.shape[first], a.shape[first + 1]};
  check_dtype(scale_a, {Dtype::f32});
  check_dtype(scale_b, {Dtype::f32});
  check_dtype(d, {Dtype::bf16, Dtype::f32});
  const int64_t k_blocks = ceil_div(x.k, kSliceK), n_blocks = ceil_div(x.n, kBlockRows);
  if (batch) {
    check_shape(b, {x.groups, -1, x.k});
    check_shape(scale_a, {x.groups, k_blocks, round_up(x.m, 4)});
    check_shape(scale_b, {x.groups, n_blocks, k_blocks});
    check_shape(d, {x.groups, x.m, x.n});
    require(x.groups <= kMaxGroups, "a", "must have at most 512 matrices", x.groups);
  } else {
    check_shape(b, {-1, x.k});
    check_shape(scale_a, {k_blocks, round_up(x.m, 4)});
    check_shape(scale_b, {n_blocks, k_blocks});
    check_shape(d, {x.m, x.n});
  }
  require(x.m <= kMaxTokens, "a", "must have at most 64 rows, all of which one tile multiplies with the weights", x.m);
  require(x.n <= kMaxSize, "b", "must have at most 2^31-512 rows, the range of TMA coordinates", x.n);
  require(x.k <= kMaxSize, "a", "must have at most 2^31-512 columns, the range of TMA coordinates", x.k);
  const int64_t tiles = x.groups * n_blocks;
  require(tiles <= INT32_MAX, "b", "must have fewer than 2^31 blocks of 128 rows in all", tiles);
  for (const TensorView* t : {&a, &b, &scale_a, &scale_b, &d}) check_unit_stride(*t);
  for (const TensorView* t : {&a, &b, &scale_a})
    for (int axis = 0; axis <= first; ++axis) check_stride_bytes(*t, axis);
  for (const TensorView* t : {&a, &b, &scale_a}) check_aligned(*t);
  return x;
}

// The stride of a dimension of one element means nothing, and frameworks put anything there; TMA wants it in order.
int64_t stride(const TensorView& x, int axis, int64_t plain) { return x.shape[axis] == 1 ? plain : x.stride[axis]; }

// [groups, rows, columns] of x, whose last two dimensions these are; `box_rows` whole rows of a swizzle span, or one row.
TensorMap map_of_batch(const TensorView& x, hopper::Element element, int64_t columns, int32_t box_columns, int32_t box_rows,
                       Swizzle swizzle) {
  const int axis = x.rank - 2;
  const int64_t bytes = size_of(x.dtype), row = stride(x, axis, round_up(columns * bytes, 16) / bytes);
  const int64_t matrix = x.shape[axis] * row;
  return map_of(x.data, element, columns, x.shape[axis], row, box_columns, box_rows, swizzle, axis == 0 ? 1 : x.shape[0],
                axis == 0 ? matrix : stride(x, 0, matrix));
}

template <int Tokens, bool Clustered>
void run(const Operands& x, Params p, const Fp8DecodeKnobs& knobs, hopper::Stream stream) {
  using C = Config<Tokens, Clustered>;
  TensorMap map_a{}, map_b{}, map_scale_a{};   // TMA has no empty tensors: without K nothing is loaded
  if (x.k > 0) {
    map_a = map_of_batch(x.a, hopper::Element::u8, x.k, kSliceK, Tokens, Swizzle::b128);
    map_b = map_of_batch(x.b, hopper::Element::u8, x.k, kSliceK, kBlockRows, Swizzle::b128);
    map_scale_a = map_of_batch(x.scale_a, hopper::Element::f32, x.m, Tokens, 1, Swizzle::none);
  }
  const int64_t sms = usable_sms(static_cast<int32_t>(knobs.num_sms));
  const int64_t resident = std::max<int64_t>(sms * C::kBlocksPerSm / p.split, 1);
  hopper::LaunchConfig config = ::launch_config(
      p.masked_m ? "fp8_gemm_masked_decode" : "fp8_gemm_decode",
      static_cast<uint32_t>(std::min(resident, x.groups * p.tiles) * p.split), kThreads, knobs.programmatic, stream,
      sizeof(typename C::Shared));
  config.cluster = static_cast<uint32_t>(p.split);
  hopper::launch(config, fp8_decode_kernel<C>, map_a, map_b, map_scale_a, p);
}

template <bool Clustered>
void run_tokens(const Operands& x, const Params& p, const Fp8DecodeKnobs& knobs, hopper::Stream stream) {
  if (x.m <= 8) return run<8, Clustered>(x, p, knobs, stream);
  if (x.m <= 16) return run<16, Clustered>(x, p, knobs, stream);
  if (x.m <= 32) return run<32, Clustered>(x, p, knobs, stream);
  run<64, Clustered>(x, p, knobs, stream);
}

void launch(const Operands& x, const Fp8DecodeKnobs& knobs, const int32_t* masked_m, bool fill, hopper::Stream stream) {
  const int64_t split = knobs.split_k;
  require(split == 1 || split == 2 || split == 4 || split == 8, "split_k", "must be 1, 2, 4 or 8", split);
  require(knobs.num_sms >= 0 && knobs.num_sms <= INT32_MAX, "num_sms", "must be in 0..2^31-1", knobs.num_sms);
  if (x.groups == 0 || x.m == 0 || x.n == 0) return;
  const int axis = x.d.rank - 2;
  const int64_t element = size_of(x.d.dtype);
  Params p{};
  p.m = static_cast<int32_t>(x.m);
  p.n = static_cast<int32_t>(x.n);
  p.groups = static_cast<int32_t>(x.groups);
  p.tiles = static_cast<int32_t>(ceil_div(x.n, kBlockRows));
  p.slices = static_cast<int32_t>(ceil_div(x.k, kSliceK));
  p.split = static_cast<int32_t>(split);
  p.masked_m = masked_m;
  p.fill = fill;
  p.prefetch_weights = knobs.prefetch_weights;
  p.scale_b = x.scale_b.as<const float>();
  p.scale_b_stride = x.scale_b.stride[axis];
  p.scale_b_group_stride = axis == 0 ? 0 : x.scale_b.stride[0];
  p.d = x.d.data;
  p.d_stride = x.d.stride[axis];
  p.d_group_stride = axis == 0 ? 0 : x.d.stride[0];
  p.fp32 = x.d.dtype == Dtype::f32;
  p.wide_store = is_aligned(x.d.data, 4 * element) && (x.m == 1 || p.d_stride % 4 == 0) &&
                 (x.groups == 1 || p.d_group_stride % 4 == 0);
  split == 1 ? run_tokens<false>(x, p, knobs, stream) : run_tokens<true>(x, p, knobs, stream);
}

}  // namespace

void fp8_gemm_decode(hopper::Stream stream, const TensorView& a, const TensorView& scale_a, const TensorView& b,
                     const TensorView& scale_b, const TensorView& d, const Fp8DecodeKnobs& knobs) {
  launch(checked(a, scale_a, b, scale_b, d, false), knobs, nullptr, false, stream);
}

void fp8_gemm_masked_decode(hopper::Stream stream, const TensorView& a, const TensorView& scale_a, const TensorView& b,
                            const TensorView& scale_b, const TensorView& masked_m, const TensorView& d, bool fill,
                            const Fp8DecodeKnobs& knobs) {
  const Operands x = checked(a, scale_a, b, scale_b, d, true);
  check_dtype(masked_m, {Dtype::i32});
  check_shape(masked_m, {x.groups});
  check_contiguous(masked_m);
  require(knobs.split_k == 1, "split_k", "must be 1 in a batch", knobs.split_k);
  require(!knobs.prefetch_weights, "prefetch_weights", "must be false in a batch, for masked_m says whose are wanted", true);
  launch(x, knobs, masked_m.as<const int32_t>(), fill, stream);
}
