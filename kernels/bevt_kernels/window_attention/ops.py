"""The torch ops `window_attention_forward` and `window_attention_backward`: schemas, fakes, FLOP formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bevt_kernels import native
from bevt_kernels.registration import define, statistics_dtype
from bevt_kernels.select import float_reasons, register, triton_reasons
from bevt_kernels.window_attention import reference

_STATIC = "int num_heads, int[3] window_size, int[3] shift, int[3] table_window, float scale"

register("window_attention", "triton", triton_reasons)
register("window_attention", "native", native.reasons)
register("window_attention", "reference", float_reasons)


def _native_forward(*args: object) -> tuple[Tensor, Tensor]:
    native.require("window_attention")
    return torch.ops.bevt_kernels.window_attention_forward_native(*args)


def _native_backward(*args: object) -> tuple[Tensor, Tensor]:
    native.require("window_attention")
    return torch.ops.bevt_kernels.window_attention_backward_native(*args)


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from bevt_kernels.window_attention import triton_forward

    return triton_forward.forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from bevt_kernels.window_attention import triton_backward

    return triton_backward.backward(*args)


def _forward_fake(
    qkv: Tensor, bias_table: Tensor, num_heads: int, window: Sequence[int], *static: object
) -> tuple[Tensor, Tensor]:
    batch, *grid, channels = qkv.shape
    lse = qkv.new_empty((batch, num_heads, *grid), dtype=statistics_dtype(qkv.dtype))
    return qkv.new_empty((batch, *grid, channels // 3)), lse


def _backward_fake(grad_out: Tensor, qkv: Tensor, bias_table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, train_table = rest
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape if train_table else (0,))


def _product(qkv_shape: Sequence[int], window: Sequence[int]) -> int:
    """FLOP of one N x N x d product over all windows and heads: 2 * tokens * N * C."""
    return 2 * math.prod(qkv_shape[:4]) * math.prod(window) * (qkv_shape[4] // 3)


def _forward_flops(
    qkv: Sequence[int], bias_table: Sequence[int], num_heads: int, window: Sequence[int], *_: object
) -> int:
    """Two products: q k^T and p v."""
    return 2 * _product(qkv, window)


def _backward_flops(
    grad_out: Sequence[int],
    qkv: Sequence[int],
    bias_table: Sequence[int],
    out: Sequence[int],
    lse: Sequence[int],
    num_heads: int,
    window: Sequence[int],
    *_: object,
) -> int:
    """Five products: q k^T again, dv, dp, dq, dk, whatever an implementation does; torch counts its attention so."""
    return 5 * _product(qkv, window)


forward = define(
    "window_attention_forward",
    f"(Tensor qkv, Tensor bias_table, {_STATIC}, str impl) -> (Tensor out, Tensor lse)",
    {"triton": _triton_forward, "native": _native_forward, "reference": reference.forward},
    _forward_fake,
    _forward_flops,
)
backward = define(
    "window_attention_backward",
    # Without `train_table`, for a frozen one, grad_bias_table is (0,) and nothing is spent on it.
    f"(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor out, Tensor lse, {_STATIC}, bool train_table, str impl) "
    "-> (Tensor grad_qkv, Tensor grad_bias_table)",
    {"triton": _triton_backward, "native": _native_backward, "reference": reference.backward},
    _backward_fake,
    _backward_flops,
)
