#include "quantile_pool.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "huge_pages.hpp"

namespace quark {
namespace {

// --- Randomness: 64-bit integers only, so that every platform draws the same ------------------

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

class Random {
 public:
  explicit Random(std::uint64_t key) : state_(mix(key)) {}

  std::uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15u); }

  // Uniform in 0..n-1, n >= 1: numbers under the next power of two, until one fits.
  std::uint64_t below(std::uint64_t n) {
    std::uint64_t mask = n - 1;
    for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
    for (;;) {
      const std::uint64_t x = next() & mask;
      if (x < n) return x;
    }
  }

 private:
  std::uint64_t state_;
};

}  // namespace

// A keyed bijection of the integers of an even number of bits (a Feistel network).
class Bijection {
 public:
  Bijection(int bits, std::uint64_t key) : half_(bits / 2), mask_((std::uint64_t{1} << half_) - 1) {
    Random random(key);
    for (auto& round_key : round_keys_) round_key = random.next();
  }

  std::uint64_t forward(std::uint64_t x) const {
    std::uint64_t left = x >> half_, right = x & mask_;
    for (const std::uint64_t round_key : round_keys_) {
      left ^= mix(right ^ round_key) & mask_;
      std::swap(left, right);
    }
    return left << half_ | right;
  }

  std::uint64_t inverse(std::uint64_t x) const {
    std::uint64_t left = x >> half_, right = x & mask_;
    for (auto round_key = round_keys_.rbegin(); round_key != round_keys_.rend(); ++round_key) {
      std::swap(left, right);
      left ^= mix(right ^ *round_key) & mask_;
    }
    return left << half_ | right;
  }

 private:
  int half_;
  std::uint64_t mask_;
  std::array<std::uint64_t, 6> round_keys_;
};

