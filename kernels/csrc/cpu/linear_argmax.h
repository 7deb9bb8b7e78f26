#pragma once

#include <ATen/core/Tensor.h>

namespace bevt_kernels {

// x (M, C), weight (V, C), bias (V), each float32, bfloat16 or float16 on the CPU and checked by the Python API
// -> (M) int64: the class with the largest float32 product plus bias; ties to the lowest, a NaN wins.
at::Tensor linear_argmax(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace bevt_kernels
