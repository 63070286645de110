#include "convert.h"

#include <pybind11/stl.h>

#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

#include "dlpack.h"

namespace bindings {
namespace {

namespace py = pybind11;

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// The table of an object's type, null when it has none. A type stays alive once it is known, so that its address is
// never that of another.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static std::vector<std::pair<PyTypeObject*, const dlpack::ExchangeApi*>> known;
  for (const auto& [of, api] : known)
    if (of == type) return api;
  const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api && api->version.major != 1) api = api->previous;
  if (!api || !api->tensor_from_python)
    throw BackendError("this torch speaks another DLPack than deepseek_ops (1.x); update deepseek_ops");
  Py_INCREF(type);
  known.emplace_back(type, api);
  return api;
}

const dlpack::ExchangeApi* torch_api = nullptr;   // of the last tensor seen

std::optional<Dtype> dtype_of(dlpack::DataType t) {
  struct Row { uint8_t code, bits; Dtype dtype; };
  static constexpr Row kRows[] = {
      {6, 8, Dtype::boolean}, {0, 8, Dtype::i8},    {0, 16, Dtype::i16},  {0, 32, Dtype::i32}, {0, 64, Dtype::i64},
      {1, 8, Dtype::u8},      {1, 16, Dtype::u16},  {1, 32, Dtype::u32},  {1, 64, Dtype::u64}, {2, 16, Dtype::f16},
      {4, 16, Dtype::bf16},   {2, 32, Dtype::f32},  {2, 64, Dtype::f64},  {10, 8, Dtype::e4m3}, {12, 8, Dtype::e5m2},
      {14, 8, Dtype::e8m0}};
  if (t.lanes != 1) return std::nullopt;
  for (const Row& row : kRows)
    if (row.code == t.code && row.bits == t.bits) return row.dtype;
  return std::nullopt;
}

TensorView tensor_from(const char* name, py::handle object) {
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  if (!api) fail(name, "must be a torch.Tensor", type_name(object));
  torch_api = api;
  dlpack::Tensor t{};
  if (api->tensor_from_python(object.ptr(), &t) != 0) {
    py::error_already_set why;
    fail(name, "must be a dense tensor in memory", std::string(why.what()));
  }
  TensorView view;
  view.name = name;
  const std::optional<Dtype> dtype = dtype_of(t.dtype);
  if (!dtype) fail(name, "must have a dtype that kernels know", std::string(py::str(object.attr("dtype"))));
  if (t.rank > kMaxRank) fail(name, "must have at most 6 dimensions", t.rank);
  view.dtype = *dtype;
  view.rank = t.rank;
  for (int i = 0; i < t.rank; ++i) {
    view.shape[i] = t.shape[i];
    view.stride[i] = t.strides[i];
  }
  view.data = t.data ? static_cast<uint8_t*>(t.data) + t.byte_offset : nullptr;
  switch (t.device.type) {
    case dlpack::kCpu: case dlpack::kCudaHost: view.device = kHost; break;
    case dlpack::kCuda: case dlpack::kCudaManaged: view.device = t.device.id; break;
    default: fail(name, "must be on the CPU or a CUDA device", std::string(py::str(object.attr("device"))));
  }
  // FakeTensor and other wrappers come through as tensors without memory.
  if (!view.data && view.numel() > 0) fail(name, "must hold data, which fake and wrapped tensors do not", type_name(object));
  return view;
}

Dtype dtype_from(const char* name, py::handle object) {
  static std::unordered_map<PyObject*, Dtype> known;   // torch.dtype objects live forever
  if (const auto found = known.find(object.ptr()); found != known.end()) return found->second;
  const std::string text = py::str(object);
  for (int i = 0; i <= static_cast<int>(Dtype::e8m0); ++i) {
    const auto dtype = static_cast<Dtype>(i);
    if (text == std::string("torch.") + name_of(dtype)) return known.emplace(object.inc_ref().ptr(), dtype).first->second;
  }
  fail(name, "must be a torch.dtype that kernels know", text);
}

// The name of element i of a list, for messages and reports: a view of a text that stays.
const char* element_name(const char* list, size_t i) {
  static std::unordered_map<std::string, std::deque<std::string>> known;
  std::deque<std::string>& names = known[list];
  while (names.size() <= i) names.push_back(std::string(list) + "[" + std::to_string(names.size()) + "]");
  return names[i].c_str();
}

// The elements of a list or tuple, each by `convert(name, element)`.
template <class T, class Convert>
std::vector<T> list_from(const char* name, const char* rule, py::handle object, Convert convert) {
  if (!PyList_Check(object.ptr()) && !PyTuple_Check(object.ptr())) fail(name, rule, type_name(object));
  const auto items = py::reinterpret_borrow<py::sequence>(object);
  std::vector<T> values;
  values.reserve(items.size());
  for (size_t i = 0; i < items.size(); ++i) values.push_back(convert(element_name(name, i), items[i]));
  return values;
}

// By Python's own conversion; a bool is not a number here, nor a float an integer.
template <class T>
T scalar_from(const char* name, const char* rule, py::handle object) {
  py::detail::make_caster<T> caster;
  const bool number = !std::is_same_v<T, bool> && !std::is_same_v<T, std::string>;
  if ((number && PyBool_Check(object.ptr())) || !caster.load(object, std::is_same_v<T, double>)) {
    PyErr_Clear();
    fail(name, rule, std::string(py::repr(object)));
  }
  return py::detail::cast_op<T>(std::move(caster));
}

}  // namespace

Value value_from(const Parameter& parameter, py::handle object) {
  const char* name = parameter.name;
  if (object.is_none() && parameter.optional) return std::monostate();
  switch (parameter.kind) {
    case Kind::tensor: return tensor_from(name, object);
    case Kind::tensors: return list_from<TensorView>(name, "must be a list of tensors", object, tensor_from);
    case Kind::boolean: return scalar_from<bool>(name, "must be a bool", object);
    case Kind::integer: return scalar_from<int64_t>(name, "must be a 64-bit integer", object);
    case Kind::real: return scalar_from<double>(name, "must be a number", object);
    case Kind::reals:
      return list_from<double>(name, "must be a list of numbers", object, [](const char* element, py::handle item) {
        return scalar_from<double>(element, "must be a number", item);
      });
    case Kind::text: return scalar_from<std::string>(name, "must be a string", object);
    case Kind::dtype: return dtype_from(name, object);
  }
  return std::monostate();
}

void* current_stream(int device) {
  void* stream = nullptr;
  if (!torch_api || torch_api->current_work_stream(dlpack::kCuda, device, &stream) != 0) throw py::error_already_set();
  return stream;
}

}  // namespace bindings
