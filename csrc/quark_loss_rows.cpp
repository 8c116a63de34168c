// The loss's row kernels, compiled once per instruction-set level; see row_math.hpp for what that
// forbids. quark_loss.cpp chooses among them at run time.

#include "quark_loss.hpp"
#include "row_math.hpp"

namespace quark::QUARK_LEVEL {

namespace {

// Columns summed in float32 before they enter sums in double, with one choice of the maxima.
constexpr int64_t kBlock = 2048;

inline void store(float& to, float x) { to = x; }

// A bfloat16 in the upper half: rounded to nearest, ties to even. Not for NaN, whose low bits could
// carry into the exponent; a test for it here would cost a third of the time of the gradient.
inline uint32_t rounded_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return bits + 0x7fffu + (bits >> 16 & 1u);
}

inline void store(Bf16& to, float x) { to.bits = static_cast<uint16_t>(rounded_to_bf16(x) >> 16); }

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

// What the loops read and write at a time. Two neighbours in bfloat16 are one 32-bit word, and each
// is a float after one operation; to widen and to pack them would take a quarter more time.
template <class T>
struct Word;

template <>
struct Word<float> {
  static constexpr int kSize = 1;
  float value;
  float at(int) const { return value; }
  static Word load(const float* x, int64_t i) { return {x[i]}; }
  static void store(float* to, int64_t i, const float (&x)[1]) { to[i] = x[0]; }
};

template <>
struct Word<Bf16> {
  static constexpr int kSize = 2;
  uint32_t bits;
  float at(int k) const { return float_of(k == 0 ? bits << 16 : bits & 0xffff0000u); }
  static Word load(const Bf16* x, int64_t i) {
    Word word;
    memcpy(&word.bits, x + 2 * i, sizeof word.bits);
    return word;
  }
  static void store(Bf16* to, int64_t i, const float (&x)[2]) {
    const uint32_t bits = rounded_to_bf16(x[0]) >> 16 | (rounded_to_bf16(x[1]) & 0xffff0000u);
    memcpy(to + 2 * i, &bits, sizeof bits);
  }
};

// Whether the loops can walk the rows as they lie. All else goes through blocks of floats: other
// types, unequal types, and the last block of an odd row of bfloat16.
template <class Z, class R>
constexpr bool kSameWords = false;
template <>
constexpr bool kSameWords<float, float> = true;
template <>
constexpr bool kSameWords<Bf16, Bf16> = true;

template <class T>
struct FloatBlock {
  alignas(64) float values[kBlock];

  [[gnu::noinline]] const float* of(const T* x, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = load(x[i]);
    return values;
  }
};

template <>
struct FloatBlock<float> {
  static const float* of(const float* x, int64_t) { return x; }
};

inline float larger(float x, float y) { return x > y ? x : y; }
inline float smaller(float x, float y) { return x < y ? x : y; }

// The exponentials of a row, kept by its sums for its gradient, which would compute them again:
// both happen while the row is in the cache. Those of a block lie in planes, of element k of word i
// at [k * words + i], and are relative to the maxima that the block was summed with.
struct Kept {
  float* e_y = nullptr;  // (vocab,); null: nothing is kept
  float* e_q = nullptr;  // (vocab,), for ref_policy alone
  float* m = nullptr;    // for each block
  float* u = nullptr;

