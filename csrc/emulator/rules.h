// The rules that the checker knows: name (for Options::off), what is wrong, and where the rule is written.
#pragma once

namespace emulator {

struct Rule {
  const char* name;
  const char* meaning;
  const char* source;
};

inline constexpr Rule kRules[] = {
    {"race", "two accesses, one a write, without an order between them", "PTX ISA: Memory Consistency Model, data races"},
    {"proxy", "the async proxy meets a generic write without a proxy fence", "PTX ISA: Async proxy; fence.proxy.async"},
    {"smem.uninitialised", "read of shared memory that nobody wrote", "CUDA programming guide: shared memory is undefined at start"},
    {"smem.bounds", "access outside of the block's shared memory", "CUDA programming guide: dynamic shared memory"},
    {"smem.dead_block", "access to shared memory of a block that has ended", "PTX ISA: Distributed shared memory"},
    {"global.bounds", "access outside of every tensor of the launch", "C++: bounds of an object"},
    {"global.read_only", "write to an input", "the op's declaration"},
    {"stack.foreign", "access to another thread's local memory", "PTX ISA: State spaces, .local"},
    {"warp.mask", "lanes of one collective disagree, or a named lane has exited", "PTX ISA: shfl.sync, vote.sync, bar.warp.sync"},
    {"barrier.count", "threads give different counts for one barrier, or no multiple of the warp size", "PTX ISA: barrier"},
    {"barrier.members", "one barrier is used by different groups of warps (stricter than hardware)", "house rule: one barrier, one group"},
    {"cluster.order", "cluster arrive and wait do not alternate", "PTX ISA: barrier.cluster"},
    {"mbarrier.uninitialised", "use of an mbarrier that is not initialised, or whose initialisation is not ordered before", "PTX ISA: mbarrier.init"},
    {"mbarrier.misuse", "initialised twice, count out of range, misaligned, arrive past the expected count", "PTX ISA: mbarrier"},
    {"mbarrier.phase", "bytes of a copy land in another phase than the one they were issued in", "PTX ISA: mbarrier, tx-count"},
    {"mbarrier.unbalanced", "tx-count is not zero at the end of the block", "PTX ISA: mbarrier, expect-tx"},
    {"wgmma.fence", "accumulators handed to wgmma without wgmma.fence", "PTX ISA: wgmma.fence"},
    {"wgmma.registers", "accumulators touched while a wgmma owns them", "PTX ISA: wgmma.mma_async"},
    {"wgmma.divergent", "the four warps do not issue the same wgmma", "PTX ISA: wgmma.mma_async .sync.aligned"},
    {"wgmma.descriptor", "malformed matrix descriptor", "PTX ISA: Matrix descriptor format"},
    {"wgmma.swizzle", "operand read with another swizzle than it was written with", "PTX ISA: Tensor swizzling modes"},
    {"wgmma.unfinished", "thread ends with a wgmma in flight", "PTX ISA: wgmma.wait_group"},
    {"tma.arguments", "tensor map, coordinates or addresses that the instruction refuses", "PTX ISA: cp.async.bulk.tensor"},
    {"bulk.arguments", "size or alignment that the instruction refuses", "PTX ISA: cp.async.bulk"},
    {"bulk.unread_at_exit", "thread ends while a bulk store reads shared memory", "PTX ISA: cp.async.bulk.wait_group"},
    {"bulk.uncommitted", "bulk store without commit", "PTX ISA: cp.async.bulk.commit_group"},
    {"cp_async.arguments", "size or alignment that cp.async refuses", "PTX ISA: cp.async"},
    {"matrix.arguments", "row address of ldmatrix or stmatrix not 16-byte aligned", "PTX ISA: ldmatrix, stmatrix"},
    {"registers", "setmaxnreg out of range, not a multiple of 8, or not by a whole warpgroup", "PTX ISA: setmaxnreg"},
    {"alignment", "misaligned access", "PTX ISA: Operands, alignment"},
    {"memory.order", "order that the instruction does not have", "PTX ISA: ld, st, atom, fence"},
    {"deadlock", "no thread can run", "-"},
    {"livelock", "every thread that can run only polls", "-"},
    {"fault", "invalid memory access", "-"},
    {"trap", "the kernel trapped", "PTX ISA: trap"},
};

}  // namespace emulator
