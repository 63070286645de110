// The host twins of the instruction vocabulary: what csrc/hopper/*.h calls when HOPPER_EMULATED is defined.
//
// This is the whole contract between kernels and the emulator. Each function has the meaning of the PTX instruction
// its wrapper documents; `Site` is the kernel's line. Functions named here may switch to another thread only where
// the comment says "waits". Pointers are ordinary host pointers: into a block's shared-memory window, or to global memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../hopper/types.h"

namespace emulator {

using hopper::Element;
using hopper::Major;
using hopper::Mbarrier;
using hopper::Operand;
using hopper::Order;
using hopper::Reduce;
using hopper::Scope;
using hopper::Shuffle;
using hopper::Site;
using hopper::Space;
using hopper::Swizzle;
using hopper::TensorMap;
using hopper::Vote;

// ---- identity -------------------------------------------------------------------------------------------------
// What a CUDA thread knows about itself; the macros threadIdx etc. (hopper/front.h) read it.
struct Identity {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  uint32_t cluster_rank, cluster_size;  // %cluster_ctarank, %cluster_nctarank
  uint32_t lane, warp;
};
const Identity& identity();

uint8_t* dynamic_smem();                                    // this block's window; 1024-aligned, poisoned
uint32_t shared_address(const void* p, Site);               // 32-bit shared::cta address; reports a foreign pointer
void* map_shared(const void* p, uint32_t cta_rank, Site);   // mapa: the same address in another CTA of the cluster

// ---- warp (PTX 9.7.13 and "parallel synchronization") -----------------------------------------------------------
void syncwarp(uint32_t mask, Site);                         // waits; orders memory among the lanes
bool elect_one(uint32_t mask, Site);                        // waits; true in the lowest lane; no memory ordering
uint32_t shuffle(Shuffle, uint32_t value, uint32_t lane, uint32_t width, uint32_t mask, Site);  // waits
uint32_t vote(Vote, bool predicate, uint32_t mask, Site);   // waits; ballot mask, or 0/1
uint32_t warp_reduce(Reduce, uint32_t value, bool is_signed, uint32_t mask, Site);  // redux.sync; waits

// ---- block and cluster barriers ---------------------------------------------------------------------------------
void barrier_sync(uint32_t id, uint32_t threads, Site);     // bar.sync; waits
void barrier_arrive(uint32_t id, uint32_t threads, Site);   // bar.arrive
void cluster_arrive(bool release, Site);                    // barrier.cluster.arrive(.release | .relaxed)
void cluster_wait(Site);                                    // barrier.cluster.wait.acquire; waits

// ---- mbarrier ---------------------------------------------------------------------------------------------------
void mbarrier_init(Mbarrier*, uint32_t count, Site);
void mbarrier_invalidate(Mbarrier*, Site);
void mbarrier_arrive(Mbarrier*, uint32_t count, Site);                     // release.cta; also of a mapped (remote) barrier: release.cluster
void mbarrier_expect_tx(Mbarrier*, uint32_t bytes, Site);                  // no arrival
void mbarrier_arrive_expect_tx(Mbarrier*, uint32_t bytes, Site);
bool mbarrier_test_wait(Mbarrier*, uint32_t parity, Site);                 // acquire when true; yields when false
void mbarrier_wait(Mbarrier*, uint32_t parity, Site);                      // waits; acquire.cta (cluster if remote arrivals)

// ---- fences -----------------------------------------------------------------------------------------------------
void fence_mbarrier_init(Site);                             // fence.mbarrier_init.release.cluster
void fence_proxy_async(Space, Site);
void fence(Order, Scope, Site);                             // fence.acq_rel / fence.sc
void fence_proxy_tensormap_acquire(const TensorMap*, Scope, Site);

// ---- wgmma ------------------------------------------------------------------------------------------------------
struct WgmmaShape {                                         // wgmma.mma_async.sync.aligned.m64nNkK.f32.T.T
  uint16_t n;                                               // 8..256
  Operand a, b;                                             // K = 32 for fp8, 16 for 16-bit formats
  Major a_major, b_major;                                   // mn only for 16-bit formats
};
void wgmma_fence(Site);
void wgmma_commit(Site);
void wgmma_wait(uint32_t pending, Site);                    // waits; results appear in the accumulators now
// d: the thread's n/2 accumulators. accumulate=false clears first (scale-d). A from shared memory:
void wgmma(const WgmmaShape&, float* d, uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate, Site);
// A from registers: 4 words a thread.
void wgmma(const WgmmaShape&, float* d, const uint32_t* a, uint64_t b_descriptor, bool accumulate, Site);

// ---- matrix moves within a warp ---------------------------------------------------------------------------------
void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* row, Site);   // 1, 2 or 4 8x8 b16 matrices; waits
void stmatrix(void* row, const uint32_t* registers, int matrices, bool transposed, Site);   // waits

