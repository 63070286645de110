// Shadow memory: for each 4 bytes of shared memory and of writable buffers, who wrote last and who has read since.
#pragma once

#include <cstddef>
#include <cstdint>

#include "world.h"

namespace emulator {

enum class Kind : uint8_t { generic, async, atomic, reduction };   // reduction: an atomic of the async proxy

struct Access {
  Epoch who;                 // recorded in the cells
  Stamp seen;                // what is ordered before the access: the thread's, or its issuer's at the time of issue
  bool write = false;
  Kind kind = Kind::generic;
  Swizzle swizzle = Swizzle::none;
  bool tiled = false;        // written by a TMA box: `swizzle` is meaningful
  Site site;                 // of a wrapper ...
  uintptr_t pc = 0;          // ... or the address of a plain load or store
  const char* what = "";
};

// Checks the access against what the cells remember, reports hazards, and records it. Addresses may lie in shared
// memory or in a buffer; anything else is out of bounds.
void access(const void* p, size_t bytes, const Access&);

Access generic_access(Thread*, bool write, Site, const char* what);   // by a twin, on behalf of the running thread

void clear_window_shadow(const Block&);
void drop_shadow(Buffer&);

}  // namespace emulator
