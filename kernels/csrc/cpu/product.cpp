#include "product.h"

#include <ATen/record_function.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "instructions.h"

namespace bevt_kernels {
namespace {

// Multiples of both kernels' tiles of rows (6 and 8) and of columns (16 and 32).
constexpr int64_t kTileRows = 24, kTileColumns = 32;
// Rows that meet a panel of the right factor before the next is copied: a copy is 2 % of 1008 rows' arithmetic.
constexpr int64_t kMostRows = 1008;

int64_t parts(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace

Product product_of(const at::Tensor& target, const at::Tensor& left, const at::Tensor& right, bool add,
                   const at::Tensor& bias) {
  return {.rows = left.size(0),
          .columns = right.size(1),
          .depth = left.size(1),
          .left = left.const_data_ptr<float>(),
          .left_row = left.stride(0),
          .left_depth = left.stride(1),
          .right = right.const_data_ptr<float>(),
          .right_depth = right.stride(0),
          .right_column = right.stride(1),
          .bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr,
          .target = target.mutable_data_ptr<float>(),
          .target_row = target.stride(0),
          .add = add};
}

void multiply_alone(const Product& product) {
  static const ProductKernels& chosen = BEVT_CHOOSE(product);
  chosen.multiply(product);
}

void multiply(const Product& product) {
  const int64_t rows = product.rows, columns = product.columns;
  if (rows == 0 || columns == 0) return;
  RECORD_FUNCTION("bevt_kernels::product", std::vector<c10::IValue>({rows, columns, product.depth}));
  // The longer side is cut, and the other one where that does not give every thread a part.
  const int64_t threads = at::get_num_threads();
  int64_t row_block, column_block;
  if (rows >= columns) {
    row_block = block_size(rows, kTileRows, kMostRows);
    column_block = share(columns, std::max<int64_t>(threads / parts(rows, row_block), 1), kTileColumns);
  } else {
    column_block = share(columns, threads, kTileColumns);
    row_block = share(rows, std::max<int64_t>(threads / parts(columns, column_block), 1), kTileRows);
  }
  const int64_t across = parts(columns, column_block);
  at::parallel_for(0, parts(rows, row_block) * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * row_block, column = i % across * column_block;
      Product part = product;
      part.rows = std::min(row_block, rows - row);
      part.columns = std::min(column_block, columns - column);
      part.left += row * product.left_row;
      part.right += column * product.right_column;
      part.target += row * product.target_row + column;
      if (product.bias != nullptr) part.bias += column;
      multiply_alone(part);
    }
  });
}

}  // namespace bevt_kernels
