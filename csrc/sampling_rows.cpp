// Tokens of rows, compiled once per instruction-set level; see row_math.hpp for what that forbids.
// sampling.cpp chooses among them at run time.
//
// A row's logits are read once, and all else happens in the thread's own memory, which for the
// vocabularies of today stays in the second-level cache: the mix of the streams and its maximum,
// the exponentials with a sum for each block, then the walk to the token, over the blocks' sums and
// within one block.

#include "row_math.hpp"
#include "sampling.hpp"

namespace quark::QUARK_LEVEL {

namespace {

// Columns mixed at a time: the sum over the streams stays in the first-level cache.
constexpr int64_t kMixedColumns = 2048;

inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

struct Mixed {
  float largest;
  Extremes extremes;  // of the logits and of y
};

// y = weight z for the first stream, y += weight z for the others.
template <bool first, class T>
Mixed mix(const T* z, float weight, int64_t count, float* y) {
  float largest = -INFINITY;
  int32_t top = 0;
  uint32_t low = 0;
#pragma omp simd reduction(max : largest, top, low)
  for (int64_t j = 0; j < count; ++j) {
    const float logit = load(z[j]);
    const float sum = first ? weight * logit : y[j] + weight * logit;
    y[j] = sum;
    largest = sum > largest ? sum : largest;
    // A NaN shows in y, too; +inf might be -inf there, or be lost in it.
    top = int32_t(bits_of(logit)) > top ? int32_t(bits_of(logit)) : top;
    top = int32_t(bits_of(sum)) > top ? int32_t(bits_of(sum)) : top;
    low = bits_of(sum) > low ? bits_of(sum) : low;
  }
  return {largest, {top, low}};
}

// Writes y of row n; returns its maximum, or NaN if the row has no token.
template <class T>
float mix_row(const Distribution& from, int64_t n, float* y) {
  float m = -INFINITY;
  bool sound = true;
  for (int64_t j = 0; j < from.vocab; j += kMixedColumns) {
    const int64_t count = smaller(kMixedColumns, from.vocab - j);
    Mixed mixed{};
    for (int64_t s = 0; s < from.streams; ++s) {
      const T* const z = row_of<T>(from.logits, s * from.rows + n) + j;
      mixed = s == 0 ? mix<true>(z, from.weights[s], count, y + j)
                     : mix<false>(z, from.weights[s], count, y + j);
      sound = sound && !mixed.extremes.nan_or_inf();
    }
    m = mixed.largest > m ? mixed.largest : m;
  }
  bool suppressed_largest = false;
  for (int64_t i = 0; i < from.suppressed_count; ++i) {
    float& value = y[from.suppressed[i]];
    suppressed_largest = suppressed_largest || value == m;
    value = -INFINITY;
  }
  if (suppressed_largest) m = maximum(y, from.vocab);
  return sound && m > -INFINITY ? m : NAN;
}

int64_t first_equal(const float* y, int64_t vocab, float m) {
  int64_t j = 0;
  while (vocab - j > kMixedColumns && maximum(y + j, kMixedColumns) != m) j += kMixedColumns;
  while (y[j] != m) ++j;
  return j;
}

// e^(y - m) in place; returns the sum.
float exponentials(float* y, int64_t count, float m) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    const float e = exp_below_headroom<Range::any>(y[j] - m);
    y[j] = e;
    sum += e;
  }
  return sum;
}

float sum_above(const float* e, int64_t count, float limit) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += e[j] > limit ? e[j] : 0;
  return sum;
}

// e on either side of a limit: the sum of those above it and their lowest, the highest of the rest.
struct Split {
  double above;
  float next, last;
};

void split_block(const float* e, int64_t count, float limit, Split* split) {
  float sum = 0, next = split->next, last = split->last;
#pragma omp simd reduction(+ : sum) reduction(min : next) reduction(max : last)
  for (int64_t j = 0; j < count; ++j) {
    const bool above = e[j] > limit;
    const float candidate = above ? e[j] : INFINITY, rest = above ? 0 : e[j];
    sum += above ? e[j] : 0;
    next = candidate < next ? candidate : next;
    last = rest > last ? rest : last;
  }
  *split = {split->above + sum, next, last};
}

// The most probable tokens: the lowest e among them, and their mass.
struct Nucleus {
  float lowest;
  double mass;
};

// The exponentials of a row and the sums of its blocks.
struct Masses {
  const float* e;
  const double* blocks;
  int64_t vocab;
  double total;

  int64_t columns_of(int64_t block) const {
    return smaller(kSummedColumns, vocab - block * kSummedColumns);
  }

  // The first token up to which the mass exceeds the target, which is below the total.
  int64_t token_at(double target) const {
    double before = 0;
    int64_t block = 0;
    // Ends: over all blocks this is the sum that gave the total.
    while (before + blocks[block] <= target) before += blocks[block++];
    const int64_t begin = block * kSummedColumns, end = begin + columns_of(block);
    int64_t token = begin;
    for (int64_t j = begin; j < end && before <= target; ++j) {
      before += e[j];
      // A block's own sum is rounded: at its end, the target may still be above. Then it is the
      // last token with a mass.
      if (e[j] > 0) token = j;
    }
    return token;
  }

