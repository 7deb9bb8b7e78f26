// Matrix products of float32 for the ops in this library.
//
// Not torch's: its CPU builds multiply with MKL, which takes AVX2 on AMD processors that have AVX-512
// (bevt_kernels/linear/README.md).

#pragma once

#include <ATen/core/Tensor.h>

#include "product_kernel.h"

namespace bevt_kernels {

// target = left right + bias, or, `add`, target += left right, of float32 matrices: rows of `target` are adjacent
// numbers, `left` and `right` have a stride of 1, `bias` is adjacent or undefined. They must outlive the product.
Product product_of(const at::Tensor& target, const at::Tensor& left, const at::Tensor& right, bool add = false,
                   const at::Tensor& bias = {});

// On the calling thread.
void multiply_alone(const Product& product);

// Shared out among torch's threads; the same bits however many there are. Profiles show it with rows, columns, depth.
void multiply(const Product& product);

}  // namespace bevt_kernels
