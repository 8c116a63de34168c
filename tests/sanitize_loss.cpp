// The loss's core on hostile input: random problems whose memory ends where a page that nobody may
// touch begins, against the equation in double; then the same with a number changed, which must be
// refused or still be right. Built and run by sanitize_loss.sh; aborts at the first thing that is
// wrong. usage: sanitize_loss [problems] [seed]

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../csrc/levels.hpp"
#include "../csrc/quark_loss.hpp"
#include "guarded_rows.hpp"

using quark::DType;
using quark::Kl;
using quark::Problem;
using quark::RowOutputs;
using quark::Rows;
using quark::RowStats;

namespace {

struct Expected {
  double nll, kl, entropy;
};

// In double. NaN where anything that counts is NaN or +inf.
Expected equation(const Problem& p, int64_t n) {
  const int64_t z0 = place(p.logits, n), r0 = p.kl == Kl::none ? 0 : place(p.ref, n);
  const auto z = [&](int64_t i) { return value_of(p.logits.data, z0 + i, p.logits.dtype); };
  const auto r = [&](int64_t i) { return value_of(p.ref.data, r0 + i, p.ref.dtype); };
  const auto log_sum = [&](auto x) {
    double m = -INFINITY, s = 0;
    for (int64_t i = 0; i < p.vocab; ++i) {
      if (std::isnan(x(i)) || x(i) == INFINITY) return double{NAN};
      m = std::max(m, x(i));
    }
    if (m == -INFINITY) return double{NAN};
    for (int64_t i = 0; i < p.vocab; ++i) s += std::exp(x(i) - m);
    return m + std::log(s);
  };
  const double log_z = log_sum(z);
  const double log_r = p.kl == Kl::none ? 0 : log_sum(r);
  if (std::isnan(log_z) || std::isnan(log_r)) return {NAN, NAN, NAN};
  Expected e{log_z - z(p.labels[n]), 0, 0};
  for (int64_t i = 0; i < p.vocab; ++i) {
    const double log_p = z(i) - log_z, prob = std::exp(log_p);
    if (prob > 0) e.entropy -= prob * log_p;
    if (p.kl == Kl::policy_ref && prob > 0) e.kl += prob * (log_p - (r(i) - log_r));
    const double ref = p.kl == Kl::none ? 0 : std::exp(r(i) - log_r);
    if (p.kl == Kl::ref_policy && ref > 0) e.kl += ref * ((r(i) - log_r) - log_p);
  }
  if (p.kl == Kl::sampled) {
    const double d = (z(p.labels[n]) - log_z) - (r(p.labels[n]) - log_r);
    e.kl = d * d / 2;
  }
  return e;
}

bool near(double value, double expected, double scale) {
  return std::abs(value - expected) <= 2e-5 * (1 + std::abs(expected)) + 2e-6 * scale;
}

// Moderate rows against the equation; of others, that a NaN is not hidden and that there is one
// only where the equation has one or an infinity.
void compare(const Problem& p, const RowOutputs& out, const Rows* grad) {
  for (int64_t n = 0; n < p.rows; ++n) {
    double largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < p.vocab; ++i) {
      const double z = value_of(p.logits.data, place(p.logits, n) + i, p.logits.dtype);
      const double r =
          p.kl == Kl::none ? 0 : value_of(p.ref.data, place(p.ref, n) + i, p.ref.dtype);
      finite = finite && std::isfinite(z) && std::isfinite(r);
      largest = std::max({largest, std::abs(z), std::abs(r)});
    }
    if (p.weights[n] == 0) {
      require(out.nll[n] == 0 && out.kl[n] == 0 && out.entropy[n] == 0, "a masked row counts");
      continue;
    }
    const Expected e = equation(p, n);
    if (std::isnan(e.nll)) {
      require(std::isnan(out.nll[n]) || std::isnan(out.entropy[n]) || std::isnan(out.kl[n]),
              "a NaN is hidden");
      continue;
    }
    if (!finite || largest > 1e4) continue;
    const double scale = p.kl == Kl::sampled ? largest * largest : largest;
    require(near(out.nll[n], e.nll, largest), "nll");
    require(near(out.entropy[n], e.entropy, largest), "entropy");
    require(near(out.kl[n], e.kl, scale), "kl");
    if (!grad || grad->dtype != DType::f32) continue;
    // d/dz of a softmax sums to 0, whatever the terms.
    double sum = 0, absolute = 0;
    for (int64_t i = 0; i < p.width; ++i) {
      const double g = value_of(grad->data, place(*grad, n) + i, grad->dtype);
      require(i < p.vocab || g == 0, "a column beyond the vocabulary has a gradient");
      sum += g;
      absolute += std::abs(g);
    }
    require(std::abs(sum) <= 1e-4 * (1 + absolute) * (1 + largest), "the gradient's sum");
  }
}