  double above(float limit) const {
    double sum = 0;
    for (int64_t block = 0; block * kSummedColumns < vocab; ++block) {
      // None is above the limit if even the sum is not: rounding leaves it at least the largest.
      if (blocks[block] > limit)
        sum += sum_above(e + block * kSummedColumns, columns_of(block), limit);
    }
    return sum;
  }

  // `low` is one of the e, or 0: blocks whose every e is below it are left out.
  Split split_at(float limit, float low) const {
    Split split{0, INFINITY, low};
    for (int64_t block = 0; block * kSummedColumns < vocab; ++block) {
      if (blocks[block] >= low)
        split_block(e + block * kSummedColumns, columns_of(block), limit, &split);
    }
    return split;
  }

  // All tokens above each of which there is less than `least`; e `inside` is one of theirs.
  // Bisects the bits of e, which rise as positive floats do, for the lowest of these.
  Nucleus nucleus(double least, float inside) const {
    uint32_t low = 0, high = bits_of(inside);
    double reached = total;  // from low on
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      // Each end moves to an e that is there: no more halvings than there are different ones.
      const Split split = split_at(float_of(middle), float_of(low));
      if (split.above >= least) {
        low = bits_of(split.next);
        reached = split.above;
      } else {
        high = bits_of(split.last);
      }
    }
    return {float_of(high), reached};
  }
};

// e^(y - m) in place, and the sums of its blocks.
Masses masses(float* y, double* blocks, int64_t vocab, float m) {
  double total = 0;
  for (int64_t block = 0; block * kSummedColumns < vocab; ++block) {
    const int64_t begin = block * kSummedColumns;
    blocks[block] = exponentials(y + begin, smaller(kSummedColumns, vocab - begin), m);
    total += blocks[block];
  }
  return {y, blocks, vocab, total};
}

// y = -inf where e is below the lowest; returns the maximum of the others.
float keep_from(const float* e, float lowest, int64_t vocab, float* y) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < vocab; ++j) {
    const float kept = e[j] < lowest ? -INFINITY : y[j];
    y[j] = kept;
    largest = kept > largest ? kept : largest;
  }
  return largest;
}

// Keeps the y of row n that are in the nucleus of a stream; returns their maximum, or NaN if there
// is none.
template <class T>
float keep_nucleus_of_stream(const Distribution& from, int64_t n, const Workspace& work) {
  Distribution alone = from;
  alone.weights = &from.nucleus_weight;
  alone.streams = 1;
  const float top = mix_row<T>(alone, from.nucleus_of * from.rows + n, work.nucleus);
  if (isnan(top)) return NAN;
  const Masses mass = masses(work.nucleus, work.blocks, from.vocab, top);
  const float lowest = mass.nucleus(from.top_p * mass.total, 1).lowest;  // 1 is e of the largest
  const float m = keep_from(mass.e, lowest, from.vocab, work.row);
  return m > -INFINITY ? m : NAN;
}

template <class T>
void sample_row(const Distribution& from, const Draws& draws, const Workspace& work, int64_t i) {
  float m = mix_row<T>(from, draws.rows[i], work.row);
  if (draws.uniform && from.of_stream() && !isnan(m))
    m = keep_nucleus_of_stream<T>(from, draws.rows[i], work);
  draws.inside[i] = true;
  if (draws.log_p) draws.log_p[i] = NAN;
  if (isnan(m)) {
    draws.tokens[i] = -1;
    return;
  }
  if (!draws.uniform) {
    draws.tokens[i] = first_equal(work.row, from.vocab, m);
    if (draws.log_p) draws.log_p[i] = 0;
    return;
  }
  const Masses mass = masses(work.row, work.blocks, from.vocab, m);
  const int64_t token = mass.token_at(draws.uniform[i] * mass.total);
  draws.tokens[i] = token;
  const double least = from.top_p * mass.total;
  const bool of_mix = from.top_p < 1 && !from.of_stream();
  if (of_mix) draws.inside[i] = mass.above(mass.e[token]) < least;
  if (draws.log_p && draws.inside[i]) {
    const double whole = of_mix ? mass.nucleus(least, mass.e[token]).mass : mass.total;
    draws.log_p[i] = float(log(double(mass.e[token]) / whole));
  }
}

}  // namespace

void sample_rows(const Distribution& from, const Draws& draws, const Workspace& work, int64_t begin,
                 int64_t end) {
  with_type(from.logits.dtype, [&](auto z) {
    for (int64_t i = begin; i < end; ++i) sample_row<decltype(z)>(from, draws, work, i);
  });
}

}  // namespace quark::QUARK_LEVEL
