#include "fiber.h"

#include <sys/mman.h>

#include <stdexcept>
#include <vector>

#ifdef EMULATOR_BOOST_CONTEXT
#include <boost/context/detail/fcontext.hpp>
#endif

namespace emulator {
namespace {

std::vector<bool> mapped(kMaxFibers);

}  // namespace

uint8_t* stack_region() {
  static uint8_t* region = [] {
    void* p = mmap(nullptr, stack_region_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("emulator: cannot reserve address space for thread stacks");
    return static_cast<uint8_t*>(p);
  }();
  return region;
}

namespace {

uint8_t* take_stack(size_t index) {
  uint8_t* stack = stack_region() + index * (kStackBytes + kGuardBytes) + kGuardBytes;
  if (!mapped[index]) {
    if (mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE) != 0)
      throw std::runtime_error("emulator: cannot map a thread stack (too many resident threads?)");
    mapped[index] = true;
  }
  return stack;
}

}  // namespace

#ifdef EMULATOR_BOOST_CONTEXT

namespace bc = boost::context::detail;
namespace {
void* scheduler_context;
void boost_entry(bc::transfer_t from) {
  scheduler_context = from.fctx;
  reinterpret_cast<void (*)()>(from.data)();
}
}  // namespace

void prepare_fiber(Fiber& fiber, size_t index, void (*entry)()) {
  fiber.stack = take_stack(index);
  fiber.context = bc::make_fcontext(fiber.stack + kStackBytes, kStackBytes, boost_entry);
  // The entry travels as the data of the first switch.
  *reinterpret_cast<void (**)()>(fiber.stack) = entry;
}

void switch_to_fiber(Fiber& fiber) {
  fiber.context = bc::jump_fcontext(fiber.context, reinterpret_cast<void*>(*reinterpret_cast<void (**)()>(fiber.stack))).fctx;
}

void switch_to_scheduler(Fiber&) { scheduler_context = bc::jump_fcontext(scheduler_context, nullptr).fctx; }

#else

// void emulator_switch(void** save, void* restore): saves the callee-saved registers of the ABI on the current stack,
// stores the stack pointer, loads the other one and returns there. The jump is indirect (not `ret`), since a
// return-address predictor is always wrong here.
#if defined(__x86_64__)
asm(R"(
.text
.type emulator_switch,@function
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rdx
  jmpq *%rdx
.size emulator_switch,.-emulator_switch
)");
constexpr int kSavedWords = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.type emulator_switch,@function
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
.size emulator_switch,.-emulator_switch
)");
#else
#error "the emulator's context switch is written for x86-64 and AArch64; install Boost.Context for other machines"
#endif

extern "C" void emulator_switch(void** save, void* restore);

namespace {
void* scheduler_context;
}

void prepare_fiber(Fiber& fiber, size_t index, void (*entry)()) {
  fiber.stack = take_stack(index);
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + kStackBytes);
#if defined(__x86_64__)
  // At entry the ABI wants the stack pointer 8 below a multiple of 16, as after a call.
  uint64_t* frame = top - 3 - (kSavedWords + 1);
  for (int i = 0; i < kSavedWords; ++i) frame[i] = 0;
  frame[kSavedWords] = reinterpret_cast<uint64_t>(entry);
  frame[kSavedWords + 1] = 0;  // the return address of `entry`, which never returns
#else
  uint64_t* frame = top - 20;
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<uint64_t>(entry);  // x30
#endif
  fiber.context = frame;
}

void switch_to_fiber(Fiber& fiber) { emulator_switch(&scheduler_context, fiber.context); }
void switch_to_scheduler(Fiber& fiber) { emulator_switch(&fiber.context, scheduler_context); }

#endif

}  // namespace emulator
