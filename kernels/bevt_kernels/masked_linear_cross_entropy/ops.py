"""The torch ops `masked_linear_cross_entropy` and `_forward`: schemas, fakes, FLOP formulas, and what serves what.

`_forward` also returns the gradients that `output_mask` asks for, of the sum of the slots' losses. The op that people
call returns them to nobody: its derivative (autograd.py) keeps them, scales them in place and hands them on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bevt_kernels import native
from bevt_kernels.masked_linear_cross_entropy import reference
from bevt_kernels.registration import define, statistics_dtype
from bevt_kernels.select import Spec, float_reasons, register, triton_reasons

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of `_forward`: loss, accuracy, gradients to hidden, weight and bias."""

TRITON_CLASSES = 32768
"""A program holds a row of logits and a row of the bias' gradient in registers: 64 numbers a thread at this size."""


def _triton_reasons(spec: Spec) -> list[str]:
    many = spec.classes is not None and spec.classes > TRITON_CLASSES
    return triton_reasons(spec) + ([f"takes up to {TRITON_CLASSES} classes, not {spec.classes}"] if many else [])


register("masked_linear_cross_entropy", "triton", _triton_reasons)
register("masked_linear_cross_entropy", "native", native.reasons)
register("masked_linear_cross_entropy", "reference", float_reasons)


def _check_slots(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, *_: object) -> None:
    """Raise ValueError for an index or target out of range in a used slot, where looking does not cost a sync."""
    if hidden.device.type != "cpu":
        return
    bad = (index != -1) & ((index < 0) | (index >= len(hidden)) | (targets < 0) | (targets >= len(weight)))
    if bad.any():
        slot = int(bad.nonzero()[0])
        raise ValueError(
            f"slot {slot} has index {int(index[slot])} and target {int(targets[slot])}: an index must be -1 (unused) "
            f"or a row 0..{len(hidden) - 1} of hidden, a target a class 0..{len(weight) - 1}"
        )


def _reference(*args: Any) -> Results:
    _check_slots(*args)
    return reference.forward(*args)


def _triton(*args: Any) -> Results:
    from bevt_kernels.masked_linear_cross_entropy import triton_forward

    _check_slots(*args)
    return triton_forward.forward(*args)


def _native(*args: Any) -> Results:
    native.require("masked_linear_cross_entropy")
    return torch.ops.bevt_kernels.masked_linear_cross_entropy_native(*args)


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, output_mask: Sequence[bool]
) -> Results:
    dtype = statistics_dtype(hidden.dtype)
    kept = ((hidden, hidden.dtype), (weight, dtype), (bias, dtype))
    grad_hidden, grad_weight, grad_bias = (
        x.new_empty(x.shape if wanted else (0,), dtype=own) for (x, own), wanted in zip(kept, output_mask)
    )
    return hidden.new_empty((), dtype=dtype), hidden.new_empty((), dtype=dtype), grad_hidden, grad_weight, grad_bias


def _forward_flops(
    hidden: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int],
    targets: Sequence[int],
    index: Sequence[int],
    output_mask: Sequence[bool],
) -> int:
    """K x C x V products, used slots or not: the logits, and one for each gradient to `hidden` and `weight`."""
    return 2 * index[0] * weight[0] * weight[1] * (1 + sum(output_mask[:2]))


def _fake(hidden: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(hidden.dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty((), dtype=dtype)


def _flops(
    hidden: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int],
    targets: Sequence[int],
    index: Sequence[int],
    *_: object,
) -> int:
    return _forward_flops(hidden, weight, bias, targets, index, (False, False, False))


def _without_gradients(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Where nothing is differentiated and the derivative, which else calls `_forward`, is not asked."""
    return lambda *inputs: _IMPLEMENTATIONS[impl](*inputs[:5], (False, False, False))[:2]


_INPUTS = "(Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor index, bool[3] output_mask, str impl)"
_IMPLEMENTATIONS: dict[str, Callable[..., Results]] = {"triton": _triton, "native": _native, "reference": _reference}

forward = define(
    "masked_linear_cross_entropy_forward",
    f"{_INPUTS} -> (Tensor loss, Tensor accuracy, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _IMPLEMENTATIONS,
    _forward_fake,
    _forward_flops,
)
op = define(
    "masked_linear_cross_entropy",
    f"{_INPUTS} -> (Tensor loss, Tensor accuracy)",
    {impl: _without_gradients(impl) for impl in _IMPLEMENTATIONS},
    _fake,
    _flops,
)
