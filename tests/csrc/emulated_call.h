// What every C face of a kernel does: take the emulator's options from the call, run, hand the report over.
#pragma once

#include <exception>
#include <string>

#include "../../csrc/emulator/options.h"

// Of a call with the members seed, asynchrony, schedule, drop_kind, drop_site (may be null), and check unless it is always on.
template <class Call>
void set_options(const Call& call) {
  emulator::Options options;
  options.seed = call.seed;
  options.asynchrony = static_cast<emulator::Asynchrony>(call.asynchrony);
  options.schedule = static_cast<emulator::Schedule>(call.schedule);
  options.check = true;
  if constexpr (requires { call.check; }) options.check = call.check != 0;
  if (call.drop_kind) options.drop_kind = call.drop_kind;
  if (call.drop_site) options.drop_site = call.drop_site;
  emulator::options() = options;
}

// The report of what `run` launches; "" when all is well. It lives until the next one.
template <class Run>
const char* report_of(Run run) {
  static std::string message;
  try {
    run();
    return "";
  } catch (const std::exception& error) {
    emulator::abandon_world();
    message = error.what();
    return message.c_str();
  }
}

// Launches of `run` in one world, each as early as its predecessor lets it.
template <class Run>
const char* report_of_chain(Run run) {
  return report_of([&] {
    emulator::begin_world(1);
    run();
    emulator::run_world();
  });
}
