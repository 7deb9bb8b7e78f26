#include "product.h"

#include <ATen/record_function.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "instructions.h"

namespace bevt_kernels {
namespace {

// Multiples of both kernels' tiles of rows (6 and 8) and of columns (16 and 32).
constexpr int64_t kRowUnit = 24, kColumnUnit = 32;
// Rows that meet a panel of the right factor before the next is copied: a copy is 2 % of 1008 rows' arithmetic.
constexpr int64_t kMostRows = 1008;

}  // namespace

void multiply_alone(const Product& product) {
  static const ProductKernels& chosen = BEVT_CHOOSE(product);
  chosen.multiply(product);
}

void multiply(const Product& product) {
  if (product.rows == 0 || product.columns == 0) return;
  RECORD_FUNCTION("bevt_kernels::product", std::vector<c10::IValue>({product.rows, product.columns, product.depth}));
  const bool by_rows = product.rows >= product.columns;
  const int64_t size = by_rows ? product.rows : product.columns;
  const int64_t block = by_rows ? block_size(size, kRowUnit, kMostRows)
                                : block_size(size, kColumnUnit, (size + kColumnUnit - 1) / kColumnUnit * kColumnUnit);
  at::parallel_for(0, (size + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * block; first < std::min(end * block, size); first += block) {
      const int64_t n = std::min(block, size - first);
      Product part = product;
      if (by_rows) {
        part.rows = n;
        part.left += first * product.left_row;
        part.target += first * product.target_row;
      } else {
        part.columns = n;
        part.right += first * product.right_column;
        part.target += first;
        if (product.bias != nullptr) part.bias += first;
      }
      multiply_alone(part);
    }
  });
}

}  // namespace bevt_kernels
