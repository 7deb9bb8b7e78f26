// A matrix product on one thread, at one instruction set (vectors.h).
//
// Of the right factor kDepth rows of kColumns columns at a time are copied into a panel that stays in the L1 cache
// while all rows of the left factor, which are read in place, meet it. Sums go over kDepth terms in registers, and then
// over these sums in memory: one run over thousands of terms would break the error rule.

#include "product_kernel.h"

#include "sums.h"

namespace bevt_kernels {
namespace BEVT_INSTRUCTIONS {
namespace {

constexpr int64_t kDepth = 256;

// The lanes of a and b in turns: those of the lower halves, and of the upper ones.
BEVT_INLINE void interleave(Vector a, Vector b, Vector& lower, Vector& upper) {
#if defined(__AVX512F__)
  lower = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  upper = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  lower = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  upper = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  lower = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  upper = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// target[k][lane] = source[lane * stride + k] for k < kLanes; rows of the target are kColumns apart.
BEVT_INLINE void transpose(const float* source, int64_t stride, float* target) {
  Vector x[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = load(source + i * stride);
#pragma GCC unroll 4
  for (int done = 1; done < kLanes; done *= 2) {
    Vector y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) interleave(x[i], x[i + kLanes / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(target + i * kColumns, x[i]);
}

// panel[k][j] = right[first_depth + k][first_column + j], zeros past the last column.
void copy_panel(const Product& p, int64_t first_depth, int64_t depth, int64_t first_column, float* panel) {
  const float* source = p.right + first_depth * p.right_depth + first_column * p.right_column;
  const int64_t columns = minimum(kColumns, p.columns - first_column);
  int64_t done = 0;
  if (columns == kColumns) {
    if (p.right_column == 1) {
      for (; done < depth; ++done) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < kColumns; j += kLanes) {
          store(panel + done * kColumns + j, load(source + done * p.right_depth + j));
        }
      }
    } else if (p.right_depth == 1) {
      for (; done + kLanes <= depth; done += kLanes) {
        for (int64_t j = 0; j < kColumns; j += kLanes) {
          transpose(source + j * p.right_column + done, p.right_column, panel + done * kColumns + j);
        }
      }
    }
  }
  for (int64_t k = done; k < depth; ++k) {
    for (int64_t j = 0; j < kColumns; ++j) {
      panel[k * kColumns + j] = j < columns ? source[k * p.right_depth + j * p.right_column] : 0;
    }
  }
}

// The sums of kRows rows with a panel, into target[r][j].
template <bool kTransposed>
BEVT_INLINE void multiply_tile(int64_t depth, const float* left, int64_t left_stride, const float* panel,
                               const float* bias, bool add, float* target, int64_t target_row) {
  alignas(64) float totals[kRows * kColumns];
  Sums<kWide> sums;
  for (int64_t k = 0;; k += kBlock) {
    const int64_t terms = minimum(kBlock, depth - k);
    sum_products<kWide, kTransposed>(terms, left + k * (kTransposed ? left_stride : 1), left_stride,
                                     panel + k * kColumns, kColumns, sums);
    if (k > 0) {
      for_sums<kWide>([&](int r, int v) BEVT_INLINED { sums[r][v] += load(totals + r * kColumns + v * kLanes); });
    }
    if (k + kBlock >= depth) break;
    for_sums<kWide>([&](int r, int v) BEVT_INLINED { store(totals + r * kColumns + v * kLanes, sums[r][v]); });
  }
  for_sums<kWide>([&](int r, int v) BEVT_INLINED {
    float* at = target + r * target_row + v * kLanes;
    Vector x = sums[r][v];
    if (add) {
      x += load(at);
    } else if (bias != nullptr) {
      x += load(bias + v * kLanes);
    }
    store(at, x);
  });
}

// The same for `rows` of at most kRows rows and `columns` of at most kColumns columns, in copies of that size.
void multiply_edge(int64_t depth, int64_t rows, int64_t columns, const float* left, int64_t left_row,
                   int64_t left_depth, const float* panel, const float* bias, bool add, float* target,
                   int64_t target_row) {
  alignas(64) float group[kDepth * kRows], padded_bias[kColumns] = {}, tile[kRows * kColumns] = {};
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < kRows; ++r) {
      group[k * kRows + r] = r < rows ? left[r * left_row + k * left_depth] : 0;
    }
  }
  for (int64_t j = 0; j < columns && bias != nullptr; ++j) padded_bias[j] = bias[j];
  for (int64_t r = 0; r < rows && add; ++r) {
    for (int64_t j = 0; j < columns; ++j) tile[r * kColumns + j] = target[r * target_row + j];
  }
  multiply_tile<true>(depth, group, kRows, panel, bias == nullptr ? nullptr : padded_bias, add, tile, kColumns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; ++j) target[r * target_row + j] = tile[r * kColumns + j];
  }
}

void multiply(const Product& p) {
  alignas(64) float panel[kDepth * kColumns];
  int64_t first_depth = 0;
  do {  // once where there is nothing to add up
    const int64_t depth = minimum(kDepth, p.depth - first_depth);
    const bool add = p.add || first_depth > 0;
    for (int64_t column = 0; column < p.columns; column += kColumns) {
      const int64_t columns = minimum(kColumns, p.columns - column);
      const float* bias = p.bias == nullptr ? nullptr : p.bias + column;
      copy_panel(p, first_depth, depth, column, panel);
      for (int64_t row = 0; row < p.rows; row += kRows) {
        const float* left = p.left + row * p.left_row + first_depth * p.left_depth;
        float* target = p.target + row * p.target_row + column;
        const int64_t rows = minimum(kRows, p.rows - row);
        if (rows < kRows || columns < kColumns) {
          multiply_edge(depth, rows, columns, left, p.left_row, p.left_depth, panel, bias, add, target, p.target_row);
        } else if (p.left_depth == 1) {
          multiply_tile<false>(depth, left, p.left_row, panel, bias, add, target, p.target_row);
        } else {
          multiply_tile<true>(depth, left, p.left_depth, panel, bias, add, target, p.target_row);
        }
      }
    }
    first_depth += kDepth;
  } while (first_depth < p.depth);
}

}  // namespace

const ProductKernels product = {multiply};

}  // namespace BEVT_INSTRUCTIONS
}  // namespace bevt_kernels
