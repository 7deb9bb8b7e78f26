"""Window attention in plain PyTorch: the specification every implementation is judged against.

`window_attention` is the specification: differentiable, in one piece. `forward` and `backward` are the same by formula
(README.md), a few windows at a time, and serve training wherever nothing faster does. All arithmetic is in float32, or
in float64 for float64 inputs, whatever the inputs' dtype.

Letters: B clips, D x H x W token map, C channels, h heads, d head dimension, (wd, wh, ww) window of N tokens,
n windows a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from bevt_kernels.registration import chunks, statistics_dtype

Size3 = tuple[int, int, int]

LOG2_E = math.log2(math.e)


def roll(x: Tensor, by: Sequence[int]) -> Tensor:
    """`x.roll(by, (1, 2, 3))` of (B, D, H, W, C) in one pass over whole tokens; on a CPU a third of its time."""
    if not any(by):
        return x
    grid = x.shape[1:4]
    source = torch.arange(math.prod(grid), device=x.device).view(grid).roll(list(by), (0, 1, 2))
    return x.flatten(1, 3).index_select(1, source.flatten()).view(x.shape)


def partition(x: Tensor, heads: int, head_dim: int, window: Size3, shift: Size3) -> Tensor:
    """(B, D, H, W, g*h*d) -> (g, B*n, h, N, d): rolled by -shift and cut into windows; g = 3 for q, k, v."""
    wd, wh, ww = window
    pattern = "b (nd wd) (nh wh) (nw ww) (g h c) -> g (b nd nh nw) h (wd wh ww) c"
    return rearrange(roll(x, [-s for s in shift]), pattern, wd=wd, wh=wh, ww=ww, h=heads, c=head_dim)


def merge(x: Tensor, grid: tuple[int, ...], window: Size3, shift: Size3) -> Tensor:
    """Inverse of `partition`: (g, B*n, h, N, d) -> (B, D, H, W, g*h*d), contiguous. `grid` is (D, H, W)."""
    wd, wh, ww = window
    nd, nh, nw = (size // w for size, w in zip(grid, window))
    pattern = "g (b nd nh nw) h (wd wh ww) c -> b (nd wd) (nh wh) (nw ww) (g h c)"
    return roll(rearrange(x, pattern, nd=nd, nh=nh, nw=nw, wd=wd, wh=wh, ww=ww).contiguous(), shift)


def _own_rows(table_window: Size3, window: Size3) -> tuple[slice, ...]:
    """Where in an (h, 2Td-1, 2Th-1, 2Tw-1) table the offsets lie that occur inside `window`."""
    return slice(None), *(slice(t - w, t + w - 1) for t, w in zip(table_window, window))


def dense_bias(bias_table: Tensor, window: Size3, table_window: Size3) -> Tensor:
    """((2Td-1)(2Th-1)(2Tw-1), h) -> (h, N, N): the bias of query i and key j.

    Along an axis of w tokens the bias is t[i - j + w - 1]. `unfold` gives [i, m] -> t[i + m]; flipping m is j.
    """
    table = bias_table.t().reshape(-1, *(2 * t - 1 for t in table_window))
    bias = table[_own_rows(table_window, window)]
    for axis, w in enumerate(window, start=1):
        bias = bias.unfold(axis, w, 1)  # finally (h, wd, wh, ww, wd, wh, ww): query axes, then flipped key axes
    return bias.flip(4, 5, 6).reshape(-1, math.prod(window), math.prod(window))


def table_gradient(grad_bias: Tensor, window: Size3, table_window: Size3) -> Tensor:
    """The transpose of `dense_bias`: (h, N, N) -> ((2Td-1)(2Th-1)(2Tw-1), h).

    `unfold_backward` adds in a fixed order on every device, where `index_add_` on CUDA would not.
    """
    heads = grad_bias.shape[0]
    folded = grad_bias.view(heads, *window, *window).flip(4, 5, 6)
    for axis, w in reversed(list(enumerate(window, start=1))):
        sizes = list(folded.shape[:-1])
        sizes[axis] = 2 * w - 1
        folded = torch.ops.aten.unfold_backward(folded, sizes, axis, w, 1)
    table = grad_bias.new_zeros(heads, *(2 * t - 1 for t in table_window))
    table[_own_rows(table_window, window)] = folded
    return table.flatten(1).t().contiguous()


def border_bias(grid: tuple[int, ...], window: Size3, shift: Size3, like: Tensor) -> Tensor | None:
    """(n, 1, N, N): -inf between tokens that only the roll brought together, else 0; None without a shift.

    Rolled by -s, the last s positions of an axis are those that wrapped around: on each axis a token has wrapped or it
    has not, and the pairs of one window that differ on any axis are excluded.
    """
    if not any(shift):
        return None
    region = torch.zeros(grid, dtype=torch.int64, device=like.device)
    for axis, (size, s) in enumerate(zip(grid, shift)):
        wrapped = torch.arange(size, device=like.device) >= size - s
        region += wrapped.view([-1 if a == axis else 1 for a in range(3)]) * 2**axis  # << has no fake for bool
    wd, wh, ww = window
    region = rearrange(region, "(nd wd) (nh wh) (nw ww) -> (nd nh nw) 1 (wd wh ww)", wd=wd, wh=wh, ww=ww)
    excluded = region.unsqueeze(-1) != region.unsqueeze(-2)
    return like.new_zeros(excluded.shape).masked_fill_(excluded, -math.inf)


def window_attention(
    qkv: Tensor, bias_table: Tensor, num_heads: int, window: Size3, shift: Size3, table_window: Size3, scale: float
) -> Tensor:
    """The specification. Differentiable in `qkv` and `bias_table`; shapes as in `bevt_kernels.window_attention`."""
    batch, grid, dtype = qkv.shape[0], qkv.shape[1:4], statistics_dtype(qkv.dtype)
    head_dim = qkv.shape[4] // (3 * num_heads)
    q, k, v = partition(qkv.to(dtype), num_heads, head_dim, window, shift)
    scores = scale * (q @ k.mT) + dense_bias(bias_table.to(dtype), window, table_window)
    border = border_bias(grid, window, shift, q)
    if border is not None:
        scores = scores + border.repeat(batch, 1, 1, 1)
    return merge((scores.softmax(-1) @ v)[None], grid, window, shift).to(qkv.dtype)


class _Windows:
    """What `forward` and `backward` share: q, k, v by window, and the scores of a chunk of windows.

    Scores are in units of log 2, the factor carried by q and the bias: on a CPU `exp2_` takes half the time of `exp_`,
    whose vector library also slows down fivefold on -inf.
    """

    def __init__(
        self,
        qkv: Tensor,
        bias_table: Tensor,
        num_heads: int,
        window: Size3,
        shift: Size3,
        table_window: Size3,
        scale: float,
    ) -> None:
        self.grid, dtype = qkv.shape[1:4], statistics_dtype(qkv.dtype)
        head_dim = qkv.shape[4] // (3 * num_heads)
        q, self.k, self.v = partition(qkv.to(dtype), num_heads, head_dim, window, shift)
        self.q = q * (scale * LOG2_E)
        self.bias = dense_bias(bias_table.to(dtype) * LOG2_E, window, table_window)
        self.border = border_bias(self.grid, window, shift, q)

    def chunks(self) -> list[slice]:
        return list(chunks(len(self.q), self.bias.numel(), self.q.device))

    def scores(self, rows: slice) -> Tensor:
        """(c, h, N, N) for the windows `rows`, over log 2."""
        scores = (self.q[rows] @ self.k[rows].mT).add_(self.bias)
        if self.border is not None:
            window = torch.arange(rows.start, rows.stop, device=scores.device) % len(self.border)
            scores.add_(self.border[window])
        return scores


def forward(
    qkv: Tensor, bias_table: Tensor, num_heads: int, window: Size3, shift: Size3, table_window: Size3, scale: float
) -> tuple[Tensor, Tensor]:
    """The op's forward: out (B, D, H, W, C), and lse (B, h, D, H, W), log2 of each query's sum of exponentials."""
    x = _Windows(qkv, bias_table, num_heads, window, shift, table_window, scale)
    out, lse = torch.empty_like(x.q), x.q.new_empty(x.q.shape[:3])
    for rows in x.chunks():
        p = x.scores(rows)
        top = p.amax(-1, keepdim=True)  # finite: a token is never excluded from itself
        total = p.sub_(top).exp2_().sum(-1, keepdim=True)
        out[rows] = (p @ x.v[rows]).div_(total)
        lse[rows] = total.log2_().add_(top).squeeze(-1)
    lse = merge(lse[None, ..., None], x.grid, window, shift).movedim(-1, 1).contiguous()
    return merge(out[None], x.grid, window, shift).to(qkv.dtype), lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window: Size3,
    shift: Size3,
    table_window: Size3,
    scale: float,
    train_table: bool,
) -> tuple[Tensor, Tensor]:
    """The op's backward: gradients to `qkv` (its dtype) and `bias_table`. Probabilities are recomputed from `lse`."""
    x = _Windows(qkv, bias_table, num_heads, window, shift, table_window, scale)
    dtype, head_dim = x.q.dtype, x.q.shape[-1]
    do = partition(grad_out.to(dtype), num_heads, head_dim, window, shift)[0]
    # The sum over keys of p * dp, one number a query: equal to the dot product of out and its gradient.
    delta = partition(
        (grad_out.to(dtype) * out).unflatten(-1, (num_heads, head_dim)).sum(-1), num_heads, 1, window, shift
    )[0]
    lse = partition(lse.movedim(1, -1), num_heads, 1, window, shift)[0]
    grad, grad_bias = x.q.new_empty(3, *x.q.shape), torch.zeros_like(x.bias)
    for rows in x.chunks():
        p = x.scores(rows).sub_(lse[rows]).exp2_()
        p.div_(p.sum(-1, keepdim=True))  # lse is rounded: 2e-5 of p where scores reach 500
        ds = (do[rows] @ x.v[rows].mT).sub_(delta[rows]).mul_(p)
        grad[0, rows] = (ds @ x.k[rows]).mul_(scale)
        grad[1, rows] = (ds.mT @ x.q[rows]).div_(LOG2_E)  # q carries scale * log2 e
        grad[2, rows] = p.mT @ do[rows]
        if train_table:
            grad_bias += ds.sum(0)
    grad_table = table_gradient(grad_bias, window, table_window) if train_table else grad_bias.new_empty(0)
    return merge(grad, x.grid, window, shift).to(qkv.dtype), grad_table.to(bias_table.dtype)
