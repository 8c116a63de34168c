// What the row kernels compute with: the float types, e^x, extremes, and where a row lies. Included
// by those files alone that are compiled once per instruction-set level, each time with another
// QUARK_LEVEL, the namespace they go to.
//
// They, and this header, use no standard template or inline function: the linker keeps one copy of
// those for the whole program, and it might keep the one compiled for a processor that this machine
// is not. What stands here has internal linkage, for the same reason.
#pragma once

#include <math.h>
#include <string.h>

#include "rows.hpp"

namespace quark::QUARK_LEVEL {

namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline float load(float x) { return x; }

inline float load(Bf16 x) { return float_of(uint32_t{x.bits} << 16); }

// Integer steps and one multiplication, exact for subnormals too: gcc 12 does not vectorise
// conversions of _Float16.
inline float load(F16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const float finite = float_of(magnitude << 13) * 0x1p112f;  // moves the exponent's bias
  const uint32_t not_finite = magnitude << 13 | 0x7f800000u;
  return float_of(sign | (magnitude < 0x7c00u ? bits_of(finite) : not_finite));
}

// Below this, e^x is zero to us: the next power of two would leave the normal floats.
constexpr float kLog0 = -87;
// How far a logit may be above the running maximum before its block is summed again.
constexpr float kHeadroom = 8;

// What a loop may assume of its exponents. `moderate`: all are from kLog0 to kHeadroom, as in
// nearly every row of a language model. `any`: they may also be below kLog0, -inf or NaN.
enum class Range { moderate, any };

// e^x for kLog0 <= x <= kHeadroom; with Range::any also 0 below and NaN for NaN. Relative
// error about 1.5 ulp + 1e-8 |x|: the second part is harmless where e^x is a share of a sum that
// holds e^0. e^x = 2^n 2^f with n = round(x / ln 2), |f| <= 1/2, and a polynomial for 2^f.
template <Range range>
inline float exp_below_headroom(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, kept in the low bits
  constexpr float kLog2E = 0x1.715476p+0f;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float f = x * kLog2E - n;
  float poly = 0x1.5c08e4p-10f;
  poly = poly * f + 0x1.3d0c52p-7f;
  poly = poly * f + 0x1.c6b6e4p-5f;
  poly = poly * f + 0x1.ebf918p-3f;
  poly = poly * f + 0x1.62e428p-1f;
  poly = poly * f + 0x1.000002p+0f;
  const uint32_t scaled = bits_of(poly) + (bits_of(shifted) << 23);  // times 2^n
  if (range == Range::moderate) return float_of(scaled);
  // A NaN's own bits, shifted into the exponent, would make a number of it.
  const uint32_t in_range = x == x ? scaled : 0x7fc00000u;
  return float_of(x < kLog0 ? 0 : in_range);
}

inline float maximum(const float* x, int64_t count) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// The smallest and the largest of many floats, by their bits. Signed, the largest bits are those of
// the largest float if that is positive; unsigned, those of the smallest if that is negative. A NaN
// shows in one of the two. Why not compare floats: integers are compared beside the
// multiplications, which decide the time, and floats in their place.
struct Extremes {
  int32_t top = 0;
  uint32_t low = 0;
  float largest() const { return float_of(uint32_t(top)); }  // or 0
  float smallest() const { return low >> 31 ? float_of(low) : 0; }
  bool moderate() const { return largest() <= kHeadroom && smallest() >= kLog0; }
  // -inf is none: it is a probability of 0.
  bool nan_or_inf() const { return top >= 0x7f800000 || low > 0xff800000u; }
};

inline int64_t offset(const Rows& rows, int64_t n) {
  return n / rows.inner * rows.outer_stride + n % rows.inner * rows.inner_stride;
}

template <class T>
T* row_of(const Rows& rows, int64_t n) {
  return rows.data ? static_cast<T*>(rows.data) + offset(rows, n) : nullptr;
}

// Call body(x) with a value of the rows' element type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::bf16) return body(Bf16{});
  if (dtype == DType::f16) return body(F16{});
  body(float{});
}

}  // namespace

}  // namespace quark::QUARK_LEVEL
