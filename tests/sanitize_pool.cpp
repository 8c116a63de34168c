// The pool's core under a sanitizer: random changes against a brute-force order, uniform draws,
// then readers beside a writer. Built and run by sanitize_pool.sh (and by mutate_pool.py on a core
// with planted bugs); aborts at the first thing that is wrong.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../csrc/quantile_pool.hpp"
#include "chosen.hpp"

using quark::QuantilePool;
using quark::Remainder;
using quark::Ties;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "sanitize_pool: %s\n", what);
  std::abort();
}

template <class Reward>
std::vector<std::int64_t> add(QuantilePool<Reward>& pool, const std::vector<Reward>& rewards) {
  std::vector<std::int64_t> ids(rewards.size());
  pool.add(rewards.data(), static_cast<std::int64_t>(rewards.size()), ids.data());
  return ids;
}

// Labels under Ties::same or Ties::arrival by sorting everything.
template <class Reward>
std::vector<int> labels_by_sorting(const std::vector<Reward>& rewards, int k, Ties ties,
                                   Remainder remainder) {
  std::vector<std::size_t> order(rewards.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return rewards[a] > rewards[b]; });
  std::vector<int> labels(rewards.size());
  const auto n = static_cast<std::int64_t>(order.size());
  for (std::int64_t begin = 0, end; begin < n; begin = end) {
    end = begin + 1;  // one sample, or all of one reward
    if (ties == Ties::same) {
      while (end < n && rewards[order[end]] == rewards[order[begin]]) ++end;
    }
    int missed = 0;
    for (int j = 1; j < k; ++j) {
      missed += 2 * quark::quantile_cut(n, j, k, remainder) < begin + end;
    }
    if (ties == Ties::same && end - begin < n) {  // the ends are the worst and the best quantile
      if (begin == 0) missed = 0;
      if (end == n) missed = k - 1;
    }
    for (std::int64_t i = begin; i < end; ++i) labels[order[i]] = k - 1 - missed;
  }
  return labels;
}

// A call that may not fit: it throws and changes nothing, or does what it says, and is undone.
template <class Reward, class Random>
void misuse(Random& random, QuantilePool<Reward>& pool, const std::vector<Reward>& rewards) {
  using Pool = QuantilePool<Reward>;
  const auto n = static_cast<std::int64_t>(rewards.size());
  const std::vector<std::int64_t> run_sizes = pool.run_sizes();
  const std::int64_t odd[] = {-1,
                              0,
                              1,
                              n,
                              n + 1,
                              std::int64_t{1} << random() % 63,
                              std::numeric_limits<std::int64_t>::max(),
                              std::numeric_limits<std::int64_t>::min()};
  const auto any = [&] { return odd[random() % std::size(odd)]; };
  std::vector<std::int64_t> some(random() % 4);
  for (std::int64_t& one : some) one = n > 0 && random() % 2 ? random() % n : any();
  const auto count = static_cast<std::int64_t>(some.size());
  const int call = static_cast<int>(random() % 5);
  try {
    if (call == 0) {
      std::vector<Reward> found(some.size());
      std::vector<std::int64_t> quantiles(some.size());
      pool.look_up(some.data(), count, found.data(), quantiles.data());
    } else if (call == 1) {
      const std::int64_t drawn = std::min(any(), n + 1);  // as many as one likes, so not too many
      const auto draw = pool.sample(drawn, {some.begin(), some.end()}, random());
      require(static_cast<std::int64_t>(draw.ids.size()) == drawn, "as many as asked for");
    } else if (call == 2) {
      auto other_rewards = rewards;
      auto sizes = run_sizes;
      if (n > 0 && random() % 2) other_rewards[random() % rewards.size()] = std::nan("");
      if (random() % 2) sizes.insert(sizes.begin() + random() % (sizes.size() + 1), any());
      pool.restore(other_rewards.data(), n, sizes);
    } else if (call == 3) {
      std::vector<typename Pool::Item> places;
      for (const std::int64_t one : some) {
        places.push_back(Pool::item_of(static_cast<typename Pool::Key>(one), 0));
      }
      pool.count_up_to(places);
      pool.impose(places, std::vector<typename Pool::Key>(random() % 4));
      pool.quantile_sizes();
    } else {
      QuantilePool<Reward>(static_cast<int>(any()), Ties::same, Remainder::spread, 0);
    }
  } catch (const std::logic_error&) {  // invalid_argument, out_of_range
    require(pool.size() == n && pool.run_sizes() == run_sizes, "a refused call changed the pool");
  }
  if (pool.imposed()) pool.set_imposed(false);
}

