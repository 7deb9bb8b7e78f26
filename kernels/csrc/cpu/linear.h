#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace bevt_kernels {

// x (..., C), weight (N, C), bias (N) or none, float32 on the CPU and checked by the Python API -> (..., N).
at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// The gradients of x, weight and bias, or (0) where the mask does not ask for one.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad_out, const at::Tensor& x,
                                                               const at::Tensor& weight,
                                                               std::array<bool, 3> output_mask);

}  // namespace bevt_kernels
