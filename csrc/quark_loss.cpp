// The loss's checks, and the sum of its rows.

#include "quark_loss.hpp"

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "levels.hpp"
#include "threads.hpp"

namespace quark {

// `scratch`: null, or lines_to_keep(vocab) lines, in which a row's exponentials wait for its
// gradient.
QUARK_DECLARE_AT_LEVELS(void forward_rows(const Problem&, const RowOutputs&, const Rows*,
                                          float* scratch, int64_t, int64_t);
                        int64_t lines_to_keep(int64_t vocab);
                        void backward_rows(const Problem&, const RowStats*, double, const Rows&,
                                           int64_t, int64_t);)

namespace {

// Aligned: a vector across two cache lines is written in two steps.
struct alignas(64) Line {
  float columns[16];
};

void check(const Problem& p) {
  int64_t size;
  require(p.rows >= 0 && p.vocab >= 1 && p.vocab <= p.width &&
              !__builtin_mul_overflow(p.rows, p.width, &size),
          std::to_string(p.rows) + " rows of " + std::to_string(p.width) + " for a vocabulary of " +
              std::to_string(p.vocab) + " cannot be");
  require_within_memory("logits", p.logits, p.rows, p.width);
  if (p.kl != Kl::none) require_within_memory("ref_logits", p.ref, p.rows, p.vocab);
  if (p.rows == 0) return;
  require(p.labels && p.weights && is_aligned(p.labels, sizeof(int64_t)) &&
              is_aligned(p.weights, sizeof(float)),
          "labels or weights have no memory, or not at a multiple of their elements' size");
  for (int64_t n = 0; n < p.rows; ++n) {
    if (p.weights[n] == 0) continue;
    if (!std::isfinite(p.weights[n]))
      throw std::invalid_argument(
          "the weight of token " + std::to_string(n) +
          " (flattened) is not finite: the mask, or normalizer, is at fault");
    if (p.labels[n] < 0 || p.labels[n] >= p.vocab)
      throw std::invalid_argument(
          "labels[" + std::to_string(n) + "] = " + std::to_string(p.labels[n]) +
          " (flattened) is outside the base vocabulary [0, " + std::to_string(p.vocab) +
          ") but not masked; mask it, e.g. mask = labels != -100");
  }
}

// Where a gradient may be written: no row reaches into another, which a thread may be at.
void check_gradient(const Problem& p, const Rows& grad) {
  require_within_memory("the gradient", grad, p.rows, p.width);
  require(grad.dtype == p.logits.dtype, "the gradient is not of the dtype of the logits");
  if (p.rows == 0) return;
  const int64_t outer = p.rows / grad.inner;
  const bool inner_apart = grad.inner == 1 || grad.inner_stride >= p.width;
  const bool outer_apart = outer == 1 || grad.outer_stride >= p.width;
  const bool nested = outer == 1 || grad.inner == 1 ||
                      grad.outer_stride >= (grad.inner - 1) * grad.inner_stride + p.width ||
                      grad.inner_stride >= (outer - 1) * grad.outer_stride + p.width;
  require(inner_apart && outer_apart && nested, "the rows of the gradient overlap");
}

}  // namespace

double forward(const Problem& p, const RowOutputs& out, const Rows* grad, int threads) {
  check(p);
  if (grad) check_gradient(p, *grad);
  require(p.rows == 0 || (out.nll && out.kl && out.entropy), "the outputs have no memory");
  const auto rows = QUARK_AT_LEVEL(forward_rows);
  const int64_t each = QUARK_AT_LEVEL(lines_to_keep)(p.vocab);
  // Allocated here, where it may throw; not set to 0, as a vector would be.
  const std::unique_ptr<Line[]> scratch(
      grad ? new Line[static_cast<size_t>(useful_threads(p.rows, p.width, threads) * each)]
           : nullptr);
  over_rows(p.rows, p.width, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    rows(p, out, grad, scratch ? scratch[thread * each].columns : nullptr, begin, end);
  });
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
  check(p);
  check_gradient(p, grad);
  require(p.rows == 0 || stats, "the statistics have no memory");
  const auto rows = QUARK_AT_LEVEL(backward_rows);
  over_rows(p.rows, p.width, threads,
            [&](int64_t, int64_t begin, int64_t end) { rows(p, stats, scale, grad, begin, end); });
}

}  // namespace quark
