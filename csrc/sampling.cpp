// The checks of sampling, and its threads.

#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "levels.hpp"
#include "threads.hpp"

namespace quark {

QUARK_DECLARE_AT_LEVELS(void sample_rows(const Distribution&, const Draws&, const Workspace&,
                                         int64_t, int64_t);)

namespace {

// Aligned: a vector across two cache lines is written in two steps.
struct alignas(64) Block {
  float columns[kSummedColumns];
};

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t end) {
  require(count >= 0 && (count == 0 || (ids && is_aligned(ids, sizeof(int64_t)))),
          std::string(name) + " has no memory, or not at a multiple of its elements' size");
  for (int64_t i = 0; i < count; ++i) {
    require(ids[i] >= 0 && ids[i] < end, std::string(name) + "[" + std::to_string(i) +
                                             "] = " + std::to_string(ids[i]) + " is outside [0, " +
                                             std::to_string(end) + ")");
  }
}

void check(const Distribution& from) {
  int64_t rows = 0;
  require(from.rows >= 0 && from.streams >= 1 && from.vocab >= 1 &&
              !__builtin_mul_overflow(from.streams, from.rows, &rows),
          std::to_string(from.streams) + " streams of " + std::to_string(from.rows) +
              " rows for a vocabulary of " + std::to_string(from.vocab) + " cannot be");
  require_within_memory("logits", from.logits, rows, from.vocab);
  require(from.weights && is_aligned(from.weights, sizeof(float)),
          "weights has no memory, or not at a multiple of its elements' size");
  for (int64_t s = 0; s < from.streams; ++s) {
    require(std::isfinite(from.weights[s]),
            "the weight of stream " + std::to_string(s) + " is not finite");
  }
  require(from.top_p > 0, "top_p = " + std::to_string(from.top_p) + " is not above 0");
  require(from.nucleus_of >= -1 && from.nucleus_of < from.streams,
          "nucleus_of = " + std::to_string(from.nucleus_of) + " is none of " +
              std::to_string(from.streams) + " streams, nor -1");
  require(
      std::isfinite(from.nucleus_weight) && from.nucleus_weight > 0,
      "nucleus_weight = " + std::to_string(from.nucleus_weight) + " is not above 0, or not finite");
  check_ids("suppressed", from.suppressed, from.suppressed_count, from.vocab);
}

// Returns the elements that all draws read.
int64_t check(const Distribution& from, const Draws& draws) {
  int64_t width = 0, elements = 0;
  require(!__builtin_mul_overflow(from.streams, from.vocab, &width) &&
              !__builtin_mul_overflow(width, draws.count, &elements),
          std::to_string(draws.count) + " draws from " + std::to_string(from.streams) +
              " streams of " + std::to_string(from.vocab) + " columns cannot be");
  check_ids("rows", draws.rows, draws.count, from.rows);
  if (draws.count == 0) return 0;
  require(draws.tokens && is_aligned(draws.tokens, sizeof(int64_t)) && draws.inside,
          "the outputs have no memory, or not at a multiple of their elements' size");
  require(is_aligned(draws.log_p, sizeof(float)),
          "log_p does not lie at a multiple of its elements' size");
  if (!draws.uniform) return elements;
  require(is_aligned(draws.uniform, sizeof(float)),
          "the uniform numbers do not lie at a multiple of their size");
  for (int64_t i = 0; i < draws.count; ++i) {
    require(draws.uniform[i] >= 0 && draws.uniform[i] < 1,
            "uniform[" + std::to_string(i) + "] = " + std::to_string(draws.uniform[i]) +
                " is outside [0, 1)");
  }
  return elements;
}

}  // namespace

bool sample_tokens(const Distribution& from, const Draws& draws, int threads) {
  check(from);
  if (check(from, draws) == 0) return true;
  const auto rows = QUARK_AT_LEVEL(sample_rows);
  const int64_t width = from.streams * from.vocab;
  // Allocated here, where it may throw.
  const auto used = static_cast<size_t>(useful_threads(draws.count, width, threads));
  const auto blocks = static_cast<size_t>(blocks_of(from.vocab));
  const size_t each = blocks * (from.of_stream() ? 2 : 1);
  std::vector<Block> row(used * each);
  std::vector<double> sums(used * blocks);
  over_rows(draws.count, width, threads, [&](int64_t thread, int64_t begin, int64_t end) {
    const size_t of = static_cast<size_t>(thread), first = of * each;
    float* const nucleus = from.of_stream() ? row[first + blocks].columns : nullptr;
    rows(from, draws, Workspace{row[first].columns, nucleus, &sums[of * blocks]}, begin, end);
  });
  return std::none_of(draws.tokens, draws.tokens + draws.count, [](int64_t t) { return t < 0; });
}

}  // namespace quark
