"""Custom ops for shifted-window video transformers: window attention, masked linear cross-entropy, linear argmax,
and for CPUs a linear layer and a 3x3 convolution.

Importing this imports neither triton nor `bevt`, and works without the native library (`bevt_kernels.native.status()`
says whether it is there). Each op lives in a folder of its own, with its mathematics in the README.
"""

from bevt_kernels.conv3x3.api import conv3x3
from bevt_kernels.linear.api import linear
from bevt_kernels.linear_argmax.api import linear_argmax
from bevt_kernels.masked_linear_cross_entropy.api import masked_linear_cross_entropy
from bevt_kernels.select import NoImplementation, Spec, resolve
from bevt_kernels.window_attention.api import window_attention

__all__ = [
    "NoImplementation",
    "Spec",
    "conv3x3",
    "linear",
    "linear_argmax",
    "masked_linear_cross_entropy",
    "resolve",
    "window_attention",
]
