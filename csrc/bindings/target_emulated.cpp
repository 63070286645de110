// Calls into the emulator, for the targets emulated and checked: tensors of the CPU, memory registered for the checker, options and statistics.
#include <pybind11/stl.h>

#include <map>

#include "../emulator/options.h"
#include "target.h"

namespace bindings {
namespace {

namespace py = pybind11;

bool checked_target = false;

template <class E>
E choice(const char* name, const std::string& value, const std::map<std::string, E>& choices) {
  const auto found = choices.find(value);
  if (found != choices.end()) return found->second;
  std::string names;
  for (const auto& [text, _] : choices) names += (names.empty() ? "" : ", ") + text;
  fail(name, "must be one of " + names, value);
}

// The defaults with these changes, by the names of emulator::Options.
void set_options(const py::dict& changes) {
  using emulator::Asynchrony;
  using emulator::Schedule;
  emulator::Options o;
  o.check = checked_target;
  for (const auto& [key, value] : changes) {
    const auto name = py::cast<std::string>(key);
    if (name == "seed") o.seed = py::cast<uint64_t>(value);
    else if (name == "asynchrony")
      o.asynchrony = choice<Asynchrony>("asynchrony", py::cast<std::string>(value),
                                        {{"eager", Asynchrony::eager}, {"random", Asynchrony::random}, {"lazy", Asynchrony::lazy}});
    else if (name == "schedule")
      o.schedule = choice<Schedule>("schedule", py::cast<std::string>(value),
                                    {{"fifo", Schedule::fifo}, {"random", Schedule::random},
                                     {"starve", Schedule::starve}, {"pct", Schedule::pct}});
    else if (name == "sm_count") o.sm_count = py::cast<uint32_t>(value);
    else if (name == "resident_clusters") o.resident_clusters = py::cast<uint32_t>(value);
    else if (name == "banks") o.banks = py::cast<bool>(value);
    else if (name == "fast_tensor_core") o.fast_tensor_core = py::cast<bool>(value);
    else if (name == "off") o.off = py::cast<std::set<std::string>>(value);
    else if (name == "drop_kind") o.drop_kind = py::cast<std::string>(value);
    else if (name == "drop_site") o.drop_site = py::cast<std::string>(value);
    else if (name == "drop_nth") o.drop_nth = py::cast<int64_t>(value);
    else if (name == "max_reports") o.max_reports = py::cast<uint32_t>(value);
    else if (name == "step_budget") o.step_budget = py::cast<uint64_t>(value);
    else if (name == "deadline_seconds") o.deadline_seconds = py::cast<double>(value);
    else fail("options", "must be fields of emulator::Options", name);
  }
  emulator::options() = o;
}

py::dict last_statistics() {
  const emulator::Statistics& s = emulator::last_statistics();
  py::dict d;
  d["switches"] = s.switches;
  d["async_operations"] = s.async_operations;
  d["accesses"] = s.accesses;
  d["wgmma"] = s.wgmma;
  d["bank_conflicts"] = s.bank_conflicts;
  d["digest"] = s.digest;
  d["seconds"] = s.seconds;
  return d;
}

py::list last_drop_sites() {
  py::list sites;
  for (const emulator::DropSite& s : emulator::last_drop_sites()) sites.append(py::make_tuple(s.kind, s.site, s.count));
  return sites;
}

py::list last_bank_sites() {
  py::list sites;
  for (const emulator::BankSite& s : emulator::last_bank_sites())
    sites.append(py::make_tuple(s.site, s.what, s.requests, s.wavefronts, s.least, s.worst));
  return sites;
}

struct RegisteredBuffers {
  ~RegisteredBuffers() { emulator::clear_buffers(); }
};

}  // namespace

void run_on_target(const KernelEntry& entry, const std::vector<Value>& values) {
  const RegisteredBuffers cleared_at_the_end;
  each_tensor(entry.parameters, values, [](const TensorView& t, const Parameter& parameter) {
    require(t.device == kHost, t.name, "must be on the CPU, where the emulator runs", device_text(t.device));
    emulator::register_buffer(t.data, static_cast<size_t>(t.span_bytes()), t.name, parameter.role != Role::in);
  });
  entry.run(nullptr, values.data());
}

const char* cuda_compiler() { return ""; }

void bind_target(py::module_& module, const std::string& target) {
  checked_target = target == "checked";
  set_options(py::dict());
  module.def("set_options", &set_options, "The defaults of emulator::Options with these changes, for the next runs.");
  module.def("last_statistics", &last_statistics, "emulator::Statistics of the last run.");
  module.def("last_drop_sites", &last_drop_sites, "(kind, site, count) of each step that a mutation run may leave out.");
  module.def("last_bank_sites", &last_bank_sites, "Fields of emulator::BankSite of each place, most conflicts first.");
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const emulator::KernelError& e) {
      set_python_error("deepseek_ops._emulation", "KernelError", e.what());
    }
  });
}

}  // namespace bindings
