// The entry of a program that tries out a core with random problems, or with libFuzzer's. Included
// last: one_problem(bool hostile) and kDriver, the program's name, are there by then.
#pragma once

#ifdef QUARK_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  random_bits = Chosen(bytes, size);
  one_problem(below(4) > 0);
  return 0;
}

#else

// PROGRAM [problems] [seed], or PROGRAM isa: names the level, status 1 if this machine lacks it.
int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "isa") == 0) {
    try {
      std::printf("%s: ", quark::isa());
      return 0;
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
      return 1;
    }
  }
  const int problems = argc > 1 ? std::atoi(argv[1]) : 1000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (int i = 0; i < problems; ++i) {
    seed_of_this_problem = seed + static_cast<uint64_t>(i);
    random_bits = Chosen(seed_of_this_problem);
    one_problem(i % 2 == 1);
  }
  std::printf("%s: %d problems at level %s: ok\n", kDriver, problems, quark::isa());
}

#endif
