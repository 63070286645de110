// The Python module of one kernel target; compiled once per target (CMakeLists.txt), without torch.
//
// A module says what it was built from (`build_info`) and, for each kernel of its target, registers a function of
// the same name; deepseek_ops/_registry.py asks for both. There are no kernels yet, and `build_info` says so: the
// module proves the build chain on every machine until the kernel ground fills it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace {

// Names of the kernels linked into this module.
std::vector<std::string> kernels() { return {}; }

py::dict build_info() {
  py::dict info;
  info["target"] = DEEPSEEK_OPS_TARGET;
  info["compiler"] = __VERSION__;
  info["cuda_compiler"] = DEEPSEEK_OPS_CUDA_COMPILER;
  info["kernels"] = kernels();
  return info;
}

}  // namespace

PYBIND11_MODULE(DEEPSEEK_OPS_MODULE, module) {
  module.doc() = "Kernels of deepseek_ops, target " DEEPSEEK_OPS_TARGET;
  module.def("build_info", &build_info, "Target, compilers, and the kernels in this module.");
}
