// Compiled once per instruction-set level with QUARK_LEVEL defined (the row kernels, in a
// namespace named after the level) and once without it (the dispatcher: level, threads).
//
// The kernels use no standard template or inline function: the linker keeps one copy of those for
// the whole program, and it might keep the one compiled for a processor that this machine is not.

#include "quark_loss.hpp"

#ifdef QUARK_LEVEL

#include <math.h>
#include <string.h>

namespace quark::QUARK_LEVEL {

namespace {

// Columns summed in float32 before they enter sums in double, with one choice of the maxima.
constexpr int64_t kBlock = 2048;

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

inline void store(float& to, float x) { to = x; }

// Round to nearest, ties to even. Not for NaN, whose low bits could carry into the exponent; a test
// for it here would cost a third of the time of the gradient.
inline void store(Bf16& to, float x) {
  const uint32_t bits = bits_of(x);
  to.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Round to nearest, ties to even; what is too large becomes infinite. Not for NaN either.
inline void store(F16& to, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half, correctly rounded, in the low bits.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
  to.bits = static_cast<uint16_t>(sign | (magnitude < 0x477ff000u ? finite : 0x7c00u));
}

inline void store_nan(float& to) { to = NAN; }
inline void store_nan(Bf16& to) { to.bits = 0x7fc0u; }
inline void store_nan(F16& to) { to.bits = 0x7e00u; }

// Below this, e^x is zero to us: the next power of two would leave the normal floats.
constexpr float kLog0 = -87;
// How far a logit may be above the running maximum before its block is summed again.
constexpr float kHeadroom = 8;

// e^x for kLog0 <= x <= kHeadroom, 0 below, any number for NaN. Relative error about 1 ulp + 1e-8
// |x|: the second part is harmless where e^x is a share of a sum that holds e^0. e^x = 2^n 2^f with
// n = round(x / ln 2), |f| <= 1/2, and a polynomial for 2^f.
inline float exp_below_headroom(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, kept in the low bits
  constexpr float kLog2E = 0x1.715476p+0f;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float f = x * kLog2E - n;
  float poly = 0x1.446c7ep-13f;
  poly = poly * f + 0x1.5f88fep-10f;
  poly = poly * f + 0x1.3b29e4p-7f;
  poly = poly * f + 0x1.c6ae2cp-5f;
  poly = poly * f + 0x1.ebfbe0p-3f;
  poly = poly * f + 0x1.62e432p-1f;
  poly = poly * f + 1.0f;
  const float scaled = float_of(bits_of(poly) + (bits_of(shifted) << 23));  // times 2^n
  return x < kLog0 ? 0.0f : scaled;
}

// The running moments of one row, relative to the running maxima m and u. With y = z - m and
// q = r - u:  s = sum e^y,  a = sum e^y y,  t = sum e^q,
// b = sum e^y (y - q) for policy_ref or sum e^q (q - y) for ref_policy.
struct Moments {
  float m = -INFINITY, u = -INFINITY;
  double s = 0, a = 0, t = 0, b = 0;

  // Rescale by e^(old - new), so that every partial sum stays relative to the running maxima.
  template <Kl kl>
  void raise(float new_m, float new_u) {
    const double d = s > 0 ? double(m) - new_m : 0;
    const double k = t > 0 ? double(u) - new_u : 0;
    const double c = ::exp(d);
    if (kl == Kl::policy_ref) b = c * (b + (d - k) * s);
    if (kl == Kl::ref_policy) b = ::exp(k) * (b + (k - d) * t);
    a = c * (a + d * s);
    s *= c;
    t *= ::exp(k);
    m = new_m;
    u = new_u;
  }
};

template <class T>
float maximum(const T* x, int64_t count) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const float value = load(x[i]);
    largest = value > largest ? value : largest;
  }
  return largest;
}

// What one block adds to the moments, relative to m and u, and the block's own maxima.
struct Block {
  float s = 0, a = 0, t = 0, b = 0;
  float top_z = -INFINITY, top_r = -INFINITY;
};

template <Kl kl, class Z, class R>
Block sum_block(const Z* z, const R* r, int64_t count, float m, float u) {
  float s = 0, a = 0, t = 0, b = 0, top_z = -INFINITY, top_r = -INFINITY;
#pragma omp simd reduction(+ : s, a, t, b) reduction(max : top_z, top_r)
  for (int64_t i = 0; i < count; ++i) {
    const float zi = load(z[i]);
    top_z = zi > top_z ? zi : top_z;
    const float y = zi - m;
    const float p = exp_below_headroom(y);
    s += p;
    a += p * (y < kLog0 ? 0 : y);  // 0 log 0 = 0, also where y = -inf
    if (kl != Kl::none) {
      const float ri = load(r[i]);
      top_r = ri > top_r ? ri : top_r;
      const float q = ri - u;
      const float p_ref = exp_below_headroom(q);
      t += p_ref;
      // One product of (y - q): separate sums would lose 2 to 3 times the accuracy of the KL.
      if (kl == Kl::policy_ref) b += p * (y < kLog0 ? 0 : y - q);
      if (kl == Kl::ref_policy) b += p_ref * (q < kLog0 ? 0 : q - y);
    }
  }
  return {s, a, t, b, top_z, top_r};
}

// The maxima come from the first block alone, and then from the blocks already summed: a pass of
// its own for the maximum costs a quarter of the time, and logits rarely rise by kHeadroom later.
template <Kl kl, class Z, class R>
Moments moments(const Z* z, const R* r, int64_t vocab) {
  // A row that is -inf so far has no maximum to subtract; any finite one will do.
  const auto finite = [](float maximum) { return maximum == -INFINITY ? 0 : maximum; };
  const auto larger = [](float x, float y) { return x > y ? x : y; };
  Moments sum;
  sum.m = maximum(z, vocab < kBlock ? vocab : kBlock);
  if (kl != Kl::none) sum.u = maximum(r, vocab < kBlock ? vocab : kBlock);
  for (int64_t i = 0; i < vocab; i += kBlock) {
    const int64_t count = vocab - i < kBlock ? vocab - i : kBlock;
    Block block = sum_block<kl>(z + i, r + i, count, finite(sum.m), finite(sum.u));
    const float m = larger(block.top_z, sum.m), u = larger(block.top_r, sum.u);
    if (m > sum.m + kHeadroom || u > sum.u + kHeadroom) {
      sum.raise<kl>(m, u);
      block = sum_block<kl>(z + i, r + i, count, finite(m), finite(u));
    }
    sum.s += block.s;
    sum.a += block.a;
    sum.t += block.t;
    sum.b += block.b;
    if (m > sum.m || u > sum.u) sum.raise<kl>(m, u);
  }
  return sum;
}

// The gradient of one element, without the label's -weight:
//   policy_ref: e^y (c0 + c1 y + c2 q)      ref_policy: e^y (c0 + c1 y) + c2 e^q
struct Gradient {
  float m, u, c0, c1, c2;

