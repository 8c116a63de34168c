// Exact streaming quantiles of rewards. No Python, no torch.
//
// The pool is one total order of all samples, the best first: by reward, then by the tie
// rule. It is kept as a few sorted runs (the logarithmic method): a batch is sorted into a new run,
// neighbouring runs of similar size are merged, and a boundary is found by selecting across the
// runs. Nothing is ever relabelled: a sample's quantile follows from at most K - 1 boundaries.
//
// Promises
//   Quantiles  0 is the worst, K - 1 the best.
//   Cuts       With n samples the best j quantiles hold exactly c_j samples under `arrival`
//              and `random`: c_j = ceil(j n / K) (spread) or j floor(n / K) (last: the worst
//              quantile takes the remainder). Integers throughout.
//   Ties       same: equal rewards share a quantile, the one in which the middle of their block
//              lies (block_reaches); where there are two rewards or more, the lowest is in quantile
//              0 and the highest in K - 1. arrival: the older sample ranks better. random: a fixed
//              keyed bijection of the id decides, independent of arrival.
//   Values     -inf and +inf are ordinary, -0 equals +0 (and is kept as +0), denormals are told
//              apart whatever the floating-point mode. NaN is not a reward: it gets the id -1.
//   Ids        Count up from 0 in order of arrival; no sample ever leaves.
//   Empty      No threshold (NaN), no labels, all sizes 0; drawing throws. A threshold is NaN, too,
//              where no reward of the pool reaches it.
//   Draws      Exactly uniform, each by itself, up to the 64-bit generator; a function of the key,
//              the samples and run_sizes() alone, the same on every platform.
//   Cost       R runs: R <= 2 n / 2^20 + log2(n) + 1. add: O(log n) merge steps a reward,
//              amortised, at most 2^21 at a time. Boundaries after a change: O(K R log^2 n), then
//              cached. A label O(log K), a draw O(log R).
//   Memory     12 bytes a sample (float), 24 (double); at most a quarter of the runs' memory again
//              is kept for the next merges.
//   Threads    Every member may be called from any thread. Writers take turns; their sorting and
//              merging happens beside the readers, who wait only while the result is put in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <type_traits>
#include <vector>

namespace quark {

enum class Ties { same, arrival, random };
enum class Remainder { spread, last };

// How many of n samples the best j of k quantiles hold.
std::int64_t quantile_cut(std::int64_t n, std::int64_t j, std::int64_t k, Remainder remainder);

// Whether a block of equal rewards belongs to the best `cut` of n samples under Ties::same: of the
// samples, `better` have a better reward and `equal` this one. Its middle decides,
// cut >= better + equal / 2, except that the best of several rewards always does and the worst
// never.
bool block_reaches(std::int64_t n, std::int64_t cut, std::int64_t better, std::int64_t equal);

// Elements start..stop-1 of a keyed permutation of 0..n-1, which is never written out.
void permutation_slice(std::uint64_t n, std::uint64_t key, std::uint64_t start, std::uint64_t stop,
                       std::int64_t* out);

class Bijection;

template <class Reward>
class QuantilePool {
  static_assert(std::is_same_v<Reward, float> || std::is_same_v<Reward, double>);

 public:
  // A place in the pool's order, smaller is better: the key (the reward, its bits turned so that a
  // better reward is a smaller integer) in the upper half, the tie (the id, or a keyed bijection of
  // it) in the lower. One integer, so that merging compares and moves it in one go. Public so that
  // boundaries can be agreed on across processes.
  using Key = std::conditional_t<sizeof(Reward) == 4, std::uint32_t, std::uint64_t>;
  using Item = std::conditional_t<sizeof(Reward) == 4, std::uint64_t, unsigned __int128>;
  static constexpr int kKeyBits = 8 * sizeof(Key);
  static Item item_of(Key key, Key tie) { return Item{key} << kKeyBits | tie; }

  struct Draw {
    std::vector<std::int64_t> ids;
    std::vector<Reward> rewards;
    std::vector<std::int64_t> quantiles;  // membership at the moment of the draw
  };

  // Throws std::invalid_argument if quantiles < 1. `seed` matters to Ties::random alone.
  QuantilePool(int quantiles, Ties ties, Remainder remainder, std::uint64_t seed);
  ~QuantilePool();

  // Adds n rewards and writes their ids; reads them more than once, so they must not change
  // meanwhile (RolloutPool hands over its own copy). A float pool numbers 2^32 - 1 samples over its
  // whole life, then throws std::length_error; nothing is added by a call that throws.
  void add(const Reward* rewards, std::int64_t n, std::int64_t* ids);

  // Puts back what rewards() and run_sizes() gave. Throws std::invalid_argument, and changes
  // nothing, if these do not fit together.
  void restore(const Reward* rewards, std::int64_t n, const std::vector<std::int64_t>& run_sizes);

  std::int64_t size() const;
  std::vector<std::int64_t> run_sizes() const;

  // Each writes about the (at most) `capacity` oldest samples, in order of arrival, and returns how
  // many it wrote: a writer may have changed size() since the caller asked.
  std::int64_t rewards(Reward* out, std::int64_t capacity) const;
  // Label: std::uint8_t (throws std::invalid_argument if K > 256), std::int32_t or std::int64_t.
  template <class Label>
  std::int64_t labels(Label* out, std::int64_t capacity) const;

  // Reward and quantile of given samples. Throws std::out_of_range for an id not in the pool.
  void look_up(const std::int64_t* ids, std::int64_t n, Reward* rewards,
               std::int64_t* quantiles) const;

  // K - 1 rewards, the best boundary first; NaN where no reward of the pool is enough.
  std::vector<Reward> thresholds() const;
  // K counts, the worst quantile first.
  std::vector<std::int64_t> quantile_sizes() const;

