#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace bevt_kernels {

// The ops of bevt_kernels/window_attention, on the CPU, checked by the Python API: qkv (B, D, H, W, 3 C) in float32,
// bfloat16 or float16, bias_table (rows, h) in float32; window, shift and table_window are three numbers each.
// -> out (B, D, H, W, C) in qkv's dtype, lse (B, h, D, H, W) in float32
std::tuple<at::Tensor, at::Tensor> window_attention_forward(const at::Tensor& qkv, const at::Tensor& bias_table,
                                                            int64_t heads, at::IntArrayRef window,
                                                            at::IntArrayRef shift, at::IntArrayRef table_window,
                                                            double scale);

// -> grad_qkv in qkv's dtype, grad_bias_table in float32, or (0) without train_table; the same bits for any number of
// threads
std::tuple<at::Tensor, at::Tensor> window_attention_backward(const at::Tensor& grad_out, const at::Tensor& qkv,
                                                             const at::Tensor& bias_table, const at::Tensor& out,
                                                             const at::Tensor& lse, int64_t heads,
                                                             at::IntArrayRef window, at::IntArrayRef shift,
                                                             at::IntArrayRef table_window, double scale,
                                                             bool train_table);

}  // namespace bevt_kernels
