// A linear layer and its gradients: y = x W^T + b, dx = dy W, dW = dy^T x, db = the sum of dy over rows.
// Letters: M rows (x without its last axis), C channels, N outputs.

#include "linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "instructions.h"
#include "product.h"

namespace bevt_kernels {
namespace {

constexpr int64_t kColumnBlock = 64;

// target[j] = the sum over rows of source[row][j], j < columns <= kColumnBlock: of 16 rows in float32, of these in
// float64.
BEVT_VECTORISED void sum_rows(const float* source, int64_t rows, int64_t stride, int64_t columns, float* target) {
  double totals[kColumnBlock] = {};
  for (int64_t first = 0; first < rows; first += 16) {
    float sums[kColumnBlock] = {};
    for (int64_t row = first; row < std::min<int64_t>(first + 16, rows); ++row) {
      for (int64_t j = 0; j < columns; ++j) sums[j] += source[row * stride + j];
    }
    for (int64_t j = 0; j < columns; ++j) totals[j] += static_cast<double>(sums[j]);
  }
  for (int64_t j = 0; j < columns; ++j) target[j] = static_cast<float>(totals[j]);
}

// (..., C) as adjacent rows (M, C).
at::Tensor rows_of(const at::Tensor& x) {
  int64_t rows = 1;
  for (const int64_t size : x.sizes().slice(0, x.dim() - 1)) rows *= size;
  return x.contiguous().view({rows, x.size(-1)});
}

// `weight`, or a copy, with one stride of 1.
at::Tensor dense(const at::Tensor& weight) {
  return weight.stride(0) == 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
}

}  // namespace

at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor rows = rows_of(x), w = dense(weight);
  const at::Tensor b = bias.has_value() ? bias->contiguous() : at::Tensor();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = w.size(0);
  const at::Tensor out = at::empty(sizes, x.options());
  multiply(product_of(rows_of(out), rows, w.t(), false, b));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad_out, const at::Tensor& x,
                                                               const at::Tensor& weight,
                                                               std::array<bool, 3> output_mask) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::Tensor grad = rows_of(grad_out);
  const int64_t rows = grad.size(0), outputs = weight.size(0);
  const auto gradient = [&](at::IntArrayRef sizes, bool wanted) {
    return at::empty(wanted ? sizes : at::IntArrayRef({0}), x.options());
  };
  const at::Tensor grad_x = gradient(x.sizes(), output_mask[0]);
  if (output_mask[0]) multiply(product_of(rows_of(grad_x), grad, dense(weight)));
  const at::Tensor grad_weight = gradient(weight.sizes(), output_mask[1]);
  if (output_mask[1]) multiply(product_of(grad_weight, grad.t(), rows_of(x)));
  const at::Tensor grad_bias = gradient({outputs}, output_mask[2]);
  if (output_mask[2]) {  // not torch's sum, which depends on the number of threads
    const float* from = grad.const_data_ptr<float>();
    float* to = grad_bias.mutable_data_ptr<float>();
    at::parallel_for(0, outputs, kColumnBlock, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kColumnBlock) {
        sum_rows(from + first, rows, outputs, std::min(kColumnBlock, end - first), to + first);
      }
    });
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace bevt_kernels