// ---- asynchronous copies ----------------------------------------------------------------------------------------
// cta_mask: 0 = this CTA only; otherwise .multicast::cluster to the CTAs of the mask (same offset, same barrier offset).
void tma_load(void* dst, const TensorMap*, Mbarrier*, const int32_t* coordinates, int rank, uint16_t cta_mask, Site);
void tma_store(const TensorMap*, const void* src, const int32_t* coordinates, int rank, Site);
void tma_reduce(Reduce, const TensorMap*, const void* src, const int32_t* coordinates, int rank, Site);
void bulk_load(void* dst, const void* src, uint32_t bytes, Mbarrier*, uint16_t cta_mask, Site);       // global -> shared
void bulk_store(void* dst, const void* src, uint32_t bytes, Site);                                    // shared -> global
void bulk_reduce(Reduce, Element, void* dst, const void* src, uint32_t bytes, Site);                  // shared -> global
void bulk_copy_cluster(void* dst, const void* src, uint32_t bytes, Mbarrier* remote, Site);           // shared -> shared of a peer
void bulk_commit(Site);
void bulk_wait(uint32_t pending, bool read_only, Site);     // waits; read_only: the sources may be reused, nothing is visible yet
void cp_async(void* dst, const void* src, uint32_t bytes, uint32_t valid_bytes, Site);                // 4, 8, 16; the rest is zero-filled
void cp_async_commit(Site);
void cp_async_wait(uint32_t pending, Site);                 // waits
void cp_async_mbarrier_arrive(Mbarrier*, bool no_increment, Site);

// ---- global memory with order and scope -------------------------------------------------------------------------
// size: 1, 2, 4, 8 or 16 bytes. `load`/`store` are ld/st with .relaxed/.acquire/.release and a scope; flags and remote
// payload go only through these. A load that may spin yields.
void load(void* value, const void* p, uint32_t size, Order, Scope, Site);
void store(void* p, const void* value, uint32_t size, Order, Scope, Site);
void atomic(Reduce, Element, void* p, const void* value, void* old, Order, Scope, Site);      // old may be null: red
void atomic_exchange(void* p, const void* value, void* old, uint32_t size, Order, Scope, Site);
void atomic_compare_exchange(void* p, const void* expected, const void* value, void* old, uint32_t size, Order, Scope, Site);

// ---- the rest ---------------------------------------------------------------------------------------------------
void set_max_registers(bool increase, uint32_t count, Site);    // setmaxnreg; waits for the warpgroup
void grid_dependency_wait(Site);                                 // griddepcontrol.wait; waits
void grid_dependency_launch(Site);                               // griddepcontrol.launch_dependents
uint64_t global_timer();                                         // virtual nanoseconds
[[noreturn]] void trap(const char* message, Site);
// True when a mutation run asks to leave out this step: wrappers and shared pieces ask before a droppable action.
bool dropped(const char* what, Site);

// ---- host side --------------------------------------------------------------------------------------------------
struct LaunchShape {
  dim3 grid, block;
  size_t smem_bytes;
  uint32_t cluster;            // CTAs along x
  bool programmatic;           // may start before the previous grid of the stream has finished (PDL)
  const char* name;
};
// Runs one thread of the kernel; called once per CUDA thread on a fiber of its own.
using ThreadBody = void (*)(void* arguments);
// Queues a grid on the current world's stream and, unless the world collects grids (ranks), runs it to the end.
// Throws emulator::KernelError with the report when a hazard was found. `arguments` is copied: `copy(to, from)`, `destroy`.
void launch(const LaunchShape&, ThreadBody, const void* arguments, size_t arguments_bytes);
uint32_t sm_count();           // multiprocessors of the emulated device (persistent kernels size their grid by it)

}  // namespace emulator