  Kept of_block(int64_t first) const {
    const int64_t block = first / kBlock;
    return e_y ? Kept{e_y + first, e_q + first, m + block, u + block} : Kept{};
  }
};

// What one block adds to the moments, relative to m and u, the extremes of its exponents, and the
// largest exponent of a token that has mass in the KL's first distribution and none in its second.
// Whether that is a mass, and the KL infinite, the maxima of the whole row decide.
struct Block {
  float s, a, t, b;
  Extremes y, q;
  float lost;
};

template <Kl kl, Range range, bool keep, class T>
Block sum_words(const T* z, const T* r, int64_t words, float m, float u, const Kept& kept) {
  float* const e_y = kept.e_y;
  float* const e_q = kept.e_q;
  float s = 0, a = 0, t = 0, b = 0;
  int32_t top_y = 0, top_q = 0;
  uint32_t low_y = 0, low_q = 0;
  float lost = -INFINITY;
#pragma omp simd reduction(+ : s, a, t, b) reduction(max : top_y, low_y, top_q, low_q, lost)
  for (int64_t i = 0; i < words; ++i) {
    const Word<T> z_word = Word<T>::load(z, i);
    const Word<T> r_word = kl == Kl::none ? z_word : Word<T>::load(r, i);
#pragma GCC unroll 2
    for (int k = 0; k < Word<T>::kSize; ++k) {
      const float y = z_word.at(k) - m;
      const float p = exp_below_headroom<range>(y);
      const bool p_is_0 = range == Range::any && y < kLog0;  // 0 log 0 = 0, also where y = -inf
      if (keep) e_y[k * words + i] = p;
      s += p;
      a += p * (p_is_0 ? 0 : y);
      top_y = int32_t(bits_of(y)) > top_y ? int32_t(bits_of(y)) : top_y;
      low_y = bits_of(y) > low_y ? bits_of(y) : low_y;
      if (kl == Kl::none) continue;
      const float q = r_word.at(k) - u;
      const float p_ref = exp_below_headroom<range>(q);
      const bool p_ref_is_0 = range == Range::any && q < kLog0;
      if (keep && kl == Kl::ref_policy) e_q[k * words + i] = p_ref;
      t += p_ref;
      // One product of (y - q): separate sums would lose 2 to 3 times the accuracy of the KL.
      if (kl == Kl::policy_ref) {
        const bool no_p_ref = range == Range::any && q == -INFINITY;
        b += p * (p_is_0 || no_p_ref ? 0 : y - q);
        if (range == Range::any) lost = larger(lost, no_p_ref ? y : -INFINITY);
      }
      if (kl == Kl::ref_policy) {
        const bool no_p = range == Range::any && y == -INFINITY;
        b += p_ref * (p_ref_is_0 || no_p ? 0 : q - y);
        if (range == Range::any) lost = larger(lost, no_p ? q : -INFINITY);
      }
      if (kl == Kl::sampled) b += p_ref * (p_ref_is_0 ? 0 : q);  // to see a NaN, like a
      top_q = int32_t(bits_of(q)) > top_q ? int32_t(bits_of(q)) : top_q;
      low_q = bits_of(q) > low_q ? bits_of(q) : low_q;
    }
  }
  return {s, a, t, b, {top_y, low_y}, {top_q, low_q}, lost};
}

// The sums of a block whose exponents are moderate.
template <Kl kl, bool keep, class Z, class R>
Block sum_block(const Z* z, const R* r, int64_t count, float m, float u, const Kept& kept) {
  constexpr Range range = Range::moderate;
  if (keep) {
    *kept.m = m;
    *kept.u = u;
  }
  if constexpr (kSameWords<Z, R>) {
    constexpr int size = Word<Z>::kSize;
    if (count % size == 0) return sum_words<kl, range, keep>(z, r, count / size, m, u, kept);
  }
  FloatBlock<Z> z_block;
  FloatBlock<R> r_block;
  const float* z_float = z_block.of(z, count);
  const float* r_float = kl == Kl::none ? z_float : r_block.of(r, count);
  return sum_words<kl, range, keep>(z_float, r_float, count, m, u, kept);
}

// The running moments of one row, relative to the running maxima m and u. With y = z - m and
// q = r - u:  s = sum e^y,  a = sum e^y y,  t = sum e^q,
// b = sum e^y (y - q) for policy_ref, sum e^q (q - y) for ref_policy, sum e^q q for sampled.
struct Moments {
  float m = -INFINITY, u = -INFINITY;
  double s = 0, a = 0, t = 0, b = 0;
  float low_z = INFINITY,
        low_r = INFINITY;  // the smallest logits; -inf if a block was not moderate
  float lost = -INFINITY;  // the largest logit of which the other one is -inf

  void add(const Block& block) {
    s += block.s;
    a += block.a;
    t += block.t;
    b += block.b;
  }

  // Rescale by e^(old - new), so that every partial sum stays relative to the running maxima.
  template <Kl kl>
  void raise(float new_m, float new_u) {
    if (new_m == m && new_u == u) return;
    const double d = s > 0 ? double(m) - new_m : 0;
    const double k = t > 0 ? double(u) - new_u : 0;
    const double c = ::exp(d);
    if (kl == Kl::policy_ref) b = c * (b + (d - k) * s);
    if (kl == Kl::ref_policy) b = ::exp(k) * (b + (k - d) * t);
    if (kl == Kl::sampled) b = ::exp(k) * (b + k * t);
    a = c * (a + d * s);
    s *= c;
    t *= ::exp(k);
    m = new_m;
    u = new_u;
  }

  // Whether a token that the first distribution holds for possible is impossible in the second.
  template <Kl kl>
  bool infinite() const {
    return lost - (kl == Kl::policy_ref ? m : u) >= kLog0;
  }

