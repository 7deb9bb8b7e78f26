// Matrix products of float32 for the ops in this library.
//
// Not torch's: its CPU builds multiply with MKL, which takes AVX2 on AMD processors that have AVX-512
// (bevt_kernels/linear/README.md).

#pragma once

#include "product_kernel.h"

namespace bevt_kernels {

// On the calling thread.
void multiply_alone(const Product& product);

// Shared out among torch's threads; the same bits however many there are. Profiles show it with rows, columns, depth.
void multiply(const Product& product);

}  // namespace bevt_kernels
