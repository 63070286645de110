// What -fsanitize=thread calls for every load and store of an instrumented kernel (target `checked`), served by our own
// runtime instead of libtsan: nothing of a kernel has to be rewritten to be seen.
#include <elf.h>
#include <link.h>

#include <utility>
#include <vector>

#include "banks.h"
#include "shadow.h"

namespace emulator {

bool owned_register(const Thread*, uintptr_t address, bool write);
std::string symbolize(uintptr_t pc);

namespace {

// A thread that reads one place over and over with plain loads never lets others run, and on a GPU the compiler may read
// once. It is stopped here: no wrapper is called, so the scheduler cannot.
constexpr uint32_t kPlainPolls = 1 << 20;
struct {
  const Thread* thread;
  uintptr_t address, pc;
  uint64_t switches;
  uint32_t times;
} last_read;

void count_plain_poll(World* w, const Thread* t, uintptr_t address, uintptr_t pc) {
  if (last_read.address != address || last_read.pc != pc || last_read.thread != t || last_read.switches != w->statistics.switches) {
    last_read = {t, address, pc, w->statistics.switches, 0};
    return;
  }
  if (++last_read.times < kPlainPolls) return;
  last_read.times = 0;
  w->hazard("livelock", "plain poll" + std::to_string(pc), where(t) + ": " + symbolize(pc) + " polls " + place(reinterpret_cast<void*>(address)) +
            " with plain loads: no other thread can run, and a compiler may read once (use load<Order::acquire, scope>)");
  w->stop();
}

// Constants of the program: neither a tensor nor a mistake.
bool in_a_module(uintptr_t address) {
  static std::vector<std::pair<uintptr_t, uintptr_t>> segments;
  const auto inside = [&] {
    for (auto [begin, end] : segments)
      if (address - begin < end - begin) return true;
    return false;
  };
  if (inside()) return true;
  segments.clear();   // a library may have been loaded since
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) {
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_LOAD)
        segments.emplace_back(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
    return 0;
  }, nullptr);
  return inside();
}

// `aligned`: by the instruction's type; a GPU refuses the address otherwise (PTX ISA: "Addresses as operands").
const uintptr_t stacks = reinterpret_cast<uintptr_t>(stack_region());
const uintptr_t windows = reinterpret_cast<uintptr_t>(window_region());

inline void seen(const void* p, size_t bytes, bool write, void* pc, bool aligned = false) {
  World* w = running();
  if (!w || !w->current || !w->checking) return;
  Thread* t = w->current;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto in_stacks = address - stacks;
  if (in_stacks < stack_region_bytes()) {
    if (address - reinterpret_cast<uintptr_t>(t->fiber.stack) >= kStackBytes) {
      const auto at_pc = reinterpret_cast<uintptr_t>(pc);
      if (w->rule("stack.foreign"))
        w->hazard("stack.foreign", "stack" + std::to_string(at_pc), where(t) + ": " + symbolize(at_pc) + " touches the local memory of another thread");
    } else if (owned_register(t, address, write)) {
      const auto at_pc = reinterpret_cast<uintptr_t>(pc);
      if (w->rule("wgmma.registers"))
        w->hazard("wgmma.registers", "registers" + std::to_string(at_pc), where(t) + ": " + symbolize(at_pc) + (write ? " writes" : " reads") +
                  " registers that a wgmma in flight owns: wgmma_wait first (PTX ISA: wgmma.mma_async)");
    }
    return;
  }
  const auto in_windows = address - windows;
  if (in_windows >= kMaxWindows * kWindowBytes && !write && !w->buffer_of(address)) {
    // Constants of the program and the launch's arguments are read from ordinary memory.
    const std::vector<uint8_t>& arguments = t->block->grid->arguments;
    if (address - reinterpret_cast<uintptr_t>(&t->identity) < sizeof t->identity) return;   // threadIdx and its like
    if (address - reinterpret_cast<uintptr_t>(arguments.data()) < arguments.size() || in_a_module(address)) return;
  }
  if (aligned && address % bytes && w->rule("alignment")) {
    const auto at_pc = reinterpret_cast<uintptr_t>(pc);
    w->hazard("alignment", "alignment" + std::to_string(at_pc), where(t) + ": " + symbolize(at_pc) + (write ? " writes " : " reads ") +
              std::to_string(bytes) + " bytes at " + place(p) + ", which is not aligned to them");
  }
  if (!write) count_plain_poll(w, t, address, reinterpret_cast<uintptr_t>(pc));
  if (w->options.banks && address - reinterpret_cast<uintptr_t>(t->block->window) < kWindowBytes)
    bank_access(t, p, bytes, write, reinterpret_cast<uintptr_t>(pc));
  drain_for_read(t, p, bytes);
  Access a;
  a.seen = w->peek(t);
  a.who = a.seen.self;
  a.write = write;
  a.pc = reinterpret_cast<uintptr_t>(pc);
  access(p, bytes, a);
}

}  // namespace
}  // namespace emulator

#define EMULATOR_HOOK extern "C" __attribute__((visibility("default"), noinline))
#define EMULATOR_SIZED(size)                                                                                            \
  EMULATOR_HOOK void __tsan_read##size(void* p) { emulator::seen(p, size, false, __builtin_return_address(0), true); }        \
  EMULATOR_HOOK void __tsan_write##size(void* p) { emulator::seen(p, size, true, __builtin_return_address(0), true); }        \
  EMULATOR_HOOK void __tsan_unaligned_read##size(void* p) { emulator::seen(p, size, false, __builtin_return_address(0)); } \
  EMULATOR_HOOK void __tsan_unaligned_write##size(void* p) { emulator::seen(p, size, true, __builtin_return_address(0)); } \
  EMULATOR_HOOK void __tsan_read##size##_pc(void* p, void* pc) { emulator::seen(p, size, false, pc); }                  \
  EMULATOR_HOOK void __tsan_write##size##_pc(void* p, void* pc) { emulator::seen(p, size, true, pc); }

EMULATOR_SIZED(1)
EMULATOR_SIZED(2)
EMULATOR_SIZED(4)
EMULATOR_SIZED(8)
EMULATOR_SIZED(16)

EMULATOR_HOOK void __tsan_read_range(void* p, unsigned long bytes) { emulator::seen(p, bytes, false, __builtin_return_address(0)); }
EMULATOR_HOOK void __tsan_write_range(void* p, unsigned long bytes) { emulator::seen(p, bytes, true, __builtin_return_address(0)); }
EMULATOR_HOOK void __tsan_init() {}
EMULATOR_HOOK void __tsan_func_entry(void*) {}
EMULATOR_HOOK void __tsan_func_exit() {}
EMULATOR_HOOK void __tsan_vptr_read(void**) {}
EMULATOR_HOOK void __tsan_vptr_update(void**, void*) {}

// Host code of an instrumented file (guards of function-local statics, reference counts of the standard library).
#define EMULATOR_ATOMIC(bits, type)                                                                                      \
  EMULATOR_HOOK type __tsan_atomic##bits##_load(const volatile type* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  EMULATOR_HOOK void __tsan_atomic##bits##_store(volatile type* p, type v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  EMULATOR_HOOK type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  EMULATOR_HOOK type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
  EMULATOR_HOOK type __tsan_atomic##bits##_exchange(volatile type* p, type v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  EMULATOR_HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* c, type v, int, int) {         \
    return __atomic_compare_exchange_n(p, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                              \
  }

EMULATOR_ATOMIC(8, unsigned char)
EMULATOR_ATOMIC(32, unsigned)
EMULATOR_ATOMIC(64, unsigned long)
