// One token a row, from rows of logits: no torch, no Python, no intrinsics.
//
// With y_j = sum over streams s of weight_s z_s[j], j < vocab, and y_j = -inf for suppressed
// tokens, row n is drawn from
//
//   p = softmax(y) restricted to its nucleus, the smallest set of most probable tokens whose mass
//       reaches top_p,
//
// or, where nucleus_of is a stream s, to the nucleus of softmax(nucleus_weight z_s) without the
// suppressed tokens, by one uniform number u in [0, 1): the first token up to which, in order of
// the ids, the mass of p exceeds u. A token is in the nucleus if the tokens strictly more probable
// hold less than top_p. One that is not has to be drawn again, with a new u: exact, without a sort
// of the vocabulary. A stream's nucleus is found first, and every draw is in it. On request the
// draw comes with
//
//   log p(token) = y_token - log(sum of e^y_j over the nucleus),
//
// whose nucleus is found by bisection.
// A temperature divides the weights. Log-probabilities in place of logits would give the same p:
// they differ by a constant in each row.
//
// Promises
// - The token never has a probability of 0 (in float32: below e^-87 of the largest).
// - NaN or +inf in a row, or nothing but -inf, in any stream or in y: its token is -1.
// - Each y and its exponential is a float; a row's sums are kept in double between blocks of 256.
//   What is drawn depends on the row and u alone, not on the number of threads.
// - Nothing is read or written before sizes, strides, addresses, ids and uniform numbers are
// checked
//   against each other and against the end of the logits' memory; what does not fit throws
//   std::invalid_argument, which names the value.
// - log p is computed in double from these floats. It and a stream's nucleus take further passes
//   over a row in the thread's memory: at most 31, and no more than there are different y.
// - Time O(streams * vocab) for each draw; memory of vocab floats for each thread, twice that with
//   a stream's nucleus.
#pragma once

#include <cstdint>

#include "rows.hpp"

namespace quark {

struct Distribution {
  Rows logits;           // (streams * rows, >= vocab): all rows of the first stream, then the next
  const float* weights;  // (streams,), finite
  int64_t streams, rows, vocab;
  const int64_t* suppressed;  // (suppressed_count,), in [0, vocab)
  int64_t suppressed_count;
  double top_p;          // above 0; from 1 on the nucleus is the whole vocabulary
  int64_t nucleus_of;    // the stream whose nucleus it is, in [0, streams); -1: that of p
  float nucleus_weight;  // finite, above 0

  bool of_stream() const { return nucleus_of >= 0 && top_p < 1; }
};

// The caller vouches for the sizes.
struct Draws {
  int64_t count;
  const int64_t* rows;   // (count,) of which row each is, in [0, rows)
  const float* uniform;  // (count,) in [0, 1); nullptr: the lowest id of the largest y
  int64_t* tokens;       // (count,)
  bool* inside;          // (count,) whether the token is in the nucleus
  float* log_p;          // (count,) 0 without uniform numbers, NaN if it is not in the nucleus or
                         // there is none; nullptr: not asked for
};

// What a thread computes in.
struct Workspace {
  float* row;      // (vocab,) y, then e^(y - max y)
  float* nucleus;  // (vocab,) the same of the stream whose nucleus it is; nullptr without one
  double* blocks;  // (blocks_of(vocab),) its sums
};

// Sums of a row are of so many columns each.
constexpr int64_t kSummedColumns = 256;
constexpr int64_t blocks_of(int64_t vocab) { return (vocab - 1) / kSummedColumns + 1; }

// Returns whether every row had a token.
bool sample_tokens(const Distribution& from, const Draws& draws, int threads);

}  // namespace quark