template <class Reward, class Random>
void random_changes(Random& random, int steps) {
  const Ties ties = random() % 2 ? Ties::same : Ties::arrival;
  const Remainder remainder = random() % 2 ? Remainder::spread : Remainder::last;
  const int k = 1 + static_cast<int>(random() % 40);
  QuantilePool<Reward> pool(k, ties, remainder, random());
  std::vector<Reward> known;
  const Reward infinity = std::numeric_limits<Reward>::infinity();
  const Reward awkward[] = {0,
                            Reward(-0.0),
                            1,
                            infinity,
                            -infinity,
                            -1,
                            std::numeric_limits<Reward>::denorm_min(),
                            std::numeric_limits<Reward>::quiet_NaN()};
  for (int step = 0; step < steps; ++step) {
    std::vector<Reward> rewards(random() % 8 == 0 ? random() % 5000 : random() % 40);
    for (Reward& reward : rewards) {
      reward = random() % 2 ? awkward[random() % std::size(awkward)]
                            : static_cast<Reward>(static_cast<double>(random()) * 1e-19);
    }
    const auto ids = add(pool, rewards);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      require((ids[i] < 0) == std::isnan(rewards[i]), "NaN alone has no id");
      if (ids[i] < 0) continue;
      require(ids[i] == static_cast<std::int64_t>(known.size()), "ids count up");
      known.push_back(rewards[i]);
    }
    const auto n = static_cast<std::int64_t>(known.size());
    require(pool.size() == n, "size");
    std::vector<Reward> pool_rewards(n);
    std::vector<std::int32_t> pool_labels(n);
    require(pool.rewards(pool_rewards.data(), n) == n, "rewards");
    require(pool.labels(pool_labels.data(), n) == n, "labels");
    require(pool_rewards == known, "rewards in order of arrival");
    const auto expected = labels_by_sorting(known, k, ties, remainder);
    for (std::int64_t i = 0; i < n; ++i)
      require(pool_labels[i] == expected[i], "labels by sorting");
    if (n > 0) {
      const auto draw = pool.sample(n, {}, random());
      for (std::size_t d = 0; d < draw.ids.size(); ++d) {
        require(draw.quantiles[d] == expected.at(draw.ids[d]), "quantile of a draw");
        require(draw.rewards[d] == known.at(draw.ids[d]), "reward of a draw");
      }
    }
    if (random() % 5 == 0) {
      pool.restore(pool_rewards.data(), n, pool.run_sizes());
    }
    misuse(random, pool, pool_rewards);
  }
}

// Each member is drawn, no other is, and all equally often: chi-square within 6 standard
// deviations.
void require_uniform(const std::vector<std::int64_t>& drawn,
                     const std::vector<std::int64_t>& members, const char* what) {
  std::map<std::int64_t, double> counts;
  for (const std::int64_t id : members) counts[id] = 0;
  for (const std::int64_t id : drawn) {
    require(counts.count(id) == 1, what);
    ++counts[id];
  }
  const double expected = static_cast<double>(drawn.size()) / static_cast<double>(members.size());
  double chi_square = 0;
  for (const auto& [id, count] : counts) {
    require(count > 0, what);
    chi_square += (count - expected) * (count - expected) / expected;
  }
  const auto freedom = static_cast<double>(members.size()) - 1;
  require(std::abs(chi_square - freedom) <= 6 * std::sqrt(2 * std::max(freedom, 1.0)), what);
}