namespace {

// How many of the m sorted boundaries each key reaches (key <= boundary). No branch depends on a
// key; all keys take each step together, so that compilers can overlap or vectorise them.
template <class Key>
void count_reached(const Key* keys, std::size_t n, const Key* boundaries, std::int32_t m,
                   std::int32_t* counts) {
  constexpr std::int32_t kFew = 8;
  std::fill_n(counts, n, 0);
  if (m <= kFew) {
    std::int32_t j = 0;
    for (; j + 4 <= m; j += 4) {  // four at once: K = 5 reads each key once
      const Key b0 = boundaries[j], b1 = boundaries[j + 1], b2 = boundaries[j + 2],
                b3 = boundaries[j + 3];
      for (std::size_t i = 0; i < n; ++i) {
        const Key key = keys[i];
        counts[i] += (key <= b0) + (key <= b1) + (key <= b2) + (key <= b3);
      }
    }
    for (; j < m; ++j) {
      const Key boundary = boundaries[j];
      for (std::size_t i = 0; i < n; ++i) counts[i] += keys[i] <= boundary;
    }
    return;
  }
  // Binary search: counts[i] boundaries are known to be missed, the next `open` are undecided.
  std::int32_t open = m;
  for (; open > 1; open -= open / 2) {
    const std::int32_t half = open / 2;
    for (std::size_t i = 0; i < n; ++i) {
      counts[i] += half & -std::int32_t{boundaries[counts[i] + half - 1] < keys[i]};
    }
  }
  for (std::size_t i = 0; i < n; ++i) counts[i] = m - counts[i] - (boundaries[counts[i]] < keys[i]);
}

std::int64_t sum(const std::vector<std::size_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

template <class Runs>
std::size_t total_size(const Runs& runs) {
  std::size_t n = 0;
  for (const auto& run : runs) n += run->size;
  return n;
}

}  // namespace

std::int64_t quantile_cut(std::int64_t n, std::int64_t j, std::int64_t k, Remainder remainder) {
  return remainder == Remainder::spread ? (j * n + k - 1) / k : j * (n / k);
}

bool block_reaches(std::int64_t n, std::int64_t cut, std::int64_t better, std::int64_t equal) {
  if (equal < n && better == 0) return true;
  if (equal < n && better + equal == n) return false;
  return 2 * cut >= 2 * better + equal;
}

void permutation_slice(std::uint64_t n, std::uint64_t key, std::uint64_t start, std::uint64_t stop,
                       std::int64_t* out) {
  // At least 8 bits: a smaller network has too few permutations to choose from.
  int bits = 8;
  while (bits < 62 && std::uint64_t{1} << bits < n) bits += 2;
  const Bijection bijection(bits, key);
  for (std::uint64_t i = start; i < stop; ++i) {
    // Walk the cycle until it comes back under n: a permutation of 0..n-1 again.
    std::uint64_t x = bijection.forward(i);
    while (x >= n) x = bijection.forward(x);
    *out++ = static_cast<std::int64_t>(x);
  }
}

// --- Order ------------------------------------------------------------------------------------

template <class Reward>
typename QuantilePool<Reward>::Key QuantilePool<Reward>::key_of(Reward reward) {
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  Key bits;
  std::memcpy(&bits, &reward, sizeof(bits));
  if (bits == sign) bits = 0;  // -0; by its bits, as `reward == 0` holds for denormals under DAZ
  // Negative rewards sort worst first by their bits, with the sign above all; the others not.
  return bits & sign ? bits : bits ^ ~sign;
}

template <class Reward>
Reward QuantilePool<Reward>::reward_of(Key key) {
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  const Key bits = key & sign ? key : key ^ ~sign;
  Reward reward;
  std::memcpy(&reward, &bits, sizeof(reward));
  return reward;
}

template <class Reward>
typename QuantilePool<Reward>::Key QuantilePool<Reward>::tie_of(std::int64_t id) const {
  const auto tie = static_cast<std::uint64_t>(id);
  return static_cast<Key>(ties_ == Ties::random ? tie_bijection_->forward(tie) : tie);
}

template <class Reward>
std::int64_t QuantilePool<Reward>::id_of(Key tie) const {
  return static_cast<std::int64_t>(ties_ == Ties::random ? tie_bijection_->inverse(tie) : tie);
}

template <class Reward>
std::int64_t QuantilePool<Reward>::label_of(Item item, const std::vector<Item>& boundaries) {
  return boundaries.end() - std::lower_bound(boundaries.begin(), boundaries.end(), item);
}

// --- Memory -----------------------------------------------------------------------------------

namespace {

void* allocate(std::size_t bytes) {
  if (bytes < kHugePage) return ::operator new(bytes);
  void* const data = ::operator new(bytes, std::align_val_t{kHugePage});
  prefer_huge_pages(data, bytes);
  return data;
}

void release(void* data, std::size_t bytes) {
  if (bytes < kHugePage) {
    ::operator delete(data);
  } else {
    ::operator delete(data, std::align_val_t{kHugePage});
  }
}

}  // namespace

template <class Reward>
auto QuantilePool<Reward>::Memory::take(std::size_t n) -> Items {
  Item* items;
  std::size_t capacity = n;
  const auto fitting = spare_.lower_bound(n);
  if (fitting != spare_.end() && fitting->first <= n + n / 8) {
    std::tie(capacity, items) = *fitting;
    spare_items_ -= capacity;
    spare_.erase(fitting);
  } else {
    items = static_cast<Item*>(allocate(n * sizeof(Item)));
  }
  used_items_ += capacity;
  return Items(items, Return{this, capacity});
}

template <class Reward>
void QuantilePool<Reward>::Memory::Return::operator()(Item* items) const {
  memory->used_items_ -= capacity;
  if (4 * (memory->spare_items_ + capacity) <= memory->used_items_) {
    memory->spare_.emplace(capacity, items);
    memory->spare_items_ += capacity;
  } else {
    release(items, capacity * sizeof(Item));
  }
}

template <class Reward>
QuantilePool<Reward>::Memory::~Memory() {
  for (const auto& [capacity, items] : spare_) release(items, capacity * sizeof(Item));
}

// --- Sorted runs ------------------------------------------------------------------------------

template <class Reward>
void QuantilePool<Reward>::sort(Run& run) {
  // Radix sort, least significant digit first; it is stable, so ties already in order (arrival)
  // need no pass. Digits of 11 bits: their counters stay in the first-level cache.
  constexpr int kDigit = 11;
  constexpr std::size_t kBuckets = std::size_t{1} << kDigit;
  constexpr std::size_t kPasses = (kKeyBits + kDigit - 1) / kDigit;
  using Counters = std::array<std::uint32_t, kBuckets>;
  // Clearing the counters would cost more than sorting a small run.
  if (run.size < kBuckets / 2 || run.size > std::numeric_limits<std::uint32_t>::max()) {
    std::sort(run.items.get(), run.items.get() + run.size);
    return;
  }
  auto other = memory_.take(run.size);
  const auto sort_by = [&](int first_bit) {  // by the kKeyBits bits from there on
    std::array<Counters, kPasses> counters{};
    for (const Item item : run) {
      auto rest = static_cast<Key>(item >> first_bit);
      for (Counters& counter : counters) {
        ++counter[rest & (kBuckets - 1)];
        rest >>= kDigit;
      }
    }
    for (std::size_t pass = 0; pass < kPasses; ++pass) {
      Counters& place = counters[pass];
      const int shift = first_bit + static_cast<int>(pass) * kDigit;
      const Key mask = static_cast<Key>(~Key{0} >> (pass * kDigit)) & (kBuckets - 1);
      const auto digit = [&](Item item) { return static_cast<Key>(item >> shift) & mask; };
      if (place[digit(run.items[0])] == run.size) continue;  // all alike
      std::exclusive_scan(place.begin(), place.end(), place.begin(), std::uint32_t{0});
      Item* const out = other.get();
      for (const Item item : run) out[place[digit(item)]++] = item;
      std::swap(run.items, other);
    }
  };
  if (ties_ == Ties::random) sort_by(0);
  sort_by(kKeyBits);
}

template <class Reward>
auto QuantilePool<Reward>::merge(const Run& a, const Run& b) -> std::shared_ptr<const Run> {
  auto merged = std::make_shared<Run>(memory_, a.size + b.size);
  // In four parts side by side. Each is a chain of steps that wait for one another (no branch may
  // depend on the items: which run comes next is a coin toss); the processor overlaps the chains.
  constexpr std::size_t kParts = 4;
  struct Part {
    const Item *a, *a_end, *b, *b_end;
    Item* out;
    std::size_t safe_steps() const { return std::min(a_end - a, b_end - b); }
  };
  std::array<Part, kParts> parts;
  const Item *from_a = a.begin(), *from_b = b.begin();
  for (std::size_t p = 0; p < kParts; ++p) {
    // Where the first `rank` merged items end in a, and so in b.
    const std::size_t rank = merged->size * (p + 1) / kParts;
    std::size_t low = rank > b.size ? rank - b.size : 0, high = std::min(rank, a.size);
    while (low < high) {
      const std::size_t middle = low + (high - low) / 2;
      if (a.items[middle] < b.items[rank - middle - 1]) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    Item* const out = merged->items.get() + (from_a - a.begin()) + (from_b - b.begin());
    parts[p] = {from_a, a.begin() + low, from_b, b.begin() + (rank - low), out};
    from_a = parts[p].a_end;
    from_b = parts[p].b_end;
  }
  for (;;) {
    std::size_t steps = merged->size;
    for (const Part& part : parts) steps = std::min(steps, part.safe_steps());
    if (steps < 16) break;
    for (; steps > 0; --steps) {
      for (Part& part : parts) {
        const Item item_a = *part.a, item_b = *part.b;
        const bool b_first = item_b < item_a;
        *part.out++ = b_first ? item_b : item_a;
        part.a += !b_first;
        part.b += b_first;
      }
    }
  }
  for (const Part& part : parts) std::merge(part.a, part.a_end, part.b, part.b_end, part.out);
  return merged;
}

// Appends a run, then merges from the back until every run is at least twice its successor or
// their sum is above kMaxMerged (it bounds the worst call; R then grows by one per 2^19 or more).
template <class Reward>
void QuantilePool<Reward>::push(Runs& runs, std::shared_ptr<const Run> run) {
  if (run->size == 0) return;
  runs.push_back(std::move(run));
  while (runs.size() > 1) {
    const Run &last = *runs.back(), &previous = *runs[runs.size() - 2];
    if (previous.size >= 2 * last.size || previous.size + last.size > kMaxMerged) break;
    auto merged = merge(previous, last);
    runs.pop_back();
    runs.back() = std::move(merged);
  }
}

// The cut of each run such that `rank` items lie before the cuts and none of them is after an item
// after. Known to lie in low..high.
template <class Reward>
auto QuantilePool<Reward>::split_at_rank(const Runs& runs, std::size_t rank, Splits low,
                                         Splits high) -> Splits {
  struct Candidate {
    Item item;
    std::size_t run, weight;
  };
  std::vector<Candidate> candidates;
  Splits split(runs.size());
  for (bool halve = false;; halve = !halve) {
    std::size_t wanted = rank, open = 0;
    for (std::size_t r = 0; r < runs.size(); ++r) {
      wanted -= low[r];
      open += high[r] - low[r];
    }
    if (wanted == 0) return low;
    if (wanted == open) return high;

    // The pivot is the weighted median of one item of each run: by turns the item at the wanted
    // proportion (runs of one distribution: the window shrinks to about its square root) and the
    // middle one (whatever the runs hold: at least a quarter of the window goes).
    candidates.clear();
    for (std::size_t r = 0; r < runs.size(); ++r) {
      const std::size_t window = high[r] - low[r];
      if (window == 0) continue;
      const std::size_t offset = halve ? window / 2 : window * wanted / open;
      candidates.push_back({runs[r]->items[low[r] + offset], r, window});
    }
    std::sort(candidates.begin(), candidates.end(),
              [](const Candidate& a, const Candidate& b) { return a.item < b.item; });
    auto pivot = candidates.begin();
    for (std::size_t seen = pivot->weight; 2 * seen < open; seen += pivot->weight) ++pivot;

    std::size_t rank_of_pivot = 0;
    for (std::size_t r = 0; r < runs.size(); ++r) {
      const Item* run = runs[r]->begin();
      split[r] = std::lower_bound(run + low[r], run + high[r], pivot->item) - run;
      rank_of_pivot += split[r];
    }
    if (rank_of_pivot >= rank) {
      high = split;
    } else {
      low = split;
      ++low[pivot->run];  // the pivot itself is before the cut
    }
  }
}

// --- Boundaries -------------------------------------------------------------------------------

template <class Reward>
auto QuantilePool<Reward>::no_cuts() const -> std::shared_ptr<Cuts> {
  auto cuts = std::make_shared<Cuts>();
  cuts->splits.assign(quantiles_ + 1, Splits(runs_.size(), 0));
  for (std::size_t r = 0; r < runs_.size(); ++r) cuts->splits[quantiles_][r] = runs_[r]->size;
  return cuts;
}

template <class Reward>
auto QuantilePool<Reward>::own_cuts() const -> std::shared_ptr<const Cuts> {
  const auto cuts = no_cuts();
  const auto n = static_cast<std::int64_t>(total_size(runs_));
  const auto cut = [&](int j) { return quantile_cut(n, j, quantiles_, remainder_); };
  // The first cut is 0 only if all are: an empty pool, or under `last` fewer samples than
  // quantiles, where `same` still has a best and a worst reward.
  const bool same = ties_ == Ties::same;
  if (n == 0 || (!same && cut(1) == 0)) return cuts;

  // The middle boundary first: the others then search only their side of it.
  const auto solve = [&](auto&& self, int low, int high) -> void {
    if (high - low < 2) return;
    const int j = low + (high - low) / 2;
    const auto rank = static_cast<std::size_t>(std::max(cut(j), std::int64_t{1}));
    cuts->splits[j] = split_at_rank(runs_, rank, cuts->splits[low], cuts->splits[high]);
    self(self, low, j);
    self(self, j, high);
  };
  solve(solve, 0, quantiles_);

  for (int j = 1; j < quantiles_; ++j) {
    Splits& split = cuts->splits[j];
    if (same) {  // before or after the whole block that the cut goes through
      Block block = block_at(split);
      const std::int64_t better = sum(block.begin);
      const bool reaches = block_reaches(n, cut(j), better, sum(block.end) - better);
      split = std::move(reaches ? block.end : block.begin);
    }
    Item boundary = last_before(split);
    if (same && boundary > 0) boundary |= std::numeric_limits<Key>::max();
    cuts->boundaries.push_back(boundary);
    cuts->thresholds.push_back(key_in(boundary));
  }
  return cuts;
}

// The last item before the split; 0, which is before all items, where there is none.
template <class Reward>
auto QuantilePool<Reward>::last_before(const Splits& split) const -> Item {
  Item last = 0;
  for (std::size_t r = 0; r < runs_.size(); ++r) {
    if (split[r] > 0) last = std::max(last, runs_[r]->items[split[r] - 1]);
  }
  return last;
}

// All samples that have the reward of the last one before the split.
template <class Reward>
auto QuantilePool<Reward>::block_at(const Splits& split) const -> Block {
  Block block{key_in(last_before(split)), split, split};
  const Item first = item_of(block.key, 0), last = item_of(block.key, ~Key{0});
  for (std::size_t r = 0; r < runs_.size(); ++r) {
    const Run& run = *runs_[r];
    std::size_t at = split[r], step = 1;
    for (; step <= at && run.items[at - step] >= first; step *= 2) at -= step;
    const Item* const low = run.begin() + (step <= at ? at - step + 1 : 0);
    block.begin[r] = std::lower_bound(low, run.begin() + at, first) - run.begin();
    block.end[r] = end_of(run, split[r], last);
  }
  return block;
}

// How many items of the run are at or before `item`, of which `at` are known to be. Galloping: as a
// rule few more, or none.
template <class Reward>
std::size_t QuantilePool<Reward>::end_of(const Run& run, std::size_t at, Item item) {
  std::size_t step = 1;
  for (; step <= run.size - at && run.items[at + step - 1] <= item; step *= 2) at += step;
  const Item* const high = run.begin() + std::min(run.size, at + step - 1);
  return std::upper_bound(run.begin() + at, high, item) - run.begin();
}

// Puts each split after all items that reach its boundary.
template <class Reward>
void QuantilePool<Reward>::split_runs(Cuts& cuts) const {
  for (std::size_t r = 0; r < runs_.size(); ++r) {
    std::size_t at = 0;
    for (std::size_t j = 0; j < cuts.boundaries.size(); ++j) {
      at = end_of(*runs_[r], at, cuts.boundaries[j]);
      cuts.splits[j + 1][r] = at;
    }
  }
}

template <class Reward>
auto QuantilePool<Reward>::cuts() const -> std::shared_ptr<const Cuts> {
  std::lock_guard<std::mutex> one_computes(cuts_mutex_);
  if (!cuts_) {
    if (imposed_) {
      throw std::logic_error(
          "the pool has changed since its boundaries were agreed on across ranks: sync() again on "
          "every rank");
    }
    cuts_ = own_cuts();
  }
  return cuts_;
}

template <class Reward>
std::vector<Reward> QuantilePool<Reward>::thresholds() const {
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  std::vector<Reward> thresholds(quantiles_ - 1, std::numeric_limits<Reward>::quiet_NaN());
  const auto cuts = this->cuts();
  std::transform(cuts->thresholds.begin(), cuts->thresholds.end(), thresholds.begin(), reward_of);
  return thresholds;
}

template <class Reward>
std::vector<std::int64_t> QuantilePool<Reward>::quantile_sizes() const {
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  const auto cuts = this->cuts();
  std::vector<std::int64_t> sizes(quantiles_);
  for (int quantile = 0; quantile < quantiles_; ++quantile) {
    const auto& better = cuts->splits[quantiles_ - 1 - quantile];
    const auto& up_to = cuts->splits[quantiles_ - quantile];
    sizes[quantile] = sum(up_to) - sum(better);
  }
  return sizes;
}

template <class Reward>
std::vector<std::int64_t> QuantilePool<Reward>::count_up_to(const std::vector<Item>& places) const {
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  std::vector<std::int64_t> counts(places.size(), 0);
  for (const auto& run : runs_) {
    for (std::size_t i = 0; i < places.size(); ++i) {
      counts[i] += std::upper_bound(run->begin(), run->end(), places[i]) - run->begin();
    }
  }
  return counts;
}

template <class Reward>
void QuantilePool<Reward>::impose(std::vector<Item> boundaries, std::vector<Key> thresholds) {
  if (!boundaries.empty() && boundaries.size() != static_cast<std::size_t>(quantiles_ - 1)) {
    throw std::invalid_argument("a pool of K quantiles takes K - 1 boundaries, or none");
  }
  if (thresholds.size() != boundaries.size()) {
    throw std::invalid_argument("each boundary takes one threshold");
  }
  if (!std::is_sorted(boundaries.begin(), boundaries.end())) {
    throw std::invalid_argument("boundaries must come in order, the best first");
  }
  std::lock_guard<std::mutex> writing(write_mutex_);
  const auto cuts = no_cuts();
  cuts->boundaries = std::move(boundaries);
  cuts->thresholds = std::move(thresholds);
  split_runs(*cuts);
  std::unique_lock<std::shared_mutex> changing(state_mutex_);
  imposed_ = true;
  cuts_ = cuts;
}

template <class Reward>
void QuantilePool<Reward>::set_imposed(bool imposed) {
  std::lock_guard<std::mutex> writing(write_mutex_);
  std::unique_lock<std::shared_mutex> changing(state_mutex_);
  imposed_ = imposed;
  cuts_.reset();
}

template <class Reward>
bool QuantilePool<Reward>::imposed() const {
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  return imposed_;
}

// --- Changes ----------------------------------------------------------------------------------

template <class Reward>
QuantilePool<Reward>::QuantilePool(int quantiles, Ties ties, Remainder remainder,
                                   std::uint64_t seed)
    : quantiles_(quantiles),
      ties_(ties),
      remainder_(remainder),
      tie_bijection_(std::make_unique<Bijection>(8 * sizeof(Key), seed)) {
  if (quantiles < 1) {
    throw std::invalid_argument("quantiles must be at least 1, got " + std::to_string(quantiles));
  }
}

template <class Reward>
QuantilePool<Reward>::~QuantilePool() = default;

template <class Reward>
void QuantilePool<Reward>::require_numbered(std::int64_t n) {
  if (kKeyBits == 32 && n > std::int64_t{std::numeric_limits<std::uint32_t>::max()}) {
    throw std::length_error("a float32 pool numbers 2^32 - 1 samples in its life; use float64");
  }
}

template <class Reward>
void QuantilePool<Reward>::add(const Reward* rewards, std::int64_t n, std::int64_t* ids) {
  std::lock_guard<std::mutex> writing(write_mutex_);
  const std::int64_t size = slots_.size();
  std::int64_t end = size;
  for (std::int64_t i = 0; i < n; ++i) {
    const bool scored = !std::isnan(rewards[i]);
    ids[i] = scored ? end : -1;
    end += scored;
  }
  require_numbered(end);
  std::vector<Reward> scored;
  if (end - size < n) {
    std::copy_if(rewards, rewards + n, std::back_inserter(scored),
                 [](Reward reward) { return !std::isnan(reward); });
    rewards = scored.data();
  }

  auto batch = std::make_shared<Run>(memory_, end - size);
  {
    std::unique_lock<std::shared_mutex> changing(state_mutex_);
    slots_.reserve(end);
  }
  Item* item = batch->items.get();
  slots_.for_each_span(size, end, Slots::kChunk,
                       [&](std::int64_t first, Key* keys, std::int64_t count) {
                         for (std::int64_t i = 0; i < count; ++i) keys[i] = key_of(rewards[i]);
                         for (std::int64_t i = 0; i < count; ++i)
                           item[i] = item_of(keys[i], tie_of(first + i));
                         rewards += count;
                         item += count;
                       });
  sort(*batch);
  Runs runs = runs_;
  push(runs, std::move(batch));

  std::unique_lock<std::shared_mutex> changing(state_mutex_);
  slots_.publish(end);
  runs_.swap(runs);  // those merged away are given up after the readers may go on
  cuts_.reset();
}

template <class Reward>
void QuantilePool<Reward>::restore(const Reward* rewards, std::int64_t n,
                                   const std::vector<std::int64_t>& run_sizes) {
  require_numbered(n);
  if (std::any_of(rewards, rewards + n, [](Reward reward) { return std::isnan(reward); })) {
    throw std::invalid_argument("a stored reward is NaN");
  }
  std::int64_t in_runs = 0;
  for (const std::int64_t size : run_sizes) {
    if (size < 1 || size > n - in_runs) throw std::invalid_argument("run sizes do not fit");
    in_runs += size;
  }
  if (in_runs != n) throw std::invalid_argument("run sizes do not add up to the samples");

  std::lock_guard<std::mutex> writing(write_mutex_);
  Slots slots;
  slots.reserve(n);
  slots.for_each_span(0, n, Slots::kChunk, [&](std::int64_t first, Key* keys, std::int64_t size) {
    std::transform(rewards + first, rewards + first + size, keys, key_of);
  });
  slots.publish(n);
  Runs runs;
  std::int64_t id = 0;
  for (const std::int64_t size : run_sizes) {
    auto run = std::make_shared<Run>(memory_, size);
    for (Item* item = run->items.get(); item != run->end(); ++item, ++id) {
      *item = item_of(slots.at(id), tie_of(id));
    }
    sort(*run);
    runs.push_back(std::move(run));
  }

  std::unique_lock<std::shared_mutex> changing(state_mutex_);
  runs_.swap(runs);
  std::swap(slots_, slots);
  cuts_.reset();
}

// --- Samples by id ----------------------------------------------------------------------------

template <class Reward>
void QuantilePool<Reward>::Slots::Free::operator()(Key* keys) const {
  release(keys, kChunk * sizeof(Key));
}

template <class Reward>
void QuantilePool<Reward>::Slots::reserve(std::int64_t size) {
  while (static_cast<std::int64_t>(chunks_.size()) * kChunk < size) {
    constexpr std::size_t bytes = kChunk * sizeof(Key);
    void* const data = ::operator new(bytes, std::align_val_t{kHugePage});
    // A small pool touches few pages of its only chunk.
    if (!chunks_.empty()) prefer_huge_pages(data, bytes);
    chunks_.emplace_back(static_cast<Key*>(data));
  }
}

template <class Reward>
template <class Visit>
void QuantilePool<Reward>::Slots::for_each_span(std::int64_t first, std::int64_t end,
                                                std::int64_t longest, Visit visit) const {
  while (first < end) {
    const std::int64_t index = first % kChunk;
    const std::int64_t n = std::min({longest, end - first, kChunk - index});
    visit(first, &chunks_[first / kChunk][index], n);
    first += n;
  }
}

template <class Reward>
std::int64_t QuantilePool<Reward>::rewards(Reward* out, std::int64_t capacity) const {
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  const std::int64_t end = std::min(capacity, slots_.size());
  slots_.for_each_span(0, end, Slots::kChunk,
                       [&](std::int64_t first, const Key* keys, std::int64_t n) {
                         std::transform(keys, keys + n, out + first, reward_of);
                       });
  return end;
}

template <class Reward>
template <class Label>
std::int64_t QuantilePool<Reward>::labels(Label* out, std::int64_t capacity) const {
  if (quantiles_ - 1 > std::int64_t{std::numeric_limits<Label>::max()}) {
    throw std::invalid_argument(std::to_string(quantiles_) + " quantiles do not fit in labels of " +
                                std::to_string(8 * sizeof(Label)) + " bits");
  }
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  const auto cuts = this->cuts();
  const std::vector<Item>& boundaries = cuts->boundaries;
  const auto count = static_cast<std::int32_t>(boundaries.size());
  std::vector<Key> boundary_keys;
  for (const Item boundary : boundaries) boundary_keys.push_back(key_in(boundary));

  std::array<std::int32_t, kBlock> reached;  // as wide as a key: compilers vectorise that best
  const std::int64_t end = std::min(capacity, slots_.size());
  slots_.for_each_span(0, end, kBlock, [&](std::int64_t first, const Key* keys, std::int64_t n) {
    // By the key alone: exact under `same`, and for all but the ties of a boundary otherwise.
    count_reached(keys, n, boundary_keys.data(), count, reached.data());
    Label* const labels = out + first;
    for (std::int64_t i = 0; i < n; ++i) labels[i] = static_cast<Label>(reached[i]);
    if (ties_ == Ties::same) return;
    for (std::int64_t i = 0; i < n; ++i) {
      if (labels[i] > 0 && keys[i] == boundary_keys[count - labels[i]]) {
        labels[i] = static_cast<Label>(label_of(item_of(keys[i], tie_of(first + i)), boundaries));
      }
    }
  });
  return end;
}

template <class Reward>
void QuantilePool<Reward>::look_up(const std::int64_t* ids, std::int64_t n, Reward* rewards,
                                   std::int64_t* quantiles) const {
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  const auto cuts = this->cuts();
  for (std::int64_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= slots_.size()) {
      throw std::out_of_range("sample " + std::to_string(ids[i]) + " is not in the pool");
    }
    const Key key = slots_.at(ids[i]);
    rewards[i] = reward_of(key);
    quantiles[i] = label_of(item_of(key, tie_of(ids[i])), cuts->boundaries);
  }
}

template <class Reward>
std::int64_t QuantilePool<Reward>::size() const {
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  return slots_.size();
}

template <class Reward>
std::vector<std::int64_t> QuantilePool<Reward>::run_sizes() const {
  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  std::vector<std::int64_t> sizes;
  for (const auto& run : runs_) sizes.push_back(static_cast<std::int64_t>(run->size));
  return sizes;
}

// --- Draws ------------------------------------------------------------------------------------

namespace {

// The items of some quantiles, as slices of runs laid end to end.
template <class Item>
class Slices {
 public:
  void append(const Item* first, std::size_t size) {
    if (size == 0) return;
    firsts_.push_back(first);
    ends_.push_back(this->size() + size);
  }

