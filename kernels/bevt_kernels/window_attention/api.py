"""`window_attention`: the public function. It checks its arguments, resolves the implementation and calls the op."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from bevt_kernels.registration import require, require_same_device, require_tensors, statistics_dtype
from bevt_kernels.select import Spec, resolve
from bevt_kernels.window_attention.autograd import forward


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    num_heads: int,
    window_size: Sequence[int],
    shift: Sequence[int] = (0, 0, 0),
    table_window: Sequence[int] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Multi-head attention inside (shifted) 3D windows with a relative position bias (Video Swin, arXiv 2106.13230).

    Args:
        qkv: (B, D, H, W, 3*C), the QKV projection's output in place, q, k and v each (heads, C / heads); any strides.
            float32, bfloat16, float16 or float64; sums and softmax are float32 (float64 for float64). D, H and W are
            multiples of the window.
        bias_table: ((2Td-1)(2Th-1)(2Tw-1), heads), float32 (float64 for float64 `qkv`), also under autocast.
        num_heads: h; divides C.
        window_size: tokens of a window along time, height and width.
        shift: on each axis 0 <= shift < window: windows start at `shift`, and those that the map's end cuts in two do
            not attend across the cut.
        table_window: (Td, Th, Tw) that the table was made for, at least the window; the window by default. The bias is
            looked up by true offsets.
        scale: of q k^T; (C / heads) ** -0.5 by default.
        impl: "auto", "reference", "native" or "triton"; see `bevt_kernels.resolve`.

    Returns:
        (B, D, H, W, C), contiguous, in the dtype of `qkv`. Deterministic and once
        differentiable in `qkv` and `bias_table`.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit. NoImplementation (a ValueError): `impl` cannot
            serve. NotImplementedError: a second derivative.
    """
    window, shift = _three("window_size", window_size), _three("shift", shift)
    table_window = window if table_window is None else _three("table_window", table_window)
    num_heads = _whole("num_heads", num_heads)
    _check(qkv, bias_table, num_heads, window, shift, table_window)
    head_dim = qkv.shape[4] // (3 * num_heads)
    scale = head_dim**-0.5 if scale is None else scale
    require(isinstance(scale, (int, float)) and math.isfinite(scale), f"scale must be a finite number, got {scale!r}")
    needs_grad = torch.is_grad_enabled() and (qkv.requires_grad or bias_table.requires_grad)
    spec = Spec(qkv.device.type, qkv.dtype, needs_grad, window, head_dim)
    name = resolve("window_attention", impl, spec)
    return forward(qkv, bias_table, num_heads, window, shift, table_window, scale, name)[0]


def _whole(name: str, number: int) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {number!r}") from None


def _three(name: str, numbers: Sequence[int]) -> tuple[int, int, int]:
    try:
        depth, height, width = numbers
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be three numbers (time, height, width), got {numbers!r}") from None
    return _whole(name, depth), _whole(name, height), _whole(name, width)


def _check(
    qkv: Tensor,
    bias_table: Tensor,
    num_heads: int,
    window: tuple[int, int, int],
    shift: tuple[int, int, int],
    table_window: tuple[int, int, int],
) -> None:
    """Raise ValueError where the arguments do not fit together."""
    require_tensors(qkv=qkv, bias_table=bias_table)
    require(qkv.dim() == 5, f"qkv must be (B, D, H, W, 3*C), got shape {tuple(qkv.shape)}")
    require(num_heads > 0, f"num_heads must be above 0, got {num_heads}")
    channels = qkv.shape[4]
    require(
        channels > 0 and channels % (3 * num_heads) == 0,
        f"qkv's last axis must be a multiple of 3 * num_heads = {3 * num_heads}, got {channels}",
    )
    for axis, size, w, s, t in zip("DHW", qkv.shape[1:4], window, shift, table_window):
        require(w > 0, f"window_size must be above 0 on each axis, got {window}")
        require(size > 0 and size % w == 0, f"{axis} = {size} is no multiple of the window's {w}: pad the map first")
        require(0 <= s < w, f"shift must lie in 0..window - 1 on each axis, got shift {shift} for window {window}")
        require(
            t >= w, f"table_window must be at least the window on each axis, got {table_window} for window {window}"
        )
    rows = math.prod([2 * t - 1 for t in table_window])
    require(
        tuple(bias_table.shape) == (rows, num_heads),
        f"bias_table must be ({rows}, {num_heads}) for table_window {table_window} and {num_heads} heads, "
        f"got {tuple(bias_table.shape)}",
    )
    expected = statistics_dtype(qkv.dtype)
    require(
        bias_table.dtype == expected,
        f"bias_table must be {expected} for {qkv.dtype} qkv, got {bias_table.dtype}"
        + (": keep the table out of .half()" if bias_table.dtype.itemsize == 2 else ""),
    )
    require_same_device(qkv=qkv, bias_table=bias_table)
