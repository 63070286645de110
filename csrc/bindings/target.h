// What differs between the targets around a call: device and stream on Hopper, buffers and options in the emulator.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace bindings {

// Checks that the tensors lie where this target can reach them, then runs the host function.
void run_on_target(const KernelEntry&, const std::vector<Value>&);

// Functions and exceptions of this target alone.
void bind_target(pybind11::module_&, const std::string& target);

// Version of nvcc; empty for the host targets.
const char* cuda_compiler();

// Raises the Python exception `module.name` with `text`.
void set_python_error(const char* module, const char* name, const char* text);

}  // namespace bindings
