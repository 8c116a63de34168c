// Work on rows, shared out to threads.
#pragma once

#include <cstdint>
#include <functional>

namespace quark {

// Rows begin to end - 1, by the thread of that number.
using RowWork = std::function<void(int64_t thread, int64_t begin, int64_t end)>;

// How many of the threads have rows enough to be worth waking, 1 at least.
int64_t useful_threads(int64_t rows, int64_t width, int threads);

// Call work until every row was in one call. Numbers of threads are below useful_threads(); each
// thread takes the next rows when it is done with some. `work` must not throw.
void over_rows(int64_t rows, int64_t width, int threads, const RowWork& work);

}  // namespace quark
