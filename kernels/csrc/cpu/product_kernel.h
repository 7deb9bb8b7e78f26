// What the instruction sets' matrix products and their caller share: plain data only, as in window_attention_kernel.h.

#pragma once

#include <cstdint>

namespace bevt_kernels {

// target = left right + bias, or target += left right: (rows, columns) of (rows, depth) and (depth, columns), float32.
struct Product {
  int64_t rows, columns, depth;
  const float* left;
  int64_t left_row, left_depth;  // strides in floats, one of which is 1
  const float* right;
  int64_t right_depth, right_column;  // likewise
  const float* bias;                  // (columns), or null
  float* target;                      // rows of adjacent columns
  int64_t target_row;
  bool add;  // to what is there; then without bias
};

struct ProductKernels {
  // An element is the same to the last bit in whatever product of the same depth its row and column stand.
  void (*multiply)(const Product&);
};

namespace baseline {
extern const ProductKernels product;
}
namespace avx2 {
extern const ProductKernels product;
}
namespace avx512 {
extern const ProductKernels product;
}

}  // namespace bevt_kernels