  // Of all exponents of the row, relative to the maxima as they are now.
  template <Kl kl>
  Range range() const {
    const bool moderate = low_z - m >= kLog0 && (kl == Kl::none || low_r - u >= kLog0);
    return moderate ? Range::moderate : Range::any;
  }
};

// The maxima come from the first block alone, and then from the blocks already summed: a pass of
// its own for the maximum costs a quarter of the time, and logits rarely rise by kHeadroom later.
//
// `kept` is good for a row that is moderate as a whole: each of its blocks was summed once.
template <Kl kl, bool keep, class Z, class R>
Moments moments(const Z* z_row, const R* r_row, int64_t vocab, const Kept& kept) {
  constexpr bool has_ref = kl != Kl::none;
  // A row that is -inf so far has no maximum to subtract; any finite one will do.
  const auto finite = [](float maximum) { return maximum == -INFINITY ? 0 : maximum; };
  FloatBlock<Z> z_block;
  FloatBlock<R> r_block;
  Moments sum;
  for (int64_t i = 0; i < vocab; i += kBlock) {
    const int64_t count = vocab - i < kBlock ? vocab - i : kBlock;
    const Z* z = z_row + i;
    const R* r = has_ref ? r_row + i : nullptr;  // no arithmetic with a null pointer
    if (i == 0) {
      sum.m = maximum(z_block.of(z, count), count);
      if (has_ref) sum.u = maximum(r_block.of(r, count), count);
    }
    const float m = finite(sum.m), u = finite(sum.u);
    const Block block = sum_block<kl, keep>(z, r, count, m, u, kept.of_block(i));
    const bool known = sum.m == m && (!has_ref || sum.u == u);
    if (known && block.y.moderate() && block.q.moderate()) {
      sum.add(block);
      sum.low_z = smaller(sum.low_z, m + block.y.smallest());
      sum.low_r = smaller(sum.low_r, u + block.q.smallest());
      sum.raise<kl>(m + block.y.largest(), has_ref ? u + block.q.largest() : sum.u);
    } else {
      const float* z_float = z_block.of(z, count);
      const float* r_float = has_ref ? r_block.of(r, count) : z_float;
      sum.low_z = sum.low_r = -INFINITY;
      sum.raise<kl>(larger(sum.m, maximum(z_float, count)),
                    has_ref ? larger(sum.u, maximum(r_float, count)) : sum.u);
      const float top_z = finite(sum.m), top_r = finite(sum.u);
      const Block again =
          sum_words<kl, Range::any, false>(z_float, r_float, count, top_z, top_r, {});
      sum.add(again);
      sum.lost = larger(sum.lost, (kl == Kl::policy_ref ? top_z : top_r) + again.lost);
    }
  }
  if (sum.infinite<kl>()) sum.b += INFINITY;  // no NaN is lost
  return sum;
}

// The gradient of one element, without the label's -weight * nll_coef:
//   policy_ref: e^y (c0 + c1 y + c2 q)      ref_policy: e^y (c0 + c1 y) + c2 e^q
struct Gradient {
  float m, u, c0, c1, c2;
  Range range;

