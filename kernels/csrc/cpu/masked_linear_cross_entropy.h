#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace bevt_kernels {

// hidden (M, C) float32, bfloat16 or float16, weight (V, C) and bias (V) in that dtype or float32, targets and index
// (K) int64, on the CPU and checked by the Python API but for their values. Returns loss and accuracy, float32 means
// over the used slots, and the gradients of the sum of their losses: (M, C) in the dtype of hidden, (V, C) and (V) in
// float32, or (0) where the mask does not ask for hidden's, weight's or bias'. ValueError: an index or target out of
// range in a used slot.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> masked_linear_cross_entropy(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& targets,
    const at::Tensor& index, std::array<bool, 3> output_mask);

}  // namespace bevt_kernels
