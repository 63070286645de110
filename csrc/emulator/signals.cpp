#include "signals.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <string>

#include "world.h"

namespace emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
alignas(16) uint8_t handler_stack[64 << 10];
alignas(16) uint8_t spare_stack[256 << 10];   // where the faulting thread goes on: its own may have overflowed
bool leaving = false;
struct { int signal; uintptr_t address, pc; } fault;

std::string symbolized(uintptr_t pc);

[[noreturn]] void leave_after_fault() {
  World& w = world();
  Thread* t = w.current;
  const uintptr_t stack = reinterpret_cast<uintptr_t>(t->fiber.stack);
  std::string text = where(t) + ": ";
  if (fault.signal == SIGFPE)
    text += "arithmetic fault (integer division by zero)";
  else if (fault.signal == SIGILL)
    text += "illegal instruction";
  else if (fault.address < stack && fault.address >= stack - kGuardBytes)
    text += "stack overflow: local arrays and recursion exceed " + std::to_string(kStackBytes) + " bytes";
  else
    text += "invalid access to " + place(reinterpret_cast<void*>(fault.address));
  text += "\n    " + symbolized(fault.pc);
  w.hazard("fault", text, text);
  w.stop();
}

void on_fault(int signal, siginfo_t* info, void* raw) {
  World* w = running();
  if (!w || !w->current) {  // not a kernel: the instruction faults again, as if we were not here
    ::signal(signal, SIG_DFL);
    return;
  }
  if (leaving) {  // a fault while reporting one: a bug of the emulator itself, with its own address in the core
    ::signal(signal, SIG_DFL);
    return;
  }
  leaving = true;
  auto* context = static_cast<ucontext_t*>(raw);
  fault = {signal, reinterpret_cast<uintptr_t>(info->si_addr), 0};
  auto* top = spare_stack + sizeof spare_stack - 64;
#if defined(__x86_64__)
  fault.pc = static_cast<uintptr_t>(context->uc_mcontext.gregs[REG_RIP]) + 1;
  context->uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(top) - 8;
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(leave_after_fault);
#elif defined(__aarch64__)
  fault.pc = context->uc_mcontext.pc + 1;
  context->uc_mcontext.sp = reinterpret_cast<uintptr_t>(top);
  context->uc_mcontext.pc = reinterpret_cast<uintptr_t>(leave_after_fault);
#endif
}

}  // namespace

std::string symbolize(uintptr_t);
namespace {
std::string symbolized(uintptr_t pc) { return symbolize(pc); }
}  // namespace

SignalGuard::SignalGuard() {
  leaving = false;
  stack_t alternate{};
  alternate.ss_sp = handler_stack;
  alternate.ss_size = sizeof handler_stack;
  sigaltstack(&alternate, &previous_stack_);
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &previous_[i]);
}

SignalGuard::~SignalGuard() {
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &previous_[i], nullptr);
  if (previous_stack_.ss_sp || (previous_stack_.ss_flags & SS_DISABLE)) sigaltstack(&previous_stack_, nullptr);
}

}  // namespace emulator
