"""The torch ops `masked_linear_cross_entropy_forward` and `_backward`: schemas, fakes, FLOP formulas."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bevt_kernels.masked_linear_cross_entropy import reference
from bevt_kernels.registration import define, statistics_dtype
from bevt_kernels.select import float_reasons, register

_INPUTS = "Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor index"

register("masked_linear_cross_entropy", "reference", float_reasons)


def _forward_fake(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(hidden.dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty((), dtype=dtype)


def _backward_fake(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _forward_flops(
    hidden: Sequence[int], weight: Sequence[int], bias: Sequence[int], targets: Sequence[int], index: Sequence[int]
) -> int:
    """One K x C x V product; every slot counts, used or not."""
    return 2 * index[0] * weight[0] * weight[1]


def _backward_flops(grad_loss: Sequence[int], *inputs: Sequence[int]) -> int:
    """The two products of a linear layer's backward; logits that are computed a second time are not counted."""
    return 2 * _forward_flops(*inputs[:5])


forward = define(
    "masked_linear_cross_entropy_forward",
    f"({_INPUTS}, str impl) -> (Tensor loss, Tensor accuracy)",
    {"reference": reference.forward},
    _forward_fake,
    _forward_flops,
)
backward = define(
    "masked_linear_cross_entropy_backward",
    f"(Tensor grad_loss, {_INPUTS}, str impl) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    {"reference": reference.backward},
    _backward_fake,
    _backward_flops,
)
