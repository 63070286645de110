// From Python objects to the arguments of host functions.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"

namespace bindings {

// The Value of one argument; ArgumentError names it.
Value value_from(const Parameter&, pybind11::handle);

// Where torch wants work on a CUDA device to go.
void* current_stream(int device);

}  // namespace bindings
