"""The torch op `conv3x3`: schema, fake, FLOP formula, and what serves what.

The reference is torch's own function, which needs no op around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bevt_kernels import native
from bevt_kernels.registration import define
from bevt_kernels.select import Spec, float_reasons, register


def _native_reasons(spec: Spec) -> list[str]:
    return native.reasons(spec, only_float32=True) + (["has no derivative"] if spec.needs_grad else [])


register("conv3x3", "native", _native_reasons)
register("conv3x3", "reference", float_reasons)


def _native(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    native.require("conv3x3")
    return torch.ops.bevt_kernels.conv3x3_native(x, weight, bias, relu)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    (images, _, height, width), outputs = x.shape, weight.shape[0]
    padded = -(-outputs // 16) * 16
    return x.new_empty((images, height, width, padded))[..., :outputs].permute(0, 3, 1, 2)


def _flops(x: Sequence[int], weight: Sequence[int], bias: Sequence[int], relu: bool) -> int:
    """The direct convolution's; Winograd's takes 36 products where it counts 144."""
    return 2 * math.prod(weight) * x[0] * x[2] * x[3]


def native_scratch(weight: Tensor, threads: int) -> int:
    """Bytes that native takes beside its output: the transformed weight, and each thread's tiles (conv3x3.cpp)."""
    outputs, channels = weight.shape[:2]
    outputs = min(outputs, max(1, (20 << 20) // (36 * 4 * max(1, channels)) // 32) * 32)
    return 36 * 4 * (channels * outputs + threads * 48 * (min(channels, 256) + outputs))


op = define(
    "conv3x3",
    "(Tensor x, Tensor weight, Tensor bias, bool relu, str impl) -> Tensor",
    {"native": _native},
    _fake,
    _flops,
)
