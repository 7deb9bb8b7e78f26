"""The torch op `linear_argmax`: schema, fake, FLOP formula, and which implementation serves what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bevt_kernels import native
from bevt_kernels.linear_argmax import reference
from bevt_kernels.registration import define
from bevt_kernels.select import float_reasons, register, triton_reasons

register("linear_argmax", "triton", triton_reasons)
register("linear_argmax", "native", native.reasons)
register("linear_argmax", "reference", float_reasons)


def _native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    native.require("linear_argmax")
    return torch.ops.bevt_kernels.linear_argmax_native(x, weight, bias)


def _triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from bevt_kernels.linear_argmax import triton_forward

    return triton_forward.linear_argmax(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.int64)


def _flops(x: Sequence[int], weight: Sequence[int], bias: Sequence[int]) -> int:
    return 2 * x[0] * weight[0] * weight[1]


op = define(
    "linear_argmax",
    "(Tensor x, Tensor weight, Tensor bias, str impl) -> Tensor",
    {"triton": _triton, "native": _native, "reference": reference.linear_argmax},
    _fake,
    _flops,
)
