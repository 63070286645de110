// The C face of the cases, for ctypes.
#include <cstring>

#include "../../../../csrc/emulator/rules.h"
#include "cases.h"

using planted::cases;

extern "C" {

// "name=rules of bug 1,rules of bug 2,...;" for every case
const char* planted_list() {
  static std::string text;
  text.clear();
  for (const auto& c : cases()) {
    text += std::string(c.name) + "=";
    for (size_t i = 0; i < c.expected.size(); ++i) text += std::string(i ? "," : "") + c.expected[i];
    text += ";";
  }
  return text.c_str();
}

// The report, "data: ..." for wrong results without one, "" when all is well.
const char* planted_run(const char* name, int bug, uint64_t seed, int asynchrony, int schedule, int check, const char* off,
                        const char* drop_kind, const char* drop_site) {
  static std::string message;
  emulator::Options o;
  o.seed = seed;
  o.asynchrony = static_cast<emulator::Asynchrony>(asynchrony);
  o.schedule = static_cast<emulator::Schedule>(schedule);
  o.check = check != 0;
  o.deadline_seconds = 20;
  if (*off) o.off.insert(off);
  o.drop_kind = drop_kind;
  o.drop_site = drop_site;
  emulator::options() = o;
  message.clear();
  for (const auto& c : cases())
    if (!std::strcmp(c.name, name)) {
      try {
        c.run(bug);
      } catch (const planted::WrongData& e) {
        message = std::string("data: ") + e.what();
      } catch (const std::exception& e) {
        message = e.what();
      }
      emulator::abandon_world();
      return message.c_str();
    }
  message = "no such case";
  return message.c_str();
}

// "name;" for every rule of the checker
const char* planted_rules() {
  static std::string text;
  text.clear();
  for (const auto& rule : emulator::kRules) text += std::string(rule.name) + ";";
  return text.c_str();
}

uint64_t planted_digest() { return emulator::last_statistics().digest; }
uint64_t planted_switches() { return emulator::last_statistics().switches; }
uint64_t planted_clock_entries() { return emulator::last_statistics().clock_entries; }
uint64_t planted_accesses() { return emulator::last_statistics().accesses; }
uint64_t planted_bank_conflicts() { return emulator::last_statistics().bank_conflicts; }

// "kind@site " of every place that a mutation run may leave out
const char* planted_drop_sites() {
  static std::string text;
  text.clear();
  for (const auto& d : emulator::last_drop_sites()) text += d.kind + "@" + d.site + " ";
  return text.c_str();
}

}  // extern "C"