  Gradient(Kl kl, const RowStats& row, double weight, double nll_coef, double kl_coef,
           double entropy_coef)
      : m(row.m), u(row.u), range(row.moderate != 0 ? Range::moderate : Range::any) {
    const double log_s = ::log(double(row.s));
    const double scale = weight / row.s;
    double k0 = nll_coef + entropy_coef * (row.entropy - log_s);
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

  template <Kl kl, Range range>
  float at(float z, float r) const {
    const float y = z - m;
    float factor = c0 + c1 * y;
    if (kl == Kl::policy_ref) factor += c2 * (r - u);
    const bool p_is_0 = range == Range::any && y < kLog0;
    const float own = p_is_0 ? 0 : exp_below_headroom<range>(y) * factor;
    return kl == Kl::ref_policy ? own + c2 * exp_below_headroom<range>(r - u) : own;
  }

  // The same where e^y and e^q are known.
  template <Kl kl>
  float at(float z, float r, float e_y, float e_q) const {
    float factor = c0 + c1 * (z - m);
    if (kl == Kl::policy_ref) factor += c2 * (r - u);
    return kl == Kl::ref_policy ? e_y * factor + c2 * e_q : e_y * factor;
  }

  // For exponentials that are relative to maxima of their own.
  template <Kl kl>
  Gradient relative_to(float own_m, float own_u) const {
    const float of_y = float(::exp(double(own_m) - m));
    const float of_q = kl == Kl::ref_policy ? float(::exp(double(own_u) - u)) : of_y;
    Gradient relative = *this;
    relative.c0 *= of_y;
    relative.c1 *= of_y;
    relative.c2 *= of_q;
    return relative;
  }
};

template <Kl kl, Range range, bool keep, class T>
void gradient_words(const Gradient& gradient, const T* z, const T* r, int64_t words, T* grad,
                    const Kept& kept) {
  // Copies cannot change below the loop's stores.
  const Gradient g = keep ? gradient.relative_to<kl>(*kept.m, *kept.u) : gradient;
  const float* const e_y = kept.e_y;
  const float* const e_q = kept.e_q;
#pragma omp simd
  for (int64_t i = 0; i < words; ++i) {
    const Word<T> z_word = Word<T>::load(z, i);
    const Word<T> r_word = kl == Kl::none ? z_word : Word<T>::load(r, i);
    float values[Word<T>::kSize];
#pragma GCC unroll 2
    for (int k = 0; k < Word<T>::kSize; ++k) {
      const float z_k = z_word.at(k), r_k = r_word.at(k);
      const int64_t at = k * words + i;
      values[k] = keep ? g.at<kl>(z_k, r_k, e_y[at], kl == Kl::ref_policy ? e_q[at] : 0)
                       : g.at<kl, range>(z_k, r_k);
    }
    Word<T>::store(grad, i, values);
  }
}

template <Kl kl, Range range, bool keep, class Z, class R>
void gradient_block(const Gradient& gradient, const Z* z, const R* r, int64_t count, Z* grad,
                    const Kept& kept) {
  if constexpr (kSameWords<Z, R>) {
    constexpr int size = Word<Z>::kSize;
    if (count % size == 0)
      return gradient_words<kl, range, keep>(gradient, z, r, count / size, grad, kept);
  }
  FloatBlock<Z> z_block;
  FloatBlock<R> r_block;
  alignas(64) float values[kBlock];
  const float* z_float = z_block.of(z, count);
  const float* r_float = kl == Kl::none ? z_float : r_block.of(r, count);
  gradient_words<kl, range, keep>(gradient, z_float, r_float, count, values, kept);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(grad[i], values[i]);
}

template <Kl kl, class Z, class R>
void write_gradient(const Gradient& gradient, const Z* z, const R* r, int64_t label,
                    float label_weight, int64_t vocab, int64_t width, Z* grad, const Kept& kept) {
  if (gradient.finite()) {
    // Before the loop, which may overwrite z; in float32, before the rounding to the dtype.
    const float r_label = kl == Kl::none ? 0 : load(r[label]);
    const float at_label = gradient.at<kl, Range::any>(load(z[label]), r_label) - label_weight;
    const auto block = gradient.range == Range::any ? gradient_block<kl, Range::any, false, Z, R>
                       : kept.e_y ? gradient_block<kl, Range::moderate, true, Z, R>
                                  : gradient_block<kl, Range::moderate, false, Z, R>;
    for (int64_t i = 0; i < vocab; i += kBlock) {
      const R* const r_block = kl == Kl::none ? nullptr : r + i;
      const int64_t count = vocab - i < kBlock ? vocab - i : kBlock;
      block(gradient, z + i, r_block, count, grad + i, kept.of_block(i));
    }
    store(grad[label], at_label);
  } else {
    for (int64_t i = 0; i < vocab; ++i) store_nan(grad[i]);
  }
  if (width > vocab) memset(grad + vocab, 0, size_t(width - vocab) * sizeof(Z));
}

// log p[label] - log p_ref[label], from the logits of the label.
double log_ratio(const RowStats& row, float z, float r) {
  return (double(z) - row.m - ::log(double(row.s))) - (double(r) - row.u - ::log(double(row.t)));
}

template <class Z, class R>
void write_gradient_row(const Problem& p, int64_t n, const RowStats& stats, double scale,
                        const Rows& rows, const Kept& kept) {
  const Z* z = row_of<Z>(p.logits, n);
  const R* r = row_of<R>(p.ref, n);
  Z* grad = row_of<Z>(rows, n);
  const double weight = p.weights[n] * scale;
  if (p.weights[n] == 0) {
    memset(grad, 0, size_t(p.width) * sizeof(Z));
    return;
  }
  // Without a coefficient, an infinite KL must not reach the gradient. The sampled KL changes with
  // log p[label] alone: by d = log p[label] - log p_ref[label] times what the nll does, negated.
  Kl kl = p.kl_coef == 0 ? Kl::none : p.kl;
  double nll_coef = 1;
  if (kl == Kl::sampled) {
    nll_coef -= p.kl_coef * log_ratio(stats, load(z[p.labels[n]]), load(r[p.labels[n]]));
    kl = Kl::none;
  }
  const Gradient gradient(kl, stats, weight, nll_coef, p.kl_coef, p.entropy_coef);
  const auto write = kl == Kl::none         ? write_gradient<Kl::none, Z, R>
                     : kl == Kl::policy_ref ? write_gradient<Kl::policy_ref, Z, R>
                                            : write_gradient<Kl::ref_policy, Z, R>;
  write(gradient, z, r, p.labels[n], float(weight * nll_coef), p.vocab, p.width, grad, kept);
}

template <Kl kl, class Z, class R>
RowStats measure_row(const Problem& p, const RowOutputs& out, int64_t n, const Kept& kept) {
  const Z* z = row_of<Z>(p.logits, n);
  const R* r = row_of<R>(p.ref, n);
  const Moments sum =
      kept.e_y ? moments<kl, true>(z, r, p.vocab, kept) : moments<kl, false>(z, r, p.vocab, kept);
  // Of a NaN logit, exp_below_headroom may make a number; a and b, which multiply by it, are NaN.
  const double s = isnan(sum.a) ? NAN : sum.s, t = isnan(sum.b) ? NAN : sum.t;
  const double log_s = ::log(s), log_t = ::log(t);
  const int64_t label = p.labels[n];
  const float moderate = sum.range<kl>() == Range::moderate;
  RowStats stats{sum.m, float(s), sum.u, float(t), 0, 0, moderate};
  double divergence = 0;
  if (kl == Kl::policy_ref) divergence = sum.b / s - log_s + log_t;
  if (kl == Kl::ref_policy) divergence = sum.b / t - log_t + log_s;
  if (kl == Kl::sampled) {
    const double d = log_ratio(stats, load(z[label]), load(r[label]));
    divergence = d * d / 2;
  }
  out.nll[n] = float(double(sum.m) - load(z[label]) + log_s);
  stats.kl = out.kl[n] = float(divergence);
  stats.entropy = out.entropy[n] = float(log_s - sum.a / s);
  return stats;
}

template <class Z, class R>
RowStats forward_row(const Problem& p, const RowOutputs& out, int64_t n, const Kept& kept) {
  if (p.weights[n] == 0) {
    out.nll[n] = out.kl[n] = out.entropy[n] = 0;
    return RowStats{};
  }
  const auto measure = p.kl == Kl::none         ? measure_row<Kl::none, Z, R>
                       : p.kl == Kl::policy_ref ? measure_row<Kl::policy_ref, Z, R>
                       : p.kl == Kl::ref_policy ? measure_row<Kl::ref_policy, Z, R>
                                                : measure_row<Kl::sampled, Z, R>;
  return measure(p, out, n, kept);
}

template <class Z, class R>
void forward_typed(const Problem& p, const RowOutputs& out, const Rows* grad, int64_t n,
                   const Kept& kept) {
  const RowStats stats = forward_row<Z, R>(p, out, n, kept);
  if (out.stats) out.stats[n] = stats;
  if (grad) write_gradient_row<Z, R>(p, n, stats, 1, *grad, kept);
}

template <class Z, class R>
void backward_typed(const Problem& p, const RowStats* stats, double scale, const Rows& grad,
                    int64_t n) {
  write_gradient_row<Z, R>(p, n, stats[n], scale, grad, {});
}

constexpr int64_t kLine = 16;  // floats of 64 bytes

// So many floats that the next array begins with a line, too.
int64_t padded(int64_t floats) { return (floats + kLine - 1) / kLine * kLine; }

int64_t blocks_of(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }

// Call body(Z, R) with values of the element types of policy and reference.
template <class Body>
void with_types(const Problem& p, const Body& body) {
  with_type(p.logits.dtype, [&](auto z) {
    if (!p.ref.data) return body(z, z);
    with_type(p.ref.dtype, [&](auto r) { body(z, r); });
  });
}

}  // namespace

int64_t lines_to_keep(int64_t vocab) {
  return 2 * (padded(vocab) + padded(blocks_of(vocab))) / kLine;
}

void forward_rows(const Problem& p, const RowOutputs& out, const Rows* grad, float* scratch,
                  int64_t begin, int64_t end) {
  Kept kept;
  if (scratch) {
    float* const maxima = scratch + 2 * padded(p.vocab);
    kept = {scratch, scratch + padded(p.vocab), maxima, maxima + padded(blocks_of(p.vocab))};
  }
  with_types(p, [&](auto z, auto r) {
    for (int64_t n = begin; n < end; ++n)
      forward_typed<decltype(z), decltype(r)>(p, out, grad, n, kept);
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
