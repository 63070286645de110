// The one header that kernels include: the whole instruction vocabulary.
#pragma once

#include "types.h"

#ifdef HOPPER_EMULATED
#include "../emulator/twins.h"
// A kernel asks for its indices by CUDA's names; each fiber answers for itself.
#define threadIdx (::emulator::identity().thread)
#define blockIdx (::emulator::identity().block)
#define blockDim (::emulator::identity().block_dim)
#define gridDim (::emulator::identity().grid_dim)
#endif

#include "address.h"
#include "barrier.h"
#include "bulk.h"
#include "cache_hint.h"
#include "cluster.h"
#include "convert.h"
#include "cp_async.h"
#include "descriptor.h"
#include "fence.h"
#include "grid.h"
#include "launch.h"
#include "math.h"
#include "matrix.h"
#include "mbarrier.h"
#include "memory.h"
#include "registers.h"
#include "time.h"
#include "tma.h"
#include "warp.h"
#include "wgmma.h"
