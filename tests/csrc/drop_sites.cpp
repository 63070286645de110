// What tests/csrc/mutation.py asks after a run.
#include <string>

#include "../../csrc/emulator/options.h"

extern "C" {

// "kind@file:line " of every step of the last run that a mutation may leave out.
const char* drop_sites() {
  static std::string text;
  text.clear();
  for (const auto& d : emulator::last_drop_sites()) text += d.kind + "@" + d.site + " ";
  return text.c_str();
}

}  // extern "C"
