// The core of sampling on hostile input: random rows whose memory ends where a page that nobody may
// touch begins, against the equation in double; then the same with a number changed, which must be
// refused or still be right. Built and run by sanitize_loss.sh; aborts at the first thing that is
// wrong. usage: sanitize_sampling [problems] [seed]

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "../csrc/levels.hpp"
#include "../csrc/sampling.hpp"
#include "guarded_rows.hpp"

using quark::Distribution;
using quark::Draws;
using quark::DType;

namespace {

// y of a row in double, and the largest |weight z| in it.
struct Scores {
  std::vector<double> y;
  double scale = 0;
  bool none = false;  // there is no token
};

Scores equation(const Distribution& from, int64_t n) {
  Scores scores;
  double largest = -INFINITY;
  for (int64_t j = 0; j < from.vocab; ++j) {
    double sum = 0;
    for (int64_t s = 0; s < from.streams; ++s) {
      const int64_t at = place(from.logits, s * from.rows + n) + j;
      const double z = value_of(from.logits.data, at, from.logits.dtype);
      const double term = from.weights[s] * z;
      if (std::isnan(z) || z == INFINITY) scores.none = true;
      if (std::isfinite(term)) scores.scale = std::max(scores.scale, std::abs(term));
      sum += term;
    }
    if (std::isnan(sum) || sum == INFINITY) scores.none = true;
    scores.y.push_back(sum);
  }
  for (int64_t i = 0; i < from.suppressed_count; ++i) {
    scores.y[static_cast<size_t>(from.suppressed[i])] = -INFINITY;
  }
  for (const double y : scores.y) largest = std::max(largest, y);
  scores.none = scores.none || largest == -INFINITY;
  return scores;
}

// Leaves in a row's scores the nucleus of a stream. Returns false where rounding may decide who is
// in it; then only a token that surely is not is wrong.
bool keep_nucleus_of_stream(const Distribution& from, const Draws& draws, int64_t i, double near,
                            Scores* scores) {
  Distribution alone = from;
  alone.weights = &from.nucleus_weight;
  alone.streams = 1;
  const std::vector<double> x = equation(alone, from.nucleus_of * from.rows + draws.rows[i]).y;
  const double largest = *std::max_element(x.begin(), x.end());
  double total = 0;
  for (const double one : x) total += std::exp(one - largest);
  const auto above = [&](double limit) {
    double sum = 0;
    for (const double one : x) sum += one > limit ? std::exp(one - largest) : 0;
    return sum / total;
  };
  bool certain = true;
  for (size_t j = 0; j < x.size(); ++j) {
    const double own = std::exp(x[j] - largest) / total;
    const bool may = x[j] > -INFINITY && above(x[j] + near) < from.top_p + near;
    const bool surely = may && above(x[j] - near) - own < from.top_p - near;
    certain = certain && may == surely;
    if (may) continue;
    require(static_cast<int64_t>(j) != draws.tokens[i], "outside the stream's nucleus");
    scores->y[j] = -INFINITY;
  }
  return certain;
}

// log p of draw i, between those of the nuclei with whoever may be in it and whoever surely is.
void compare_log_p(const Distribution& from, const Draws& draws, int64_t i, const Scores& scores,
                   double near) {
  require(draws.inside[i] == !std::isnan(draws.log_p[i]), "log p outside the nucleus, or none");
  if (!draws.inside[i]) return;
  std::vector<double> falling = scores.y, mass{0};  // mass[k] of the k largest
  std::sort(falling.begin(), falling.end(), std::greater<>());
  for (const double y : falling) mass.push_back(mass.back() + std::exp(y - falling[0]));
  const auto above = [&](double limit) {
    const auto end = std::partition_point(falling.begin(), falling.end(),
                                          [&](double other) { return other > limit; });
    return mass[static_cast<size_t>(end - falling.begin())] / mass.back();
  };
  double least = 0, most = 0;
  for (const double y : falling) {
    const double e = std::exp(y - falling[0]);
    if (from.top_p >= 1 || above(y + near) < from.top_p + near) most += e;
    if (from.top_p >= 1 || above(y - near) - e / mass.back() < from.top_p - near) least += e;
  }
  const double own = scores.y[static_cast<size_t>(draws.tokens[i])] - falling[0];
  require(draws.log_p[i] >= own - std::log(most) - 10 * near, "log p too low");
  require(least == 0 || draws.log_p[i] <= own - std::log(least) + 10 * near, "log p too high");
}

void compare(const Distribution& given, const Draws& draws) {
  Distribution from = given;
  if (given.of_stream()) from.top_p = 1;  // in the scores that are left
  for (int64_t i = 0; i < draws.count; ++i) {
    Scores scores = equation(from, draws.rows[i]);
    const int64_t token = draws.tokens[i];
    if (scores.scale > 1e30) continue;  // a float may overflow where the double does not
    const double near = 1e-5 + 1e-6 * scores.scale;  // of a score, and so of a share
    if (draws.uniform && given.of_stream() && !scores.none) {
      if (near > 0.1 || !keep_nucleus_of_stream(given, draws, i, near, &scores)) continue;
      scores.none = *std::max_element(scores.y.begin(), scores.y.end()) == -INFINITY;
    }
    require((token == -1) == scores.none, "a token where there is none, or the reverse");
    if (scores.none) {
      require(!draws.log_p || std::isnan(draws.log_p[i]), "log p of no token");
      continue;
    }
    require(token >= 0 && token < from.vocab, "a token outside the vocabulary");
    const double y = scores.y[static_cast<size_t>(token)];
    require(y > -INFINITY, "a token without mass");
    const double largest = *std::max_element(scores.y.begin(), scores.y.end());
    if (!draws.uniform) {
      require(y >= largest - near, "not the largest");
      require(!draws.log_p || draws.log_p[i] == 0, "a certain token has another log p than 0");
      continue;
    }
    if (near > 0.1) continue;
    double before = 0, total = 0, above = 0, reached = 0;
    for (int64_t j = 0; j < from.vocab; ++j) {
      const double other = scores.y[static_cast<size_t>(j)], e = std::exp(other - largest);
      if (j < token) before += e;
      total += e;
      if (other > y + near) above += e;
      if (j != token && other >= y - near) reached += e;
    }
    const double u = draws.uniform[i], after = before + std::exp(y - largest);
    require(before / total - near <= u && u <= after / total + near, "another token's share");
    if (draws.log_p) compare_log_p(from, draws, i, scores, near);
    if (draws.inside[i]) {
      require(from.top_p >= 1 || above / total < from.top_p + near, "inside the nucleus");
    } else {
      require(from.top_p < 1 && reached / total >= from.top_p - near, "outside the nucleus");
    }
  }
}

void one_problem(bool hostile) {
  const int64_t edges[] = {1, 2, 15, 255, 256, 257, 512, 2047, 2048, 2049, 4097};
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
  const double top_ps[] = {0.1, 0.5, 0.9, 1};
  const int64_t vocab = below(3) ? edges[below(11)] : 1 + below(300);
  const DType dtype = dtypes[below(3)];
  Distribution from{};
  from.rows = below(6);
  from.streams = 1 + below(3);
  from.vocab = vocab;
  from.top_p = top_ps[below(4)];
  from.nucleus_of = below(2) ? below(from.streams) : -1;
  from.nucleus_weight = static_cast<float>(1 + below(8)) / 4;
  const int64_t all_rows = from.streams * from.rows;
  const Layout layout = layout_of(all_rows, vocab + (below(2) ? below(6) : 0));
  const Guarded logits(static_cast<size_t>(layout.elements) * size_of(dtype));
  fill(logits, layout, dtype, static_cast<int>(below(6)));
  from.logits = {logits.as<void>(),   dtype,          layout.inner, layout.outer_stride,
                 layout.inner_stride, layout.elements};

  const Guarded weights(static_cast<size_t>(from.streams) * sizeof(float));
  for (int64_t s = 0; s < from.streams; ++s) {
    weights.as<float>()[s] = static_cast<float>(below(13) - 4) / 4;
  }
  from.weights = weights.as<float>();
  from.suppressed_count = below(4);
  const Guarded suppressed(static_cast<size_t>(from.suppressed_count) * sizeof(int64_t));
  for (int64_t i = 0; i < from.suppressed_count; ++i) suppressed.as<int64_t>()[i] = below(vocab);
  from.suppressed = suppressed.as<int64_t>();

  const int64_t count = from.rows == 0 ? 0 : below(9);
  const auto size = static_cast<size_t>(count);
  const Guarded rows(size * sizeof(int64_t)), uniform(size * sizeof(float));
  const Guarded tokens(size * sizeof(int64_t)), inside(size * sizeof(bool));
  const Guarded log_p(size * sizeof(float));
  for (int64_t i = 0; i < count; ++i) {
    const float ends[] = {0, 0x1.fffffep-1f};
    rows.as<int64_t>()[i] = below(from.rows);
    uniform.as<float>()[i] =
        below(4) ? static_cast<float>(below(1 << 24)) / (1 << 24) : ends[below(2)];
  }
  Draws draws{count,
              rows.as<int64_t>(),
              below(4) ? uniform.as<float>() : nullptr,
              tokens.as<int64_t>(),
              inside.as<bool>(),
              below(3) ? log_p.as<float>() : nullptr};

  if (hostile) {
    // The memory's true size stays, and so does that of the arrays, for which the caller vouches.
    int64_t* const numbers[] = {&from.logits.inner, &from.logits.outer_stride,
                                &from.logits.inner_stride, &from.rows, &from.vocab};
    const float wild_floats[] = {NAN, INFINITY, -INFINITY, -1, 1, 2};
    switch (below(6)) {
      case 0:
        if (count > 0) change(rows.as<int64_t>()[below(count)]);
        break;
      case 1:
        if (from.suppressed_count > 0) change(suppressed.as<int64_t>()[0]);
        break;
      case 2:
        if (count > 0) uniform.as<float>()[below(count)] = wild_floats[below(6)];
        break;
      case 3:
        switch (below(4)) {
          case 0:
            weights.as<float>()[below(from.streams)] = wild_floats[below(6)];
            break;
          case 1:
            from.top_p = static_cast<double>(wild_floats[below(6)]);
            break;
          case 2:
            from.nucleus_weight = wild_floats[below(6)];
            break;
          default:
            from.nucleus_of = below(9) - 4;
        }
        break;
      case 4:
        if (below(2)) {
          from.logits.data = nullptr;
        } else {
          from.logits.dtype = dtypes[below(3)];
          if (from.logits.dtype == DType::f32 && dtype != DType::f32) from.logits.elements /= 2;
        }
        break;
      default:
        change(*numbers[below(5)]);
    }
  }
  try {
    const bool all = quark::sample_tokens(from, draws, 1 + static_cast<int>(below(3)));
    compare(from, draws);
    require(all == std::none_of(draws.tokens, draws.tokens + count, [](auto t) { return t < 0; }),
            "a row without a token is not told");
  } catch (const std::invalid_argument&) {
    require(hostile, "a sound problem is refused");
  }
}

constexpr const char* kDriver = "sanitize_sampling";

}  // namespace

#include "driver.hpp"
