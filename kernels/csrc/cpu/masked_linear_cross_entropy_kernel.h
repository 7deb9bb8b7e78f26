// What the instruction sets' kernels and their caller share: plain data only, as in window_attention_kernel.h.

#pragma once

#include <cstdint>

namespace bevt_kernels {

// A row of logits has room for a multiple of so many.
constexpr int64_t kRowUnit = 16;

// One row's statistics. Its loss is log(sum) - (logit - top).
struct RowStatistics {
  float top;      // the largest logit
  float logit;    // the target's
  float sum;      // of exp(logit - top)
  bool is_first;  // whether the target is the argmax: the lowest class of the largest logit, or of the first NaN
};

struct MaskedLinearCrossEntropyKernels {
  // z[j], j < classes, are products of a row with the weight. They become exp(z[j] + bias[j] - top), less their sum at
  // the target; up to the next multiple of kRowUnit zeros.
  RowStatistics (*exponentials)(float* z, const float* bias, int64_t classes, int64_t target);
  // z[r][j] /= divisors[r], and the quotients' sum over r < rows is added to totals[j]. `columns` is a multiple of
  // kRowUnit and at most 256.
  void (*divide)(float* z, int64_t stride, int64_t rows, int64_t columns, const float* divisors, double* totals);
};

namespace baseline {
extern const MaskedLinearCrossEntropyKernels masked_linear_cross_entropy;
}
namespace avx2 {
extern const MaskedLinearCrossEntropyKernels masked_linear_cross_entropy;
}
namespace avx512 {
extern const MaskedLinearCrossEntropyKernels masked_linear_cross_entropy;
}

}  // namespace bevt_kernels
