// Bank conflicts of shared memory: 32 banks of 4 bytes; two words of one bank cost a wavefront each (CUDA programming
// guide, "Shared Memory"). ldmatrix and stmatrix are always counted; plain accesses with Options::banks, in checked runs.
#pragma once

#include "world.h"

namespace emulator {

// A plain access by one lane, of 1 to 16 bytes. g++ takes vectors apart: accesses to neighbours in one run of code are
// joined again up to 16 bytes. Lanes run alone, so the warp's instruction is put together again: the n-th time that each
// lane of a warp comes to one place in the code belongs to one request.
void bank_access(const Thread*, const void* p, size_t bytes, bool write, uintptr_t pc);

// A whole ldmatrix or stmatrix.
void bank_matrix(Site, const char* what, size_t wavefronts, size_t least);

void close_banks(Statistics&);    // at the end of a run: counts what is left, fills last_bank_sites()

}  // namespace emulator
