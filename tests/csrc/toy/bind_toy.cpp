#include "../../../csrc/bindings/kernels.h"
#include "toy.h"

namespace {

void check_vector(const TensorView& x, int64_t n) {
  check_dtype(x, {Dtype::f32});
  check_shape(x, {n});
  check_contiguous(x);
}

void axpy(hopper::Stream stream, TensorView x, double a, OptionalTensor y, std::string fault, TensorView out) {
  check_dtype(x, {Dtype::f32});
  check_rank(x, 1);
  check_vector(x, x.shape[0]);
  check_vector(out, x.shape[0]);
  if (y) check_vector(*y, x.shape[0]);
  require(fault == "none" || fault == "past_end", "fault", "must be none or past_end", fault);
  toy::axpy({x.as<float>(), y ? y->as<float>() : nullptr, out.as<float>(), x.shape[0], static_cast<float>(a),
             fault == "past_end"}, stream);
}

void add(hopper::Stream stream, TensorView x, TensorView out) {
  check_vector(x, x.numel());
  check_vector(out, x.shape[0]);
  toy::axpy({x.as<float>(), out.as<float>(), out.as<float>(), x.shape[0], 1.0f, false}, stream);
}

void reverse(hopper::Stream stream, TensorView x, TensorView out) {
  check_vector(x, x.numel());
  check_aligned(x);
  toy::reverse(x.as<float>(), out.as<float>(), x.shape[0], stream);
}

// outs[i] += by[i] * xs[i]
void add_lists(hopper::Stream stream, const Tensors& xs, const bindings::Reals& by, const Tensors& outs) {
  require(by.size() == xs.size() && outs.size() == xs.size(), "by", "must be as long as xs and outs", by.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    const TensorView &x = xs[i], &out = outs[i];
    check_vector(x, x.numel());
    check_vector(out, x.shape[0]);
    toy::axpy({x.as<float>(), out.as<float>(), out.as<float>(), x.shape[0], static_cast<float>(by[i]), false}, stream);
  }
}

// Says what it was given: every kind of scalar, a dtype, strides.
void describe(hopper::Stream, TensorView x, bool flag, int64_t count, std::optional<double> real, Dtype dtype) {
  fail("described", std::string(name_of(x.dtype)) + " " + stride_text(x) + " " + std::to_string(flag) + " " +
       std::to_string(count) + " " + (real ? std::to_string(*real) : "none") + " " + name_of(dtype), device_text(x.device));
}

// The checks that the others do not use.
void strict(hopper::Stream, TensorView x) {
  check_rank(x, 2);
  check_unit_stride(x);
  check_stride_bytes(x, 0);
  check_aligned(x);
}

}  // namespace

void bind_toy(bindings::Module& to) {
  using namespace bindings;
  to.add(kernel("toy_axpy", axpy, {in("x"), scalar("a"), in("y"), scalar("fault"), out("out")}));
  to.add(kernel("toy_add_", add, {in("x"), in_out("out")}));
  to.add(kernel("toy_add_lists_", add_lists, {in("xs"), scalar("by"), in_out("outs")}));
  to.add(kernel("toy_reverse", reverse, {in("x"), out("out")}));
  to.add(kernel("toy_describe", describe, {in("x"), scalar("flag"), scalar("count"), scalar("real"), scalar("dtype")}));
  to.add(kernel("toy_strict", strict, {in("x")}));
}
