"""Forward of window attention in Triton. A program owns one head and a tile of queries, in a group of boxes of a shape.

For each tile of keys it looks the bias up once, in registers, and uses it for every box of the group: the table costs
1 / GROUP look-up a score, and no mask is left to apply (boxes.py). With scores over log 2,

    x_ij = scale * q_i . k_j + bias_ij,   out_i = sum_j 2^(x_ij - a_i) v_j / sum_j 2^(x_ij - a_i)

for any a_i. A running maximum would cost two instructions a score and a rescaling. Here a_i = x_ii, a query's score
with its own key, known beforehand: the sum is at least 1, so nothing is lost below, and above there is room up to a
score of 96 more than a_i (67 in units of e), less log2 N. A tile in which some sum is not between 2^-96 and
2^96 is computed again with the running maximum. float16 probabilities have no such room and always take the maximum.

EXACT, for float32, works with scores as they are: over log 2 they are larger and their rounding is coarser.

Letters: h heads, C channels of all heads, N tokens of a box, L rows of the bias table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevt_kernels.select import architecture
from bevt_kernels.window_attention.boxes import PAD, as_size, cut, groups, padded_table, table_size
from bevt_kernels.window_attention.configs import Config, config

LOG2_E = math.log2(math.e)
LOG_2 = tl.constexpr(math.log(2))
ONE_OVER_LOG_2 = tl.constexpr(LOG2_E)
ROOM = tl.constexpr(2.0**96)

COUNTS = ["HEADS", "CLIP", "TOKENS", "ROWS", "TILES"]
"""Kernel arguments that take many values: one compilation serves them all."""


@triton.jit
def power(x, EXACT: tl.constexpr):
    """2^x, or if EXACT e^x."""
    return tl.exp2(x * ONE_OVER_LOG_2) if EXACT else tl.exp2(x)


@triton.jit
def work(groups, tokens, table_rows, table, HEADS, ROWS, TILES):
    """A program's tile of TILES, its head, and of its group: tokens a box, first box, number of boxes.

    Then `tokens` and `table_rows` of the shape, and `table` at the head's row of a token with itself.
    """
    item = tl.program_id(0)
    head = item // TILES % HEADS
    group = groups + item // TILES // HEADS * 4
    start = tl.load(group + 1)
    table += head * (3 * ROWS) + ROWS // 2
    return (
        item % TILES, head, tl.load(group), tl.load(group + 2), tl.load(group + 3),
        tokens + start, table_rows + start, table,
    )  # fmt: skip


@triton.jit
def origin_of(origins, box, boxes, g):
    """Of the group's box g. A group that is not full computes its last box again, to the same end."""
    return tl.load(origins + box + tl.minimum(g, boxes - 1)).to(tl.int64)


@triton.jit
def load_key_rows(table_rows, j, N):
    """What a key adds to a query's row of the table; for padding, what leads past the table."""
    rows = tl.load(table_rows + j)
    return tl.where(j < N, -rows, rows)


