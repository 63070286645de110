// The Python module of a kernel target, without torch. Compiled once, linked into the module of each target.
//
// For each kernel of its target a module has a function of the op's name: bindings/kernels.h says how families add
// theirs, deepseek_ops/_native_ops.py how ops find them. `build_info` says what the module was built from.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings/convert.h"
#include "bindings/families.h"
#include "bindings/target.h"

namespace py = pybind11;

namespace bindings {

void set_python_error(const char* module, const char* name, const char* text) {
  const py::object type = py::module_::import(module).attr(name);
  py::set_error(type, text);
}

namespace {

std::string signature(const KernelEntry& entry) {
  std::string text = entry.op + "(";
  for (const Parameter& p : entry.parameters) text += (text.back() == '(' ? "" : ", ") + std::string(p.name);
  return text + ")";
}

// What holds for every kernel, checked once and here: one device, and nothing that is written overlaps anything else.
// Lists may hold thousands of tensors, so that spans are compared in the order of their addresses: a span overlaps an
// earlier one exactly if it starts before the furthest end so far.
void check_tensors(const KernelEntry& entry, const std::vector<Value>& values) {
  struct Span {
    uintptr_t begin, end;
    const TensorView* tensor;
    bool written;
  };
  std::vector<Span> spans;
  const TensorView* first = nullptr;
  each_tensor(entry.parameters, values, [&](const TensorView& t, const Parameter& parameter) {
    if (!first) first = &t;
    check_same_device(t, *first);
    const auto begin = reinterpret_cast<uintptr_t>(t.data);
    const auto size = static_cast<uintptr_t>(t.span_bytes());
    if (size > 0) spans.push_back({begin, begin + size, &t, parameter.role == Role::out || parameter.role == Role::in_out});
  });
  std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const Span* furthest = nullptr;
  const Span* furthest_written = nullptr;
  for (const Span& s : spans) {
    if (s.written && furthest) check_apart(*s.tensor, *furthest->tensor);
    if (furthest_written) check_apart(*furthest_written->tensor, *s.tensor);
    if (!furthest || s.end > furthest->end) furthest = &s;
    if (s.written && (!furthest_written || s.end > furthest_written->end)) furthest_written = &s;
  }
}

void call(const KernelEntry& entry, const py::args& args) {
  const std::vector<Parameter>& parameters = entry.parameters;
  if (args.size() != parameters.size())
    throw py::type_error(signature(entry) + " takes " + std::to_string(parameters.size()) + " arguments; got " +
                         std::to_string(args.size()));
  std::vector<Value> values;
  values.reserve(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) values.push_back(value_from(parameters[i], args[i]));
  check_tensors(entry, values);
  run_on_target(entry, values);
}

py::dict build_info(const Module& kernels, const char* target) {
  std::vector<std::string> ops;
  for (const KernelEntry& entry : kernels.entries()) ops.push_back(entry.op);
  py::dict info;
  info["target"] = target;
  info["compiler"] = __VERSION__;
  info["cuda_compiler"] = cuda_compiler();
  info["kernels"] = ops;
  return info;
}

void translate(std::exception_ptr p) {
  try {
    if (p) std::rethrow_exception(p);
  } catch (const ArgumentError& e) {
    set_python_error("deepseek_ops._checks", "ArgumentError", e.what());
  } catch (const BackendError& e) {
    set_python_error("deepseek_ops._registry", "BackendError", e.what());
  }
}

void fill(py::module_& module, const char* target) {
  static Module kernels;
  bind_families(kernels);
  module.doc() = std::string("Kernels of deepseek_ops, target ") + target;
  py::register_local_exception_translator(&translate);
  bind_target(module, target);
  module.def("build_info", [target] { return build_info(kernels, target); },
             "Target, compilers, and the ops with a kernel here.");
  for (const KernelEntry& entry : kernels.entries()) {
    module.def(entry.op.c_str(), [&entry](const py::args& args) { call(entry, args); }, signature(entry).c_str());
  }
}

}  // namespace
}  // namespace bindings

// Python asks a module for the function of its own name.
PYBIND11_MODULE(emulated, module) { bindings::fill(module, "emulated"); }
PYBIND11_MODULE(checked, module) { bindings::fill(module, "checked"); }
PYBIND11_MODULE(cuda, module) { bindings::fill(module, "cuda"); }
