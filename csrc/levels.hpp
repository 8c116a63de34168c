// The instruction-set level in use. The row kernels are compiled once for each level, into a
// namespace of its name: one build runs on every processor, with what that one can do.
#pragma once

namespace quark {

enum class Level { generic, v2, v3, v4 };

// The highest level of this processor, or the lower one that the environment variable
// QUARK_FAST_ISA names. Throws std::runtime_error if that does not exist or this processor lacks
// it.
Level level();
// Its name: v2, v3, v4 (x86-64 levels) or generic.
const char* isa();

// QUARK_DECLARE_AT_LEVELS(void f(int);) declares f of every level of this build, and
// QUARK_AT_LEVEL(f) is the address of the one in use.
#ifdef QUARK_X86_64
#define QUARK_DECLARE_AT_LEVELS(...) \
  namespace v2 {                     \
  __VA_ARGS__                        \
  }                                  \
  namespace v3 {                     \
  __VA_ARGS__                        \
  }                                  \
  namespace v4 {                     \
  __VA_ARGS__                        \
  }
#define QUARK_AT_LEVEL(f) at_level(&v2::f, &v3::f, &v4::f)

template <class Function>
Function* at_level(Function* v2, Function* v3, Function* v4) {
  return level() == Level::v4 ? v4 : level() == Level::v3 ? v3 : v2;
}
#else
#define QUARK_DECLARE_AT_LEVELS(...) \
  namespace generic {                \
  __VA_ARGS__                        \
  }
#define QUARK_AT_LEVEL(f) at_level(&generic::f)

template <class Function>
Function* at_level(Function* generic) {
  level();  // throws where QUARK_FAST_ISA names another
  return generic;
}
#endif

}  // namespace quark
