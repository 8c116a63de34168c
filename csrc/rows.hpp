// Rows of a tensor where they lie, and the checks that hold them to their memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace quark {

enum class DType { f32, bf16, f16 };

// Rows where they lie: row n starts at element (n / inner) * outer_stride +
// (n % inner) * inner_stride, so that logits[:, :-1] of a batch needs no copy. The elements of one
// row are adjacent. `elements` is how many of the dtype the memory holds from `data` on.
struct Rows {
  void* data;
  DType dtype;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
  int64_t elements;
};

// Each throws std::invalid_argument, which names the value, for what does not hold.
void require(bool holds, const std::string& what);
// That n rows of `width` columns can be walked and end within their memory.
void require_within_memory(const std::string& name, const Rows& rows, int64_t n, int64_t width);

bool is_aligned(const void* data, size_t bytes);

}  // namespace quark