  Gradient(Kl kl, const RowStats& row, double weight, double kl_coef, double entropy_coef)
      : m(row.m), u(row.u) {
    const double log_s = ::log(double(row.s));
    const double scale = weight / row.s;
    double k0 = 1 + entropy_coef * (row.entropy - log_s);
    double k1 = entropy_coef;
    double k2 = 0;
    if (kl == Kl::policy_ref) {
      k0 += kl_coef * (::log(double(row.t)) - log_s - row.kl);
      k1 += kl_coef;
      k2 = -kl_coef * scale;
    }
    if (kl == Kl::ref_policy) {
      k0 += kl_coef;
      k2 = -kl_coef * weight / row.t;
    }
    if (kl != Kl::none && !isfinite(row.kl)) k0 = NAN;
    c0 = float(scale * k0);
    c1 = float(scale * k1);
    c2 = float(k2);
  }

  bool finite() const { return isfinite(c0) && isfinite(c1) && isfinite(c2); }

  template <Kl kl, class Z, class R>
  float at(const Z* z, const R* r, int64_t i) const {
    const float y = load(z[i]) - m;
    const float q = kl == Kl::none ? 0 : load(r[i]) - u;
    float factor = c0 + c1 * y;
    if (kl == Kl::policy_ref) factor += c2 * q;
    const float own = y < kLog0 ? 0 : exp_below_headroom(y) * factor;
    return kl == Kl::ref_policy ? own + c2 * exp_below_headroom(q) : own;
  }
};

template <Kl kl, class Z, class R>
void write_gradient(const Gradient& gradient, const Z* z, const R* r, int64_t label, float weight,
                    int64_t vocab, int64_t width, Z* grad) {
  // Before the loop, which may overwrite z; in float32, before the rounding to the dtype.
  const float at_label = gradient.at<kl>(z, r, label) - weight;
  const Gradient g = gradient;  // a copy cannot change below the loop's stores
  if (g.finite()) {
#pragma omp simd
    for (int64_t i = 0; i < vocab; ++i) store(grad[i], g.at<kl>(z, r, i));
    store(grad[label], at_label);
  } else {
    for (int64_t i = 0; i < vocab; ++i) store_nan(grad[i]);
  }
  if (width > vocab) memset(grad + vocab, 0, size_t(width - vocab) * sizeof(Z));
}

int64_t offset(const Rows& rows, int64_t n) {
  return n / rows.inner * rows.outer_stride + n % rows.inner * rows.inner_stride;
}

template <class T>
T* row_of(const Rows& rows, int64_t n) {
  return rows.data ? static_cast<T*>(rows.data) + offset(rows, n) : nullptr;
}

template <class Z, class R>
void write_gradient_row(const Problem& p, int64_t n, const RowStats& stats, double scale,
                        const Rows& rows) {
  const Z* z = row_of<Z>(p.logits, n);
  const R* r = row_of<R>(p.ref, n);
  Z* grad = row_of<Z>(rows, n);
  const double weight = p.weights[n] * scale;
  if (p.weights[n] == 0) {
    memset(grad, 0, size_t(p.width) * sizeof(Z));
    return;
  }
  // Without a coefficient, an infinite KL must not reach the gradient.
  const Kl kl = p.kl_coef == 0 ? Kl::none : p.kl;
  const Gradient gradient(kl, stats, weight, p.kl_coef, p.entropy_coef);
  const auto write = kl == Kl::none         ? write_gradient<Kl::none, Z, R>
                     : kl == Kl::policy_ref ? write_gradient<Kl::policy_ref, Z, R>
                                            : write_gradient<Kl::ref_policy, Z, R>;
  write(gradient, z, r, p.labels[n], float(weight), p.vocab, p.width, grad);
}

template <class Z, class R>
RowStats forward_row(const Problem& p, const RowOutputs& out, int64_t n) {
  if (p.weights[n] == 0) {
    out.nll[n] = out.kl[n] = out.entropy[n] = 0;
    return RowStats{};
  }
  const Z* z = row_of<Z>(p.logits, n);
  const R* r = row_of<R>(p.ref, n);
  const auto measure = p.kl == Kl::none         ? moments<Kl::none, Z, R>
                       : p.kl == Kl::policy_ref ? moments<Kl::policy_ref, Z, R>
                                                : moments<Kl::ref_policy, Z, R>;
  const Moments sum = measure(z, r, p.vocab);
  // Of a NaN logit, exp_below_headroom may make a number; a, which multiplies by it, is NaN.
  const double log_s = isnan(sum.a) ? NAN : ::log(sum.s);
  const double log_t = ::log(sum.t);
  const double kl = p.kl == Kl::none         ? 0
                    : p.kl == Kl::policy_ref ? sum.b / sum.s - log_s + log_t
                                             : sum.b / sum.t - log_t + log_s;
  out.nll[n] = float(double(sum.m) - load(z[p.labels[n]]) + log_s);
  out.kl[n] = float(kl);
  out.entropy[n] = float(log_s - sum.a / sum.s);
  return {sum.m, float(sum.s), sum.u, float(sum.t), out.kl[n], out.entropy[n]};
}

template <class Z, class R>
void forward_typed(const Problem& p, const RowOutputs& out, const Rows* grad, int64_t n) {
  const RowStats stats = forward_row<Z, R>(p, out, n);
  if (out.stats) out.stats[n] = stats;
  if (grad) write_gradient_row<Z, R>(p, n, stats, 1, *grad);
}

template <class Z, class R>
void backward_typed(const Problem& p, const RowStats* stats, double scale, const Rows& grad,
                    int64_t n) {
  write_gradient_row<Z, R>(p, n, stats[n], scale, grad);
}

// Call body(Z, R) with values of the element types of policy and reference.
template <class Body>
void with_types(const Problem& p, const Body& body) {
  const auto with_ref = [&](auto z) {
    if (!p.ref.data) return body(z, z);
    if (p.ref.dtype == DType::bf16) return body(z, Bf16{});
    if (p.ref.dtype == DType::f16) return body(z, F16{});
    return body(z, float{});
  };
  if (p.logits.dtype == DType::bf16) return with_ref(Bf16{});
  if (p.logits.dtype == DType::f16) return with_ref(F16{});
  return with_ref(float{});
}

}  // namespace

