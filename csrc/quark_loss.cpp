// The choice of the instruction-set level, the threads, and the sum of the rows' losses.

#include "quark_loss.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace quark {

#define QUARK_DECLARE(level)                                                                  \
  namespace level {                                                                           \
  void forward_rows(const Problem&, const RowOutputs&, const Rows*, int64_t, int64_t);        \
  void backward_rows(const Problem&, const RowStats*, double, const Rows&, int64_t, int64_t); \
  }

#ifdef QUARK_X86_64
QUARK_DECLARE(v2)
QUARK_DECLARE(v3)
QUARK_DECLARE(v4)
#else
QUARK_DECLARE(generic)
#endif

namespace {

struct Level {
  const char* name;
  bool supported;
  decltype(&QUARK_LOWEST::forward_rows) forward_rows;
  decltype(&QUARK_LOWEST::backward_rows) backward_rows;
};

Level choose_level() {
#define QUARK_ENTRY(level, supported) {#level, supported, level::forward_rows, level::backward_rows}
#ifdef QUARK_X86_64
  __builtin_cpu_init();
  const Level levels[] = {
      QUARK_ENTRY(v4, __builtin_cpu_supports("x86-64-v4") != 0),
      QUARK_ENTRY(v3, __builtin_cpu_supports("x86-64-v3") != 0),
      QUARK_ENTRY(v2, true),
  };
#else
  const Level levels[] = {QUARK_ENTRY(generic, true)};
#endif
  const char* asked = std::getenv("QUARK_FAST_ISA");
  std::string known;
  for (const Level& level : levels) {
    if (!asked || !*asked) {
      if (level.supported) return level;
      continue;
    }
    known += std::string(known.empty() ? "" : ", ") + level.name;
    if (std::strcmp(asked, level.name) != 0) continue;
    if (level.supported) return level;
    throw std::runtime_error(std::string("QUARK_FAST_ISA=") + asked +
                             ": this processor lacks that level; unset it or choose a lower one");
  }
  throw std::runtime_error(std::string("QUARK_FAST_ISA=") + (asked ? asked : "") +
                           " is not a level of this build; choose one of " + known);
}

const Level& level() {
  static const Level chosen = choose_level();
  return chosen;
}

// Threads of our own, for the length of one call: a second OpenMP runtime beside torch's would
// keep its idle threads spinning on the same cores. Starting one costs a few tens of
// microseconds, so each must have rows enough to be worth it.
template <class Work>
void over_rows(const Problem& p, int threads, const Work& work) {
  constexpr int64_t kElementsWorthAThread = int64_t{1} << 18;
  constexpr int64_t kElementsPerGrab = int64_t{1} << 16;
  const int64_t grab = std::max<int64_t>(1, kElementsPerGrab / std::max<int64_t>(1, p.width));
  const int64_t useful =
      std::min((p.rows + grab - 1) / grab, p.rows * p.width / kElementsWorthAThread);
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t n = next.fetch_add(grab); n < p.rows; n = next.fetch_add(grab))
      work(n, std::min(n + grab, p.rows));
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, useful); ++i) helpers.emplace_back(run);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started, and this one, do all the rows.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

const char* isa() { return level().name; }

int64_t first_bad_label(const Problem& p) {
  for (int64_t n = 0; n < p.rows; ++n)
    if (p.weights[n] != 0 && (p.labels[n] < 0 || p.labels[n] >= p.vocab)) return n;
  return -1;
}

double forward(const Problem& p, const RowOutputs& out, const Rows* grad, int threads) {
  const auto rows = level().forward_rows;
  over_rows(p, threads, [&](int64_t begin, int64_t end) { rows(p, out, grad, begin, end); });
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
  const auto rows = level().backward_rows;
  over_rows(p, threads,
            [&](int64_t begin, int64_t end) { rows(p, stats, scale, grad, begin, end); });
}

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace quark
