// The choice of the instruction-set level, the threads, and the sum of the rows' losses.

#include "quark_loss.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
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

// How an OpenMP runtime starts the threads of a parallel region: part of the ABI of every program
// that gcc compiled with -fopenmp, and offered by the runtimes of clang and Intel, too.
using StartRegion = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

StartRegion openmp_of_this_process() {
#ifdef __linux__
  return reinterpret_cast<StartRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

// Call run on several threads at once. They are torch's own, if the process has its OpenMP runtime:
// that keeps its idle threads spinning for some milliseconds after every operation, on the cores
// that threads of ours would wait for. We do not link to OpenMP, as that would be a second runtime.
template <class Run>
void on_threads(int64_t threads, Run& run) {
  static const StartRegion start_region = openmp_of_this_process();
  if (threads > 1 && start_region) {
    start_region([](void* data) { (*static_cast<Run*>(data))(); }, &run, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < threads; ++i) helpers.emplace_back([&run] { run(); });
  } catch (const std::system_error&) {
    // The system gives no more threads: those that started, and this one, do all the rows.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

// Waking a thread costs tens of microseconds, so each must have rows enough to be worth it.
template <class Work>
void over_rows(const Problem& p, int threads, const Work& work) {
  constexpr int64_t kElementsWorthAThread = int64_t{1} << 18;
  constexpr int64_t kElementsPerGrab = int64_t{1} << 16;
  const int64_t grab = std::max<int64_t>(1, kElementsPerGrab / std::max<int64_t>(1, p.width));
  const int64_t useful =
      std::min((p.rows + grab - 1) / grab, p.rows * p.width / kElementsWorthAThread);
  std::atomic<int64_t> next{0};
  auto run = [&] {
    for (int64_t n = next.fetch_add(grab); n < p.rows; n = next.fetch_add(grab))
      work(n, std::min(n + grab, p.rows));
  };
  on_threads(std::max<int64_t>(1, std::min<int64_t>(threads, useful)), run);
}

// --- Checks -----------------------------------------------------------------------------------

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

bool is_aligned(const void* data, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

// How many elements the rows reach from `data` on, or -1 if that is beyond 64 bits.
int64_t extent(const Rows& rows, int64_t n, int64_t width) {
  int64_t outer, inner, sum;
  if (__builtin_mul_overflow(n / rows.inner - 1, rows.outer_stride, &outer) ||
      __builtin_mul_overflow(rows.inner - 1, rows.inner_stride, &inner) ||
      __builtin_add_overflow(outer, inner, &sum) || __builtin_add_overflow(sum, width, &sum))
    return -1;
  return sum;
}

void require_within_memory(const std::string& name, const Rows& rows, int64_t n, int64_t width) {
  require(rows.inner >= 1 && rows.outer_stride >= 0 && rows.inner_stride >= 0,
          name + ": rows of " + std::to_string(rows.inner) + " with the strides " +
              std::to_string(rows.outer_stride) + " and " + std::to_string(rows.inner_stride) +
              " cannot be walked");
  if (n == 0) return;
  require(n % rows.inner == 0, name + ": " + std::to_string(n) + " rows are not whole groups of " +
                                   std::to_string(rows.inner));
  require(rows.data != nullptr, name + " has no memory");
  require(is_aligned(rows.data, rows.dtype == DType::f32 ? sizeof(float) : sizeof(uint16_t)),
          name + " does not lie at a multiple of its element's size; pass a copy (clone())");
  const int64_t reached = extent(rows, n, width);
  require(reached >= 0 && reached <= rows.elements, name + ": rows reach beyond the " +
                                                        std::to_string(rows.elements) +
                                                        " elements of their memory");
}

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

const char* isa() { return level().name; }

double forward(const Problem& p, const RowOutputs& out, const Rows* grad, int threads) {
  check(p);
  if (grad) check_gradient(p, *grad);
  require(p.rows == 0 || (out.nll && out.kl && out.entropy), "the outputs have no memory");
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
  check(p);
  check_gradient(p, grad);
  require(p.rows == 0 || stats, "the statistics have no memory");
  const auto rows = level().backward_rows;
  over_rows(p, threads,
            [&](int64_t begin, int64_t end) { rows(p, stats, scale, grad, begin, end); });
}

}  // namespace quark
