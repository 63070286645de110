// A wild pointer in a kernel becomes a report instead of the end of the process.
#pragma once

#include <csignal>

namespace emulator {

// Installs handlers for SIGSEGV, SIGBUS, SIGFPE and SIGILL while a world runs, and restores the previous ones.
class SignalGuard {
 public:
  SignalGuard();
  ~SignalGuard();

 private:
  struct sigaction previous_[4];
  stack_t previous_stack_;
};

}  // namespace emulator
