// Rows of logits whose memory ends where a page that nobody may touch begins, filled with all sorts
// of values, and what the drivers of the sanitizers share besides.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "../csrc/rows.hpp"
#include "chosen.hpp"

inline Chosen random_bits;

inline int64_t below(int64_t n) {
  return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n));
}

inline uint64_t seed_of_this_problem = 0;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s (seed %llu)\n", what,
               static_cast<unsigned long long>(seed_of_this_problem));
  std::abort();
}

// Puts a number that does not fit in place of a size, a stride or an index.
inline void change(int64_t& number) {
  const int64_t wild[] = {0,
                          -1,
                          number - 1,
                          number + 1,
                          static_cast<int64_t>(2 * static_cast<uint64_t>(number)),
                          INT64_MAX,
                          INT64_MIN,
                          int64_t{1} << below(63)};
  number = wild[below(8)];
}

// Memory between two pages that may not be touched, up against the one or the other.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    constexpr size_t page = 4096;
    const size_t inner = (bytes + page - 1) / page * page;
    size_ = inner + 2 * page;
    void* const all = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(all != MAP_FAILED, "mmap");
    base_ = static_cast<char*>(all);
    if (inner > 0) require(mprotect(base_ + page, inner, PROT_READ | PROT_WRITE) == 0, "mprotect");
    data_ = below(2) ? base_ + page : base_ + page + inner - bytes;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char *base_, *data_;
  size_t size_;
};

inline size_t size_of(quark::DType dtype) { return dtype == quark::DType::f32 ? 4 : 2; }

// --- Values: by the definition of each type, not by the kernels' own conversions ---------------

inline double value_of(const void* data, int64_t i, quark::DType dtype) {
  if (dtype == quark::DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  const int exponent_bits = dtype == quark::DType::bf16 ? 8 : 5, fraction_bits = 15 - exponent_bits;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

inline uint16_t half_of(float x, quark::DType dtype) {  // cut, not rounded: any value will do
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (dtype == quark::DType::bf16) return static_cast<uint16_t>(bits >> 16);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  if (exponent <= 0) return 0;
  if (exponent >= 31) return static_cast<uint16_t>(bits >> 16 & 0x8000u) | 0x7bffu;
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | static_cast<uint32_t>(exponent) << 10 |
                               (bits >> 13 & 0x3ffu));
}

// --- One problem and its memory ----------------------------------------------------------------

struct Layout {
  int64_t inner, outer_stride, inner_stride, elements;
};

inline Layout layout_of(int64_t rows, int64_t width) {
  int64_t inner = 1;
  for (const int64_t divisor : {rows, int64_t{2}, int64_t{3}, int64_t{4}}) {
    if (divisor > 0 && rows % divisor == 0 && below(2)) inner = divisor;
  }
  const int64_t inner_stride = width + (below(3) == 0 ? below(9) : 0);
  const int64_t outer_stride = inner * inner_stride + (below(3) == 0 ? below(9) : 0);
  const int64_t outer = rows / inner;
  const int64_t elements =
      rows == 0 ? 0 : (outer - 1) * outer_stride + (inner - 1) * inner_stride + width;
  return {inner, outer_stride, inner_stride, elements};
}

inline int64_t place(const quark::Rows& rows, int64_t n) {
  return n / rows.inner * rows.outer_stride + n % rows.inner * rows.inner_stride;
}

inline void fill(const Guarded& memory, const Layout& layout, quark::DType dtype, int kind) {
  std::mt19937_64 values(random_bits());
  std::normal_distribution<float> normal(0, kind == 1 ? 30.f : 3.f);
  for (int64_t i = 0; i < layout.elements; ++i) {
    float x = normal(values);
    if (kind == 2) x = static_cast<float>(i % 97) * 2 - 300 + static_cast<float>(i) / 8;  // rising
    if (kind == 3 && values() % 6 == 0) x = -INFINITY;
    if (kind >= 4) {  // any bits at all
      const auto bits = static_cast<uint32_t>(values());
      if (values() % (kind == 4 ? 50 : 2) == 0) std::memcpy(&x, &bits, sizeof x);
    }
    if (dtype == quark::DType::f32) {
      memory.as<float>()[i] = x;
    } else if (std::isinf(x)) {
      memory.as<uint16_t>()[i] = dtype == quark::DType::bf16 ? 0xff80u : 0xfc00u;
    } else {
      memory.as<uint16_t>()[i] = kind >= 4 ? static_cast<uint16_t>(values()) : half_of(x, dtype);
    }
  }
}
