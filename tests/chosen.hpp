// Random numbers that a fuzzer may choose: two of its bytes each while they last, then those of a
// generator. libfuzzer.sh compiles the drivers with QUARK_LIBFUZZER, where they have no main.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>

class Chosen {
 public:
  using result_type = std::uint64_t;
  static constexpr result_type min() { return 0; }
  static constexpr result_type max() { return std::numeric_limits<result_type>::max(); }

  explicit Chosen(std::uint64_t seed = 1) : generator_(seed) {}
  Chosen(const std::uint8_t* bytes, std::size_t size) : generator_(1), bytes_(bytes), left_(size) {}

  result_type operator()() {
    if (left_ < 2) return generator_();
    left_ -= 2;
    bytes_ += 2;
    return static_cast<result_type>(bytes_[-2]) << 8 | bytes_[-1];
  }

 private:
  std::mt19937_64 generator_;
  const std::uint8_t* bytes_ = nullptr;
  std::size_t left_ = 0;
};
