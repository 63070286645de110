// Every family of csrc/kernels.json; CMake generates the definition.
#pragma once

#include "kernels.h"

namespace bindings {
void bind_families(Module&);
}