@triton.jit
def load_rows(pointer, rows, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """[R, CHANNELS] of one head; channels past HEAD_DIM are 0. `rows` [R] are offsets of elements."""
    c = tl.arange(0, CHANNELS)
    if CHANNELS == HEAD_DIM:
        return tl.load(pointer + rows[:, None] + c[None, :])
    return tl.load(pointer + rows[:, None] + c[None, :], mask=(c < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, rows, value, keep, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Inverse of `load_rows` for the rows in `keep` [R]."""
    c = tl.arange(0, CHANNELS)
    mask = keep[:, None] & (c < HEAD_DIM)[None, :]
    tl.store(pointer + rows[:, None] + c[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _walk(
    q,
    anchor,
    base,
    table,
    tokens,
    table_rows,
    query_rows,
    N,
    C,
    scale,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ONLINE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Over the keys: (a, sum, out) of each box as tuples of [BLOCK_Q], [BLOCK_Q], [BLOCK_Q, CHANNELS].

    ONLINE: a is the running maximum, else `anchor` as given.
    """
    total = ()
    acc = ()
    for _ in tl.static_range(GROUP):
        total = total + (tl.zeros([BLOCK_Q], tl.float32),)
        acc = acc + (tl.zeros([BLOCK_Q, CHANNELS], tl.float32),)
    for start in range(0, N, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        key_tokens = tl.load(tokens + j) * (3 * C)
        bias = tl.load(table + (query_rows[:, None] + load_key_rows(table_rows, j, N)[None, :]))
        new_anchor = ()
        new_total = ()
        new_acc = ()
        for g in tl.static_range(GROUP):
            k = load_rows(base[g] + C, key_tokens, HEAD_DIM, CHANNELS)
            v = load_rows(base[g] + 2 * C, key_tokens, HEAD_DIM, CHANNELS)
            x = tl.fma(tl.dot(q[g], tl.trans(k), input_precision="ieee"), scale, bias)  # [BLOCK_Q, BLOCK_K]
            if ONLINE:
                top = tl.maximum(anchor[g], tl.max(x, 1))
                shrink = power(anchor[g] - top, EXACT)
                p = power(x - top[:, None], EXACT)
                new_anchor = new_anchor + (top,)
                new_total = new_total + (total[g] * shrink + tl.sum(p, 1),)
                new_acc = new_acc + (tl.dot(p.to(v.dtype), v, acc[g] * shrink[:, None], input_precision="ieee"),)
            else:
                p = power(x - anchor[g][:, None], EXACT)
                new_anchor = new_anchor + (anchor[g],)
                new_total = new_total + (total[g] + tl.sum(p, 1),)
                new_acc = new_acc + (tl.dot(p.to(v.dtype), v, acc[g], input_precision="ieee"),)
        anchor = new_anchor
        total = new_total
        acc = new_acc
    return anchor, total, acc


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    qkv,
    table,
    out,
    lse,
    groups,
    origins,
    tokens,
    table_rows,
    scale,
    HEADS,
    CLIP,
    TOKENS,
    ROWS,
    TILES,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ONLINE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """`table` as of `padded_table`; `groups`, `origins`, `tokens`, `table_rows` as of boxes.py.

    `scale` and `table` are over log 2, or if EXACT as they are.

    HEADS heads, CLIP tokens a clip, TOKENS of all clips, ROWS of the table, TILES a box of the longest shape.
    """
    tile, head, N, box, boxes, tokens, table_rows, table = work(groups, tokens, table_rows, table, HEADS, ROWS, TILES)
    first = tile * BLOCK_Q
    if first >= N:
        return
    C = HEADS * HEAD_DIM

    i = first + tl.arange(0, BLOCK_Q)
    query_tokens = tl.load(tokens + i)
    query_rows = tl.load(table_rows + i)
    own_bias = tl.load(table)
    q = ()
    base = ()
    own = ()
    lowest = ()
    for g in tl.static_range(GROUP):
        origin = origin_of(origins, box, boxes, g)
        pointer = qkv + origin * (3 * C) + head * HEAD_DIM
        q_g = load_rows(pointer, query_tokens * (3 * C), HEAD_DIM, CHANNELS)
        k_g = load_rows(pointer + C, query_tokens * (3 * C), HEAD_DIM, CHANNELS)
        q = q + (q_g,)
        base = base + (pointer,)
        own = own + (tl.sum(q_g.to(tl.float32) * k_g.to(tl.float32), 1) * scale + own_bias,)
        lowest = lowest + (tl.full([BLOCK_Q], float("-inf"), tl.float32),)

    if ONLINE:
        anchor, total, acc = _walk(
            q, lowest, base, table, tokens, table_rows, query_rows, N, C, scale,
            HEAD_DIM, CHANNELS, BLOCK_Q, BLOCK_K, GROUP, True, EXACT,
        )  # fmt: skip
    else:
        anchor, total, acc = _walk(
            q, own, base, table, tokens, table_rows, query_rows, N, C, scale,
            HEAD_DIM, CHANNELS, BLOCK_Q, BLOCK_K, GROUP, False, EXACT,
        )  # fmt: skip
        out_of_room = 0  # also where a query's own score is -inf, or so large that two roundings of it differ
        for g in tl.static_range(GROUP):
            fits = (total[g] < ROOM) & (total[g] > 1 / ROOM) | (i >= N)
            out_of_room += tl.sum((~fits).to(tl.int32))
        if out_of_room > 0:
            anchor, total, acc = _walk(
                q, lowest, base, table, tokens, table_rows, query_rows, N, C, scale,
                HEAD_DIM, CHANNELS, BLOCK_Q, BLOCK_K, GROUP, True, EXACT,
            )  # fmt: skip

    keep = i < N
    for g in tl.static_range(GROUP):
        origin = origin_of(origins, box, boxes, g)
        total_g = tl.where(keep, total[g], 1.0)
        at = out + origin * C + head * HEAD_DIM
        store_rows(at, query_tokens * C, acc[g] / total_g[:, None], keep, HEAD_DIM, CHANNELS)
        at = lse + (origin // CLIP * HEADS + head) * CLIP + origin % CLIP
        top = anchor[g] * ONE_OVER_LOG_2 if EXACT else anchor[g]
        tl.store(at + query_tokens, top + tl.log2(total_g), mask=keep)


class Problem:
    """A map, its windows and heads, on a device: what the kernels' launches have in common."""

    def __init__(
        self,
        qkv: Tensor,
        num_heads: int,
        window_size: Sequence[int],
        shift: Sequence[int],
        table_window: Sequence[int],
        scale: float,
    ) -> None:
        """Raises ValueError where a box's elements are out of reach of a 32-bit offset."""
        batch, *grid, channels = qkv.shape
        self.qkv, self.heads, self.exact = qkv, num_heads, qkv.dtype == torch.float32
        self.unit = 1.0 if self.exact else LOG2_E
        self.scale = scale * self.unit
        self.window, self.table_window = as_size(window_size), as_size(table_window)
        self.map = (batch, as_size(grid), self.window, as_size(shift), self.table_window, qkv.device)
        self.tokens, self.clip, self.head_dim = math.prod(self.window), math.prod(grid), channels // (3 * num_heads)
        self.boxes = cut(*self.map)
        if (self.boxes.reach + 1) * channels >= 2**31 or batch * self.clip >= 2**31:
            raise ValueError(
                f"impl='triton' takes up to 2**31 tokens, and windows that span up to 2**31 numbers of qkv; "
                f"qkv is {tuple(qkv.shape)} with window {self.window}: use impl='reference'"
            )

    def config(self, kernel: str) -> Config:
        """The tile sizes of `kernel` (a name of `configs.KERNELS`)."""
        sizes = config(kernel, self.qkv.dtype, self.head_dim, self.tokens, architecture(self.qkv.device))
        assert PAD % sizes.block_q == PAD % sizes.block_k == 0, f"{kernel}: a tile of {sizes} reads past its arrays"
        return sizes

    def launch(
        self,
        kernel: triton.JITFunction,
        settings: Config,
        tiles: int,
        programs: int,
        tensors: tuple[Tensor, ...],
        **static: int,
    ) -> None:
        """`programs` of `kernel` for each head and group."""
        rows, boxes = groups(*self.map, settings.group), self.boxes
        channels = max(16, triton.next_power_of_2(self.head_dim))  # tl.dot takes no fewer
        counts = self.heads, self.clip, len(self.qkv) * self.clip, table_size(self.table_window), tiles
        if len(rows):
            kernel[(len(rows) * self.heads * programs,)](
                *tensors, rows, boxes.origins, boxes.tokens, boxes.table_rows, self.scale, *counts,
                HEAD_DIM=self.head_dim, CHANNELS=channels, EXACT=self.exact, **static,
                num_warps=settings.warps, num_stages=settings.stages, enable_fp_fusion=True,
            )  # fmt: skip

    def walk(self, kernel: triton.JITFunction, name: str, tensors: tuple[Tensor, ...], **static: int) -> None:
        """A kernel whose programs own a tile of queries, or grad_kv, whose programs own a tile of keys."""
        settings = self.config(name)
        tiles = triton.cdiv(self.tokens, settings.block_k if name == "grad_kv" else settings.block_q)
        sizes = {"BLOCK_Q": settings.block_q, "BLOCK_K": settings.block_k, "GROUP": settings.group}
        self.launch(kernel, settings, tiles, tiles, tensors, **sizes, **static)


def forward(
    qkv: Tensor,
    bias_table: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    shift: Sequence[int],
    table_window: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The op's forward: out (B, D, H, W, C) in qkv's dtype and lse (B, h, D, H, W) float32. Copies a strided qkv."""
    qkv = qkv.contiguous()
    problem = Problem(qkv, num_heads, window_size, shift, table_window, scale)
    out = qkv.new_empty((*qkv.shape[:4], qkv.shape[4] // 3))
    lse = qkv.new_empty((len(qkv), num_heads, *qkv.shape[1:4]), dtype=torch.float32)
    tensors = (qkv, padded_table(bias_table, problem.unit), out, lse)
    problem.walk(forward_kernel, "forward", tensors, ONLINE=qkv.dtype == torch.float16)
    return out, lse