void one_problem(bool hostile) {
  const int64_t edges[] = {1, 2, 3, 7, 16, 33, 2047, 2048, 2049, 4096, 4097};
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
  const Kl kls[] = {Kl::none, Kl::policy_ref, Kl::ref_policy, Kl::sampled};
  const int64_t rows = below(8), vocab = below(3) ? edges[below(11)] : 1 + below(300);
  const int64_t width = vocab + (below(2) ? below(6) : 0), ref_width = vocab + below(3);
  Problem p{};
  p.rows = rows;
  p.vocab = vocab;
  p.width = width;
  p.kl = kls[below(4)];
  p.kl_coef = below(3) ? 0.5 : 0;
  p.entropy_coef = below(2) ? 0.3 : -0.1;
  const DType dtype = dtypes[below(3)], ref_dtype = below(2) ? dtype : dtypes[below(3)];
  const int kind = static_cast<int>(below(6));

  const Layout layout = layout_of(rows, width), ref_layout = layout_of(rows, ref_width);
  const Guarded logits(static_cast<size_t>(layout.elements) * size_of(dtype));
  const Guarded ref(static_cast<size_t>(ref_layout.elements) * size_of(ref_dtype));
  fill(logits, layout, dtype, kind);
  fill(ref, ref_layout, ref_dtype, kind);
  const auto rows_of = [](const Guarded& memory, DType type, const Layout& l) {
    return Rows{memory.as<void>(), type, l.inner, l.outer_stride, l.inner_stride, l.elements};
  };
  p.logits = rows_of(logits, dtype, layout);
  p.ref = p.kl == Kl::none ? Rows{nullptr, DType::f32, 1, 0, 0, 0}
                           : rows_of(ref, ref_dtype, ref_layout);

  const auto count = static_cast<size_t>(rows);
  const Guarded labels(count * sizeof(int64_t)), weights(count * sizeof(float));
  for (int64_t n = 0; n < rows; ++n) {
    const bool masked = below(4) == 0;
    weights.as<float>()[n] = masked ? 0.f : static_cast<float>(1 + below(4)) / 4;
    labels.as<int64_t>()[n] = masked ? static_cast<int64_t>(random_bits()) : below(vocab);
  }
  p.labels = labels.as<int64_t>();
  p.weights = weights.as<float>();

  const Guarded nll(count * 4), kl(count * 4), entropy(count * 4), stats(count * sizeof(RowStats));
  const RowOutputs out{nll.as<float>(), kl.as<float>(), entropy.as<float>(), stats.as<RowStats>()};
  const Layout grad_layout = layout_of(rows, width);
  const Guarded grad_memory(static_cast<size_t>(grad_layout.elements) * size_of(dtype));
  Rows grad = rows_of(grad_memory, dtype, grad_layout);
  const bool in_place = below(3) == 0;
  if (in_place) grad = p.logits;

  // What is written elsewhere, or in place once more, has the values to compare before it is
  // overwritten.
  const int threads = 1 + static_cast<int>(below(3));
  if (hostile) {
    // The memory's true size stays: whoever lies about that cannot be helped.
    int64_t* const numbers[] = {&p.logits.inner,
                                &p.logits.outer_stride,
                                &p.logits.inner_stride,
                                &p.ref.inner,
                                &p.ref.outer_stride,
                                &p.ref.inner_stride,
                                &p.vocab,
                                &p.width,
                                &grad.inner,
                                &grad.outer_stride,
                                &grad.inner_stride};
    switch (below(6)) {
      case 0:
        if (rows > 0) change(labels.as<int64_t>()[below(rows)]);
        break;
      case 1:
        if (rows > 0) weights.as<float>()[below(rows)] = below(2) ? NAN : INFINITY;
        break;
      case 2:
        (below(2) ? p.logits.data : p.ref.data) = nullptr;
        break;
      case 3:
        grad.dtype = dtypes[below(3)];
        if (grad.dtype == DType::f32 && dtype != DType::f32) grad.elements /= 2;
        break;
      default:
        change(*numbers[below(11)]);
    }
    if (p.rows > 0 && p.kl == Kl::none) p.ref.data = nullptr;
  }
  try {
    quark::forward(p, out, nullptr, threads);
    compare(p, out, nullptr);
    const double loss = quark::forward(p, out, in_place ? nullptr : &grad, threads);
    if (!in_place) compare(p, out, &grad);
    quark::backward(p, out.stats, below(2) ? 1.0 : 65536.0, grad, threads);
    bool clean = true;
    for (int64_t n = 0; n < rows; ++n) {
      clean = clean && std::isfinite(out.nll[n]) && std::isfinite(out.kl[n]) &&
              std::isfinite(out.entropy[n]);
    }
    require(!clean || std::isfinite(loss), "a finite sum is not finite");
  } catch (const std::invalid_argument&) {
    require(hostile, "a sound problem is refused");
  }
}

constexpr const char* kDriver = "sanitize_loss";

}  // namespace

#include "driver.hpp"