  // `count` samples, any of them perhaps twice, from these quantiles (empty: from all). The key is
  // the whole randomness of the draw. Throws std::invalid_argument if there is nothing to draw
  // from, or a quantile that is not one.
  Draw sample(std::int64_t count, const std::vector<int>& from, std::uint64_t key) const;

  // Boundaries over several pools (one a process). A boundary is the last place that still belongs
  // to the best j quantiles; its threshold is the key of the reward there, which may be a worse one
  // than the boundary's own if that reward's first sample is in another pool.
  // count_up_to: how many samples are at or before each place.
  // impose: use these K - 1 boundaries (or none: all samples in quantile 0) until the next change;
  // from then on whatever needs boundaries throws std::logic_error, until they are imposed again or
  // set_imposed(false) goes back to the pool's own. set_imposed(true): as after such a change.
  std::vector<std::int64_t> count_up_to(const std::vector<Item>& places) const;
  void impose(std::vector<Item> boundaries, std::vector<Key> thresholds);
  void set_imposed(bool imposed);
  bool imposed() const;

 private:
  // The memory of runs. What merged runs leave goes to the runs to come: the first touch of a fresh
  // page costs more than sorting what it holds. A writer alone takes and returns.
  class Memory {
   public:
    struct Return {
      Memory* memory = nullptr;
      std::size_t capacity = 0;
      void operator()(Item* items) const;
    };
    using Items = std::unique_ptr<Item[], Return>;

    Memory() = default;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory();
    Items take(std::size_t n);  // uninitialised

   private:
    std::multimap<std::size_t, Item*> spare_;  // by capacity
    std::size_t spare_items_ = 0, used_items_ = 0;
  };

  // A sorted run; immutable once it is in runs_, so that writers can merge beside readers.
  struct Run {
    Run(Memory& memory, std::size_t n) : items(memory.take(n)), size(n) {}
    const Item* begin() const { return items.get(); }
    const Item* end() const { return items.get() + size; }
    typename Memory::Items items;
    std::size_t size;
  };
  using Runs = std::vector<std::shared_ptr<const Run>>;

  // How many items of each run lie before a place in the order.
  using Splits = std::vector<std::size_t>;
  // The samples of one reward, and where they lie in each run.
  struct Block {
    Key key;
    Splits begin, end;
  };
  // The boundaries of the current order, and how many items of each run lie before each of them.
  struct Cuts {
    std::vector<Item> boundaries;  // K - 1, or none
    std::vector<Key> thresholds;   // as many
    std::vector<Splits> splits;    // [j][run], j = 0..K: size of the best j
  };

  // The key of every sample by id. Chunked: growing moves nothing.
  class Slots {
   public:
    static constexpr std::int64_t kChunk = (std::int64_t{1} << 21) / sizeof(Key);  // a huge page

    void reserve(std::int64_t size);                   // memory up to there, not yet readable
    void publish(std::int64_t size) { size_ = size; }  // readable up to there: it is written
    Key at(std::int64_t id) const { return chunks_[id / kChunk][id % kChunk]; }
    std::int64_t size() const { return size_; }
    // visit(first id, keys, how many) in spans of at most `longest`, id ascending.
    template <class Visit>
    void for_each_span(std::int64_t first, std::int64_t end, std::int64_t longest,
                       Visit visit) const;

   private:
    struct Free {
      void operator()(Key* keys) const;
    };
    std::vector<std::unique_ptr<Key[], Free>> chunks_;
    std::int64_t size_ = 0;
  };

  static constexpr std::size_t kMaxMerged = std::size_t{1} << 20;  // the largest merge
  static constexpr std::int64_t kBlock = 2048;                     // slots labelled at a time

  static Key key_of(Reward reward);
  static Reward reward_of(Key key);
  static Key key_in(Item item) { return static_cast<Key>(item >> kKeyBits); }
  static Key tie_in(Item item) { return static_cast<Key>(item); }
  static std::int64_t label_of(Item item, const std::vector<Item>& boundaries);
  Key tie_of(std::int64_t id) const;
  std::int64_t id_of(Key tie) const;

  void sort(Run& run);
  std::shared_ptr<const Run> merge(const Run& a, const Run& b);
  void push(Runs& runs, std::shared_ptr<const Run> run);
  static Splits split_at_rank(const Runs& runs, std::size_t rank, Splits low, Splits high);
  // The caller holds a mutex that keeps runs_ as it is.
  std::shared_ptr<Cuts> no_cuts() const;  // all samples in quantile 0
  std::shared_ptr<const Cuts> own_cuts() const;
  void split_runs(Cuts& cuts) const;
  Item last_before(const Splits& split) const;
  Block block_at(const Splits& split) const;
  static std::size_t end_of(const Run& run, std::size_t at, Item item);
  std::shared_ptr<const Cuts> cuts() const;
  static void require_numbered(std::int64_t n);

  const int quantiles_;
  const Ties ties_;
  const Remainder remainder_;
  const std::unique_ptr<const Bijection> tie_bijection_;

  std::mutex write_mutex_;  // held by a writer throughout, so it may read below
  Memory memory_;           // outlives the runs; a run is given up under write_mutex_ alone
  mutable std::shared_mutex state_mutex_;  // held exclusively to change what is below
  Runs runs_;                              // run i holds older ids than run i + 1
  Slots slots_;
  bool imposed_ = false;
  mutable std::mutex cuts_mutex_;             // readers fill this cache under it
  mutable std::shared_ptr<const Cuts> cuts_;  // null: not computed since the last change
};

extern template class QuantilePool<float>;
extern template class QuantilePool<double>;

}  // namespace quark
