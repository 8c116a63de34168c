#include "rows.hpp"

#include <stdexcept>

namespace quark {

namespace {

// How many elements the rows reach from `data` on, or -1 if that is beyond 64 bits.
int64_t extent(const Rows& rows, int64_t n, int64_t width) {
  int64_t outer, inner, sum;
  if (__builtin_mul_overflow(n / rows.inner - 1, rows.outer_stride, &outer) ||
      __builtin_mul_overflow(rows.inner - 1, rows.inner_stride, &inner) ||
      __builtin_add_overflow(outer, inner, &sum) || __builtin_add_overflow(sum, width, &sum))
    return -1;
  return sum;
}

}  // namespace

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

bool is_aligned(const void* data, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
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

}  // namespace quark
