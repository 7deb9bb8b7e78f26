// The inner loop of every matrix product: kRows rows of the left factor, broadcast, times two vectors of columns of the
// right factor, with the sums in registers. Included as vectors.h is.

#pragma once

#include "vectors.h"

namespace bevt_kernels {
namespace BEVT_INSTRUCTIONS {
namespace {

// kRows * kWide sums, kWide columns and a broadcast fill the 16 vector registers, or as many as hide the latency of 32.
constexpr int kRows = kLanes == 16 ? 8 : 6;
constexpr int kWide = 2;
constexpr int kColumns = kWide * kLanes;
// Products are summed over so many terms and then over these sums: one run over 1024 terms broke the error rule.
constexpr int64_t kBlock = 64;

// Unrolled, so that the sums stay in registers.
template <int kVectors, class Body>
BEVT_INLINE void for_sums(Body body) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) body(r, v);
  }
}

template <int kVectors>
using Sums = Vector[kRows][kVectors];

// The sums over k < depth of left[r][k] * right[k][column]. `right` has row stride `right_stride`; `left` has row
// stride `left_stride`, or, kTransposed, is indexed [k][r] with that stride of k.
template <int kVectors, bool kTransposed>
BEVT_INLINE void sum_products(int64_t depth, const float* left, int64_t left_stride, const float* right,
                              int64_t right_stride, Sums<kVectors>& sums) {
  for_sums<kVectors>([&](int r, int v) BEVT_INLINED { sums[r][v] = Vector{}; });
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) column[v] = load(right + k * right_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector x = broadcast(kTransposed ? left[k * left_stride + r] : left[r * left_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += x * column[v];
    }
  }
}

// Adds sums to rows of memory, or, at the first block of a depth, writes them.
template <int kVectors>
BEVT_INLINE void accumulate(const Sums<kVectors>& sums, bool first, float* target, int64_t stride) {
  for_sums<kVectors>([&](int r, int v) BEVT_INLINED {
    float* at = target + r * stride + v * kLanes;
    store(at, first ? sums[r][v] : load(at) + sums[r][v]);
  });
}

}  // namespace
}  // namespace BEVT_INSTRUCTIONS
}  // namespace bevt_kernels