// Draws from several runs with ties.
template <class Reward>
void draws_reach_all_equally(std::mt19937_64& random) {
  constexpr int kQuantiles = 5;
  QuantilePool<Reward> pool(kQuantiles, Ties::same, Remainder::spread, 0);
  for (const int size : {400, 150, 60, 20, 7, 1}) {
    std::vector<Reward> rewards(size);
    for (Reward& reward : rewards) reward = static_cast<Reward>(random() % 60);
    add(pool, rewards);
  }
  require(pool.run_sizes().size() >= 4, "several runs");

  const std::int64_t n = pool.size();
  std::vector<std::int32_t> labels(n);
  pool.labels(labels.data(), n);
  for (int quantile = 0; quantile < kQuantiles; ++quantile) {
    std::vector<std::int64_t> members;
    for (std::int64_t i = 0; i < n; ++i) {
      if (labels[i] == quantile) members.push_back(i);
    }
    const auto size = static_cast<std::int64_t>(members.size());
    const auto draw = pool.sample(200 * size, {quantile}, random());
    require_uniform(draw.ids, members, "draws are uniform");
  }
}

void epochs_visit_all(std::mt19937_64& random) {
  for (const std::uint64_t n : {1, 2, 255, 256, 257, 1000}) {
    std::vector<std::int64_t> order(n), all(n);
    quark::permutation_slice(n, random(), 0, n, order.data());
    std::iota(all.begin(), all.end(), 0);
    std::sort(order.begin(), order.end());
    require(order == all, "an epoch visits every sample once");
  }
}

template <class Reward>
void readers_beside_a_writer(int rounds) {
  QuantilePool<Reward> pool(5, Ties::random, Remainder::spread, 1);
  add(pool, {1});
  std::atomic<bool> done{false};
  const auto read = [&](std::uint64_t key) {
    std::vector<std::int32_t> labels(100'000);
    while (!done) {
      const auto written = pool.labels(labels.data(), static_cast<std::int64_t>(labels.size()));
      for (std::int64_t i = 0; i < written; ++i) require(labels[i] < 5, "label");
      for (const auto quantile : pool.sample(32, {}, ++key).quantiles) {
        require(quantile >= 0 && quantile < 5, "quantile of a draw");
      }
      pool.thresholds();
      pool.quantile_sizes();
    }
  };
  std::thread first(read, 1), second(read, 1'000'000);
  std::mt19937_64 random(3);
  for (int round = 0; round < rounds; ++round) {
    std::vector<Reward> rewards(1 + random() % 2000);
    for (Reward& reward : rewards) reward = static_cast<Reward>(random() % 100);
    add(pool, rewards);
    if (round % 3 == 0) {
      pool.restore(rewards.data(), static_cast<std::int64_t>(rewards.size()),
                   {static_cast<std::int64_t>(rewards.size())});
    }
  }
  done = true;
  first.join();
  second.join();
}

}  // namespace

#ifdef QUARK_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  Chosen random(bytes, size);
  if (random() % 2) {
    random_changes<float>(random, 4);
  } else {
    random_changes<double>(random, 4);
  }
  return 0;
}

#else

int main(int argc, char** argv) {
  const int effort = argc > 1 ? std::atoi(argv[1]) : 1;
  std::mt19937_64 random(7);
  for (int trial = 0; trial < 6 * effort; ++trial) {
    random_changes<float>(random, 20);
    random_changes<double>(random, 20);
  }
  draws_reach_all_equally<float>(random);
  draws_reach_all_equally<double>(random);
  epochs_visit_all(random);
  readers_beside_a_writer<float>(60 * effort);
  readers_beside_a_writer<double>(60 * effort);
  std::puts("sanitize_pool: ok");
}

#endif
