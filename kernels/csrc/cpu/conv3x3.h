#pragma once

#include <ATen/core/Tensor.h>

namespace bevt_kernels {

// x (M, C, H, W), weight (N, C, 3, 3), bias (N), float32 on the CPU and checked by the Python API -> (M, N, H, W),
// channels-last: the convolution of x, or of max(x, 0), with stride 1 and zeros around. Fastest for x channels-last and
// a weight whose outputs are adjacent.
at::Tensor conv3x3(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, bool relu);

}  // namespace bevt_kernels
