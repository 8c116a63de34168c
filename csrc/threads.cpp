#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace quark {

namespace {

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
  } catch (const std::bad_alloc&) {
    // Or no memory for one more. Not joined, they would end the process.
  }
  run();
  for (std::thread& helper : helpers) helper.join();
}

// Rows that a thread takes at a time.
int64_t grab_of(int64_t width) {
  constexpr int64_t kElementsPerGrab = int64_t{1} << 16;
  return std::max<int64_t>(1, kElementsPerGrab / std::max<int64_t>(1, width));
}

}  // namespace

// Waking a thread costs tens of microseconds, so each must have rows enough to be worth it.
int64_t useful_threads(int64_t rows, int64_t width, int threads) {
  constexpr int64_t kElementsWorthAThread = int64_t{1} << 18;
  const int64_t grab = grab_of(width);
  const int64_t useful = std::min((rows + grab - 1) / grab, rows * width / kElementsWorthAThread);
  return std::max<int64_t>(1, std::min<int64_t>(threads, useful));
}

void over_rows(int64_t rows, int64_t width, int threads, const RowWork& work) {
  const int64_t grab = grab_of(width);
  std::atomic<int64_t> next_row{0}, next_thread{0};
  auto run = [&] {
    const int64_t thread = next_thread.fetch_add(1);
    for (int64_t n = next_row.fetch_add(grab); n < rows; n = next_row.fetch_add(grab))
      work(thread, n, std::min(n + grab, rows));
  };
  on_threads(useful_threads(rows, width, threads), run);
}

}  // namespace quark
