// The native library's torch ops. Python defines the public ops; these are what their impl="native" calls.

#include <torch/library.h>

#include "cpu/linear_argmax.h"

// Read from the file by bevt_kernels/native.py, so that a library built for another torch is named, not loaded.
extern "C" __attribute__((used, visibility("default"))) const char bevt_kernels_build[] =
    "bevt_kernels native library, torch " BEVT_TORCH_VERSION;

TORCH_LIBRARY_FRAGMENT(bevt_kernels, m) {
  m.def("linear_argmax_native(Tensor x, Tensor weight, Tensor bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(bevt_kernels, CPU, m) { m.impl("linear_argmax_native", &bevt_kernels::linear_argmax); }
