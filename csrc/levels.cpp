#include "levels.hpp"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace quark {

namespace {

struct Choice {
  Level level;
  const char* name;
  bool supported;
};

Choice choose() {
#ifdef QUARK_X86_64
  __builtin_cpu_init();
  const Choice choices[] = {
      {Level::v4, "v4", __builtin_cpu_supports("x86-64-v4") != 0},
      {Level::v3, "v3", __builtin_cpu_supports("x86-64-v3") != 0},
      {Level::v2, "v2", true},
  };
#else
  const Choice choices[] = {{Level::generic, "generic", true}};
#endif
  const char* asked = std::getenv("QUARK_FAST_ISA");
  std::string known;
  for (const Choice& choice : choices) {
    if (!asked || !*asked) {
      if (choice.supported) return choice;
      continue;
    }
    known += std::string(known.empty() ? "" : ", ") + choice.name;
    if (std::strcmp(asked, choice.name) != 0) continue;
    if (choice.supported) return choice;
    throw std::runtime_error(std::string("QUARK_FAST_ISA=") + asked +
                             ": this processor lacks that level; unset it or choose a lower one");
  }
  throw std::runtime_error(std::string("QUARK_FAST_ISA=") + (asked ? asked : "") +
                           " is not a level of this build; choose one of " + known);
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

Level level() { return chosen().level; }

const char* isa() { return chosen().name; }

}  // namespace quark
