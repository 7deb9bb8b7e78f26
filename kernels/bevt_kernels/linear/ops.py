"""The torch ops `linear_forward` and `linear_backward`: schemas, fakes, FLOP formulas, and what serves what.

The reference is torch's own function, which needs no op around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bevt_kernels import native
from bevt_kernels.registration import define
from bevt_kernels.select import float_reasons, register

register("linear", "native", partial(native.reasons, only_float32=True))
register("linear", "reference", float_reasons)


def _native_forward(*args: object) -> Tensor:
    native.require("linear")
    return torch.ops.bevt_kernels.linear_forward_native(*args)


def _native_backward(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    native.require("linear")
    return torch.ops.bevt_kernels.linear_backward_native(*args)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = (
        x.new_empty(shape if wanted else (0,))
        for shape, wanted in zip((x.shape, weight.shape, weight.shape[:1]), output_mask)
    )
    return grad_x, grad_weight, grad_bias


def _forward_flops(x: Sequence[int], weight: Sequence[int], bias: Sequence[int] | None) -> int:
    return 2 * math.prod(x) * weight[0]


def _backward_flops(
    grad_out: Sequence[int], x: Sequence[int], weight: Sequence[int], output_mask: Sequence[bool]
) -> int:
    return 2 * math.prod(x) * weight[0] * sum(output_mask[:2])


forward = define(
    "linear_forward",
    "(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor",
    {"native": _native_forward},
    _forward_fake,
    _forward_flops,
)
backward = define(
    "linear_backward",
    # What `output_mask` does not ask for is (0,).
    "(Tensor grad_out, Tensor x, Tensor weight, bool[3] output_mask, str impl) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    {"native": _native_backward},
    _backward_fake,
    _backward_flops,
)
