// How a kernel family shows its host functions to Python, without knowing Python.
//
// A family adds one file, bind_<family>.cpp, with one function that csrc/kernels.json makes the bindings call:
//
//   #include "../bindings/kernels.h"
//   void scale(hopper::Stream stream, TensorView x, double by, TensorView y) { ...checks, launch... }
//   void bind_scale(bindings::Module& to) {
//     to.add(bindings::kernel("scale", scale, {bindings::in("x"), bindings::scalar("by"), bindings::out("y")}));
//   }
//
// The name is that of the op in deepseek_ops; parameters are the op's own, in its order, then one for each output,
// allocated by the caller. Legal types: TensorView, OptionalTensor, bool, int64_t, double, std::string, Dtype, and
// std::optional of the last five; Tensors and Reals for lists, by const reference. Before the function runs the bindings
// have checked that tensors hold memory on the right kind of device, all on one, that no `out` or `in_out` overlaps
// anything else (nor an element of a list another element), and (emulated targets) have told the emulator which memory
// is whose. Everything else is for the function to check (common/checks.h), the lengths of lists too.
#pragma once

#include <functional>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "../common/checks.h"
#include "../common/tensor.h"

namespace bindings {

enum class Role : uint8_t {
  in,       // a tensor that is read
  out,      // a fresh tensor that is written
  in_out,   // Tensor(a!) of the op's schema
  scalar    // anything that is not a tensor, nor a list of them
};
enum class Kind : uint8_t { tensor, tensors, boolean, integer, real, reals, text, dtype };

struct Parameter {
  const char* name;
  Role role;
  Kind kind = Kind::tensor;
  bool optional = false;
};
inline Parameter in(const char* name) { return {name, Role::in}; }
inline Parameter out(const char* name) { return {name, Role::out}; }
inline Parameter in_out(const char* name) { return {name, Role::in_out}; }
inline Parameter scalar(const char* name) { return {name, Role::scalar}; }

using Reals = std::vector<double>;

// One argument of a call; monostate is Python's None.
using Value = std::variant<std::monostate, TensorView, Tensors, bool, int64_t, double, Reals, std::string, Dtype>;

// Calls visit(tensor, parameter) for each tensor of a call, those in lists included.
template <class Visit>
void each_tensor(const std::vector<Parameter>& parameters, const std::vector<Value>& values, Visit visit) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (const auto* one = std::get_if<TensorView>(&values[i])) visit(*one, parameters[i]);
    if (const auto* list = std::get_if<Tensors>(&values[i]))
      for (const TensorView& t : *list) visit(t, parameters[i]);
  }
}

struct KernelEntry {
  std::string op;
  std::vector<Parameter> parameters;
  std::function<void(void* stream, const Value* values)> run;
};

class Module {
 public:
  void add(KernelEntry entry) { entries_.push_back(std::move(entry)); }
  const std::vector<KernelEntry>& entries() const { return entries_; }

 private:
  std::vector<KernelEntry> entries_;
};

// ---- from a host function to an entry -----------------------------------------------------------------------------

template <class T>
struct Argument {
  static constexpr bool optional = false;
  static const T& from(const Value& value) { return std::get<T>(value); }
};
template <class T>
struct Argument<std::optional<T>> {
  static constexpr bool optional = true;
  static std::optional<T> from(const Value& value) {
    return std::holds_alternative<std::monostate>(value) ? std::nullopt : std::optional<T>(std::get<T>(value));
  }
};

template <class T> constexpr Kind kind_of() {
  if constexpr (std::is_same_v<T, TensorView>) return Kind::tensor;
  else if constexpr (std::is_same_v<T, Tensors>) return Kind::tensors;
  else if constexpr (std::is_same_v<T, Reals>) return Kind::reals;
  else if constexpr (std::is_same_v<T, bool>) return Kind::boolean;
  else if constexpr (std::is_same_v<T, int64_t>) return Kind::integer;
  else if constexpr (std::is_same_v<T, double>) return Kind::real;
  else if constexpr (std::is_same_v<T, std::string>) return Kind::text;
  else if constexpr (std::is_same_v<T, Dtype>) return Kind::dtype;
  else return kind_of<typename T::value_type>();   // of an optional; anything else does not compile
}

template <class Stream, class... A, size_t... I>
KernelEntry make_kernel(const char* op, void (*host)(Stream, A...), std::vector<Parameter> parameters,
                        std::index_sequence<I...>) {
  if (parameters.size() != sizeof...(A)) throw std::logic_error(std::string(op) + ": a name for each parameter");
  ((parameters[I].kind = kind_of<std::decay_t<A>>(), parameters[I].optional = Argument<std::decay_t<A>>::optional), ...);
  for (const Parameter& p : parameters)
    if ((p.kind == Kind::tensor || p.kind == Kind::tensors) == (p.role == Role::scalar))
      throw std::logic_error(std::string(op) + ": role of parameter " + p.name);
  return {op, std::move(parameters), [host](void* stream, [[maybe_unused]] const Value* values) {
            host(static_cast<Stream>(stream), Argument<std::decay_t<A>>::from(values[I])...);
          }};
}

template <class Stream, class... A>
KernelEntry kernel(const char* op, void (*host)(Stream, A...), std::vector<Parameter> parameters) {
  return make_kernel(op, host, std::move(parameters), std::index_sequence_for<A...>());
}

}  // namespace bindings