void forward_rows(const Problem& p, const RowOutputs& out, const Rows* grad, int64_t begin,
                  int64_t end) {
  with_types(p, [&](auto z, auto r) {
    for (int64_t n = begin; n < end; ++n) forward_typed<decltype(z), decltype(r)>(p, out, grad, n);
  });
}

void backward_rows(const Problem& p, const RowStats* stats, double scale, const Rows& grad,
                   int64_t begin, int64_t end) {
  with_types(p, [&](auto z, auto r) {
    for (int64_t n = begin; n < end; ++n)
      backward_typed<decltype(z), decltype(r)>(p, stats, scale, grad, n);
  });
}

}  // namespace quark::QUARK_LEVEL

#else  // the dispatcher

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace quark {

#define QUARK_DECLARE(level)                                                                  \
  namespace level {                                                                           \
  void forward_rows(const Problem&, const RowOutputs&, const Rows*, int64_t, int64_t);        \
  void backward_rows(const Problem&, const RowStats*, double, const Rows&, int64_t, int64_t); \
  }

#ifdef QUARK_X86_64
QUARK_DECLARE(v2)
QUARK_DECLARE(v3)
QUARK_DECLARE(v4)
#else
QUARK_DECLARE(generic)
#endif

namespace {

struct Level {
  const char* name;
  bool supported;
  decltype(&QUARK_LOWEST::forward_rows) forward_rows;
  decltype(&QUARK_LOWEST::backward_rows) backward_rows;
};

Level choose_level() {
#define QUARK_ENTRY(level, supported) {#level, supported, level::forward_rows, level::backward_rows}
#ifdef QUARK_X86_64
  __builtin_cpu_init();
  const Level levels[] = {
      QUARK_ENTRY(v4, __builtin_cpu_supports("x86-64-v4") != 0),
      QUARK_ENTRY(v3, __builtin_cpu_supports("x86-64-v3") != 0),
      QUARK_ENTRY(v2, true),
  };
#else
  const Level levels[] = {QUARK_ENTRY(generic, true)};
#endif
  const char* asked = std::getenv("QUARK_FAST_ISA");
  std::string known;
  for (const Level& level : levels) {
    if (!asked || !*asked) {
      if (level.supported) return level;
      continue;
    }
    known += std::string(known.empty() ? "" : ", ") + level.name;
    if (std::strcmp(asked, level.name) != 0) continue;
    if (level.supported) return level;
    throw std::runtime_error(std::string("QUARK_FAST_ISA=") + asked +
                             ": this processor lacks that level; unset it or choose a lower one");
  }
  throw std::runtime_error(std::string("QUARK_FAST_ISA=") + (asked ? asked : "") +
                           " is not a level of this build; choose one of " + known);
}

const Level& level() {
  static const Level chosen = choose_level();
  return chosen;
}

// Threads of our own, for the length of one call: a second OpenMP runtime beside torch's would
// keep its idle threads spinning on the same cores. Starting one costs a few tens of
// microseconds, so each must have rows enough to be worth it.
template <class Work>
void over_rows(const Problem& p, int threads, const Work& work) {
  constexpr int64_t kElementsWorthAThread = int64_t{1} << 18;
  constexpr int64_t kElementsPerGrab = int64_t{1} << 16;
  const int64_t grab = std::max<int64_t>(1, kElementsPerGrab / std::max<int64_t>(1, p.width));
  const int64_t useful =
      std::min((p.rows + grab - 1) / grab, p.rows * p.width / kElementsWorthAThread);
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t n = next.fetch_add(grab); n < p.rows; n = next.fetch_add(grab))
      work(n, std::min(n + grab, p.rows));
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, useful); ++i) helpers.emplace_back(run);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started, and this one, do all the rows.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

const char* isa() { return level().name; }

int64_t first_bad_label(const Problem& p) {
  for (int64_t n = 0; n < p.rows; ++n)
    if (p.weights[n] != 0 && (p.labels[n] < 0 || p.labels[n] >= p.vocab)) return n;
  return -1;
}

double forward(const Problem& p, const RowOutputs& out, const Rows* grad, int threads) {
  const auto rows = level().forward_rows;
  over_rows(p, threads, [&](int64_t begin, int64_t end) { rows(p, out, grad, begin, end); });
  double loss = 0;
  for (int64_t n = 0; n < p.rows; ++n) {
    if (p.weights[n] == 0) continue;
    double row = out.nll[n] - p.entropy_coef * out.entropy[n];
    if (p.kl_coef != 0) row += p.kl_coef * out.kl[n];
    loss += p.weights[n] * row;
  }
  return loss;
}

void backward(const Problem& p, const RowStats* stats, double scale, const Rows& grad,
              int threads) {
  const auto rows = level().backward_rows;
  over_rows(p, threads,
            [&](int64_t begin, int64_t end) { rows(p, stats, scale, grad, begin, end); });
}

}  // namespace quark

#endif
