// The fused Quark loss over rows of logits: no torch, no Python, no intrinsics.
//
// With p = softmax(z) and p_ref = softmax(r) over the first `vocab` columns, row n contributes
//
//   weight_n (nll_n + kl_coef KL_n - entropy_coef H_n)
//   nll = -log p[label]     H = -sum p log p
//   KL  = sum p log(p / p_ref)  (policy_ref)   or   sum p_ref log(p_ref / p)  (ref_policy)
//         or  (log p[label] - log p_ref[label])^2 / 2  (sampled)
//
// and d/dz of that sum is the gradient. Columns of z from `vocab` to `width` (reward tokens,
// padding) belong to no term; their gradient is exactly zero.
//
// Promises, for every function here:
// - Rows of weight 0 are masked: neither their logits nor their label is read; nll, KL, H and
//   gradient are 0, so that a NaN there cannot spread.
// - -inf logits are probability 0. A KL is +inf where the second distribution is 0 and the first
//   is not (in float32: above e^-87 of its maximum).
// - NaN or +inf in a row of weight != 0 gives NaN in that row and in the loss. The gradient of a
//   row whose KL or entropy is not finite is NaN in all of the first `vocab` columns.
// - Nothing is read or written before sizes, strides, addresses, weights and labels are checked
//   against each other and against the ends of memory that the caller names; what does not fit
//   throws std::invalid_argument, which names the value.
// - Sums over a row are kept in double between blocks of a few thousand columns; the result does
//   not depend on the number of threads.
// - Time O(rows * width). Where forward writes a gradient, each thread holds 8 bytes a column
//   meanwhile, and std::bad_alloc says that there is no memory for it; no other memory is allocated
//   that grows with the input.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.hpp"

namespace quark {

enum class Kl { none, policy_ref, ref_policy, sampled };

// What backward needs of a row: s = sum e^(z - m) with m about max z, t = sum e^(r - u) with u
// about max r, and whether no z - m and r - u is so far below 0 that its exponential counts as 0 (1
// or 0).
struct RowStats {
  float m, s, u, t, kl, entropy, moderate;
};

struct Problem {
  Rows logits;            // (rows, width)
  Rows ref;               // (rows, >= vocab); data == nullptr only with Kl::none
  const int64_t* labels;  // (rows,), in [0, vocab) where the weight is not 0
  const float* weights;   // (rows,), finite
  int64_t rows, vocab, width;
  Kl kl;
  double kl_coef, entropy_coef;
};

// Per row, each (rows,); the caller vouches for these sizes, and for those of labels and weights.
// `stats` may be null when no backward follows.
struct RowOutputs {
  float* nll;
  float* kl;
  float* entropy;
  RowStats* stats;
};

// Returns the loss. With `grad`, also writes its gradient: (rows, width) in the dtype of the
// logits, which it may be itself (in place); each row is written while it is still in the cache.
// Of `grad` the rows must not overlap.
double forward(const Problem& problem, const RowOutputs& out, const Rows* grad, int threads);

// The gradient of scale * loss from the statistics of a former forward, for dtypes in which an
// unscaled gradient would underflow. `grad` may be the logits.
void backward(const Problem& problem, const RowStats* stats, double scale, const Rows& grad,
              int threads);

}  // namespace quark