  std::size_t size() const { return ends_.empty() ? 0 : ends_.back(); }

  const Item& operator[](std::size_t position) const {
    const auto slice = std::upper_bound(ends_.begin(), ends_.end(), position) - ends_.begin();
    return firsts_[slice][position - (slice == 0 ? 0 : ends_[slice - 1])];
  }

 private:
  std::vector<const Item*> firsts_;
  std::vector<std::size_t> ends_;
};

}  // namespace

template <class Reward>
auto QuantilePool<Reward>::sample(std::int64_t count, const std::vector<int>& from,
                                  std::uint64_t key) const -> Draw {
  std::vector<bool> wanted(quantiles_, from.empty());
  for (const int quantile : from) {
    if (quantile < 0 || quantile >= quantiles_) {
      throw std::invalid_argument("quantiles are 0 (worst) to " + std::to_string(quantiles_ - 1) +
                                  " (best), got " + std::to_string(quantile));
    }
    wanted[quantile] = true;
  }
  if (count < 0) throw std::invalid_argument("cannot draw a negative number of samples");

  std::shared_lock<std::shared_mutex> reading(state_mutex_);
  const auto cuts = this->cuts();
  Slices<Item> members;
  for (int quantile = 0; quantile < quantiles_; ++quantile) {
    if (!wanted[quantile]) continue;
    for (std::size_t r = 0; r < runs_.size(); ++r) {
      const std::size_t first = cuts->splits[quantiles_ - 1 - quantile][r];
      const std::size_t end = cuts->splits[quantiles_ - quantile][r];
      members.append(runs_[r]->begin() + first, end - first);
    }
  }
  Draw draw;
  if (count == 0) return draw;
  if (members.size() == 0) {
    throw std::invalid_argument(
        "nothing to draw from: " +
        std::string(runs_.empty() ? "the pool is empty" : "these quantiles are empty"));
  }

  Random random(key);
  random.next();  // unused; without it the same key would draw otherwise than it did before
  for (std::int64_t i = 0; i < count; ++i) {
    const Item& item = members[random.below(members.size())];
    draw.ids.push_back(id_of(tie_in(item)));
    draw.rewards.push_back(reward_of(key_in(item)));
    draw.quantiles.push_back(label_of(item, cuts->boundaries));
  }
  return draw;
}

template class QuantilePool<float>;
template class QuantilePool<double>;
template std::int64_t QuantilePool<float>::labels(std::uint8_t*, std::int64_t) const;
template std::int64_t QuantilePool<float>::labels(std::int32_t*, std::int64_t) const;
template std::int64_t QuantilePool<float>::labels(std::int64_t*, std::int64_t) const;
template std::int64_t QuantilePool<double>::labels(std::uint8_t*, std::int64_t) const;
template std::int64_t QuantilePool<double>::labels(std::int32_t*, std::int64_t) const;
template std::int64_t QuantilePool<double>::labels(std::int64_t*, std::int64_t) const;

}  // namespace quark
