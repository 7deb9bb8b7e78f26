// Between the products of masked linear cross-entropy: softmax minus one-hot, at one instruction set (vectors.h).

#include "masked_linear_cross_entropy_kernel.h"

#include "vectors.h"

namespace bevt_kernels {
namespace BEVT_INSTRUCTIONS {
namespace {

struct Maximum {
  float value;  // of numbers; -inf for none
  bool nan;
};

// z[j] += bias[j] for j < n, and their maximum.
Maximum add_bias(float* z, const float* bias, int64_t n) {
  Vector tops = broadcast(-__builtin_inff());
  Mask nans = {};
  int64_t j = 0;
#pragma GCC unroll 4
  for (; j + kLanes <= n; j += kLanes) {
    const Vector x = load(z + j) + load(bias + j);
    store(z + j, x);
    tops = maximum(x, tops);
    nans |= x != x;
  }
  Maximum top{-__builtin_inff(), false};
  for (int lane = 0; lane < kLanes; ++lane) {
    top.value = tops[lane] > top.value ? tops[lane] : top.value;
    top.nan |= nans[lane] != 0;
  }
  for (; j < n; ++j) {
    z[j] += bias[j];
    top.value = z[j] > top.value ? z[j] : top.value;
    top.nan |= z[j] != z[j];
  }
  return top;
}

RowStatistics exponentials(float* z, const float* bias, int64_t classes, int64_t target) {
  const Maximum before = add_bias(z, bias, target), from = add_bias(z + target, bias + target, classes - target);
  RowStatistics row;
  row.top = before.value > from.value ? before.value : from.value;
  row.logit = z[target];
  const bool largest = !from.nan && from.value == row.logit && (target == 0 || before.value < row.logit);
  row.is_first = !before.nan && (row.logit != row.logit || largest);

  const int64_t columns = (classes + kRowUnit - 1) / kRowUnit * kRowUnit;
  for (int64_t j = classes; j < columns; ++j) z[j] = -__builtin_inff();
  constexpr int kVectors = kRowUnit / kLanes;
  Vector sums[kVectors] = {};
  for (int64_t j = 0; j < columns; j += kRowUnit) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Vector x = exp2((load(z + j + v * kLanes) - row.top) * kLog2E);
      sums[v] += x;
      store(z + j + v * kLanes, x);
    }
  }
  for (int v = 1; v < kVectors; ++v) sums[0] += sums[v];
  row.sum = sum(sums[0]);
  z[target] -= row.sum;
  return row;
}

void divide(float* z, int64_t stride, int64_t rows, int64_t columns, const float* divisors, double* totals) {
  // Sums of 16 rows in float32, and these in float64: with 64, rows that are alike broke the error rule.
  constexpr int64_t kBlock = 16;
  float sums[256];
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t end = first + kBlock < rows ? first + kBlock : rows;
    for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
    for (int64_t r = first; r < end; ++r) {
      float* row = z + r * stride;
#pragma GCC unroll 2
      for (int64_t j = 0; j < columns; j += kLanes) {
        const Vector x = load(row + j) / divisors[r];
        store(row + j, x);
        store(sums + j, load(sums + j) + x);
      }
    }
    for (int64_t j = 0; j < columns; ++j) totals[j] += static_cast<double>(sums[j]);
  }
}

}  // namespace

const MaskedLinearCrossEntropyKernels masked_linear_cross_entropy = {exponentials, divide};

}  // namespace BEVT_INSTRUCTIONS
}  // namespace bevt_kernels
