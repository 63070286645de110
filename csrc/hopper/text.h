// PTX text of the vocabulary's enums, device only: arrays for asm's "C" constraint, which inserts them into
// the instruction, so that one asm statement serves every order, scope and operation. (CUDA "Inline PTX
// Assembly", "Constraints".)
#pragma once

#include <type_traits>

#include "types.h"

#ifndef HOPPER_EMULATED

namespace hopper::text {

template <Order order> struct OrderName;
template <> struct OrderName<Order::relaxed> { static constexpr char text[] = "relaxed"; };
template <> struct OrderName<Order::acquire> { static constexpr char text[] = "acquire"; };
template <> struct OrderName<Order::release> { static constexpr char text[] = "release"; };
template <> struct OrderName<Order::acq_rel> { static constexpr char text[] = "acq_rel"; };

template <Scope scope> struct ScopeName;
template <> struct ScopeName<Scope::cta> { static constexpr char text[] = "cta"; };
template <> struct ScopeName<Scope::cluster> { static constexpr char text[] = "cluster"; };
template <> struct ScopeName<Scope::gpu> { static constexpr char text[] = "gpu"; };
template <> struct ScopeName<Scope::sys> { static constexpr char text[] = "sys"; };

template <Reduce op> struct ReduceName;
template <> struct ReduceName<Reduce::add> { static constexpr char text[] = "add"; };
template <> struct ReduceName<Reduce::min> { static constexpr char text[] = "min"; };
template <> struct ReduceName<Reduce::max> { static constexpr char text[] = "max"; };
template <> struct ReduceName<Reduce::inc> { static constexpr char text[] = "inc"; };
template <> struct ReduceName<Reduce::dec> { static constexpr char text[] = "dec"; };
template <> struct ReduceName<Reduce::and_> { static constexpr char text[] = "and"; };
template <> struct ReduceName<Reduce::or_> { static constexpr char text[] = "or"; };
template <> struct ReduceName<Reduce::xor_> { static constexpr char text[] = "xor"; };

// Type of a reduction: sums of 16-bit floats say .noftz, bitwise operations go by width alone.
template <Reduce op, Element element> struct ReduceType;
template <Reduce op> inline constexpr bool is_bitwise = op == Reduce::and_ || op == Reduce::or_ || op == Reduce::xor_;
#define HOPPER_REDUCE_TYPE(element, condition, name)                                                        \
  template <Reduce op> requires(condition)                                                                  \
  struct ReduceType<op, Element::element> { static constexpr char text[] = name; };
HOPPER_REDUCE_TYPE(u32, !is_bitwise<op>, "u32")
HOPPER_REDUCE_TYPE(s32, !is_bitwise<op>, "s32")
HOPPER_REDUCE_TYPE(u64, !is_bitwise<op>, "u64")
HOPPER_REDUCE_TYPE(s64, !is_bitwise<op>, "s64")
HOPPER_REDUCE_TYPE(u32, is_bitwise<op>, "b32")
HOPPER_REDUCE_TYPE(s32, is_bitwise<op>, "b32")
HOPPER_REDUCE_TYPE(u64, is_bitwise<op>, "b64")
HOPPER_REDUCE_TYPE(s64, is_bitwise<op>, "b64")
HOPPER_REDUCE_TYPE(f32, true, "f32")
HOPPER_REDUCE_TYPE(f64, true, "f64")
HOPPER_REDUCE_TYPE(f16, op == Reduce::add, "noftz.f16")
HOPPER_REDUCE_TYPE(bf16, op == Reduce::add, "noftz.bf16")
HOPPER_REDUCE_TYPE(f16, op != Reduce::add, "f16")
HOPPER_REDUCE_TYPE(bf16, op != Reduce::add, "bf16")
#undef HOPPER_REDUCE_TYPE

}  // namespace hopper::text

#endif
