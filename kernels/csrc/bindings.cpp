// The native library's torch ops. Python defines the public ops; these are what their impl="native" calls.

#include <torch/library.h>

#include "cpu/conv3x3.h"
#include "cpu/linear.h"
#include "cpu/linear_argmax.h"
#include "cpu/masked_linear_cross_entropy.h"
#include "cpu/window_attention.h"

// Read from the file by bevt_kernels/native.py, so that a library built for another torch is named, not loaded.
extern "C" __attribute__((used, visibility("default"))) const char bevt_kernels_build[] =
    "bevt_kernels native library, torch " BEVT_TORCH_VERSION;

TORCH_LIBRARY_FRAGMENT(bevt_kernels, m) {
  m.def("conv3x3_native(Tensor x, Tensor weight, Tensor bias, bool relu) -> Tensor");
  m.def("linear_forward_native(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward_native(Tensor grad_out, Tensor x, Tensor weight, bool[3] output_mask) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def("linear_argmax_native(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "masked_linear_cross_entropy_native(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor index, "
      "bool[3] output_mask) "
      "-> (Tensor loss, Tensor accuracy, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "window_attention_forward_native(Tensor qkv, Tensor bias_table, int num_heads, int[3] window_size, int[3] shift, "
      "int[3] table_window, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "window_attention_backward_native(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor out, Tensor lse, "
      "int num_heads, int[3] window_size, int[3] shift, int[3] table_window, float scale, bool train_table) "
      "-> (Tensor grad_qkv, Tensor grad_bias_table)");
}

TORCH_LIBRARY_IMPL(bevt_kernels, CPU, m) {
  m.impl("conv3x3_native", &bevt_kernels::conv3x3);
  m.impl("linear_forward_native", &bevt_kernels::linear_forward);
  m.impl("linear_backward_native", &bevt_kernels::linear_backward);
  m.impl("linear_argmax_native", &bevt_kernels::linear_argmax);
  m.impl("masked_linear_cross_entropy_native", &bevt_kernels::masked_linear_cross_entropy);
  m.impl("window_attention_forward_native", &bevt_kernels::window_attention_forward);
  m.impl("window_attention_backward_native", &bevt_kernels::window_attention_backward);
}
