"""Backward of window attention in Triton: no atomics, so the same result each time.

With p_ij = 2^(x_ij - lse_i), dp_ij = g_i . v_j, delta_i = sum_j p_ij dp_ij, ds_ij = p_ij (dp_ij - delta_i) (README.md):

- grad_q_kernel owns a tile of queries in a group of boxes, walks over the keys, writes delta and dq = scale sum ds k;
- grad_kv_kernel owns a tile of keys in a group of boxes, walks over the queries: dv = sum p g, dk = scale sum ds q;
- grad_bias_kernel owns a tile of queries and one of keys, keeps the bias between them and the sum of ds over its boxes
  in registers, and writes the sum once. add_up_kernel then adds the pieces of a shape, fold_kernel the pairs of tokens
  that read one row of the table, both in a fixed order.

The two first look the bias up once for all boxes of a group, as the forward does; letters and formats are its own.

EXACT, for float32: lse is rounded to 2^-20 or so, an error that all p of a query share, and that no longer cancels
where one p is near 1. Here the keys are walked over once more, for norm_i = 1 / sum_j p_ij and for delta from p and dp
themselves, and p is multiplied by norm. In 16 bits that would not show; there delta_i = g_i . out_i, which is equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevt_kernels.window_attention.boxes import bias_sums, padded_table, table_size
from bevt_kernels.window_attention.triton_forward import (
    COUNTS,
    LOG_2,
    Problem,
    load_key_rows,
    load_rows,
    origin_of,
    power,
    store_rows,
    work,
)


@triton.jit(do_not_specialize=COUNTS)
def grad_q_kernel(
    grad_out,
    qkv,
    table,
    out,
    lse,
    statistics,
    grad_qkv,
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
    EXACT: tl.constexpr,
):
    """Writes the queries' part of `grad_qkv`; lse, delta and, if EXACT, norm to `statistics` (2 or 3, h, TOKENS)."""
    tile, head, N, box, boxes, tokens, table_rows, table = work(groups, tokens, table_rows, table, HEADS, ROWS, TILES)
    first = tile * BLOCK_Q
    if first >= N:
        return
    C = HEADS * HEAD_DIM
    grad_scale = scale if EXACT else scale * LOG_2

    i = first + tl.arange(0, BLOCK_Q)
    keep = i < N
    query_tokens = tl.load(tokens + i)
    query_rows = tl.load(table_rows + i)
    q = ()
    g_out = ()
    base = ()
    lse_i = ()
    delta = ()
    norm = ()
    acc = ()
    for g in tl.static_range(GROUP):
        origin = origin_of(origins, box, boxes, g)
        pointer = qkv + origin * (3 * C) + head * HEAD_DIM
        base = base + (pointer,)
        q = q + (load_rows(pointer, query_tokens * (3 * C), HEAD_DIM, CHANNELS),)
        at = origin * C + head * HEAD_DIM
        grad_g = load_rows(grad_out + at, query_tokens * C, HEAD_DIM, CHANNELS)
        g_out = g_out + (grad_g,)
        at = (origin // CLIP * HEADS + head) * CLIP + origin % CLIP
        lse_g = tl.load(lse + at + query_tokens)
        lse_i = lse_i + (lse_g * LOG_2 if EXACT else lse_g,)
        if EXACT:
            delta = delta + (tl.zeros([BLOCK_Q], tl.float32),)
            norm = norm + (tl.zeros([BLOCK_Q], tl.float32),)
        else:
            out_g = load_rows(out + origin * C + head * HEAD_DIM, query_tokens * C, HEAD_DIM, CHANNELS)
            delta = delta + (tl.sum(grad_g.to(tl.float32) * out_g.to(tl.float32), 1),)
            norm = norm + (1.0,)
        acc = acc + (tl.zeros([BLOCK_Q, CHANNELS], tl.float32),)

    for sweep in tl.static_range(0 if EXACT else 1, 2):
        for at_key in range(0, N, BLOCK_K):
            j = at_key + tl.arange(0, BLOCK_K)
            key_tokens = tl.load(tokens + j) * (3 * C)
            bias = tl.load(table + (query_rows[:, None] + load_key_rows(table_rows, j, N)[None, :]))
            new_norm = ()
            new_delta = ()
            new_acc = ()
            for g in tl.static_range(GROUP):
                k = load_rows(base[g] + C, key_tokens, HEAD_DIM, CHANNELS)
                v = load_rows(base[g] + 2 * C, key_tokens, HEAD_DIM, CHANNELS)
                x = tl.fma(tl.dot(q[g], tl.trans(k), input_precision="ieee"), scale, bias)  # [BLOCK_Q, BLOCK_K]
                p = power(x - lse_i[g][:, None], EXACT)
                dp = tl.dot(g_out[g], tl.trans(v), input_precision="ieee")
                if sweep == 0:
                    new_norm = new_norm + (norm[g] + tl.sum(p, 1),)
                    new_delta = new_delta + (delta[g] + tl.sum(p * dp, 1),)
                    new_acc = new_acc + (acc[g],)
                else:
                    if EXACT:
                        p *= norm[g][:, None]
                    ds = p * (dp - delta[g][:, None])
                    new_norm = new_norm + (norm[g],)
                    new_delta = new_delta + (delta[g],)
                    new_acc = new_acc + (tl.dot(ds.to(k.dtype), k, acc[g], input_precision="ieee"),)
            norm = new_norm
            delta = new_delta
            acc = new_acc
        if sweep == 0:
            inverse = ()
            mean = ()
            for g in tl.static_range(GROUP):
                total = tl.where(keep, norm[g], 1.0)  # padding has no p at all
                inverse = inverse + (1.0 / total,)
                mean = mean + (delta[g] / total,)
            norm = inverse
            delta = mean

    for g in tl.static_range(GROUP):
        origin = origin_of(origins, box, boxes, g)
        at = grad_qkv + origin * (3 * C) + head * HEAD_DIM
        store_rows(at, query_tokens * (3 * C), acc[g] * grad_scale, keep, HEAD_DIM, CHANNELS)
        at = statistics + head.to(tl.int64) * TOKENS + origin + query_tokens
        plane = HEADS * TOKENS.to(tl.int64)
        tl.store(at, lse_i[g], mask=keep)
        tl.store(at + plane, delta[g], mask=keep)
        if EXACT:
            tl.store(at + 2 * plane, norm[g], mask=keep)


@triton.jit(do_not_specialize=COUNTS)
def grad_kv_kernel(
    grad_out,
    qkv,
    table,
    statistics,
    grad_qkv,
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
    EXACT: tl.constexpr,
):
    """Writes the keys' and values' parts of `grad_qkv`. Scores are transposed: [BLOCK_K, BLOCK_Q]."""
    tile, head, N, box, boxes, tokens, table_rows, table = work(groups, tokens, table_rows, table, HEADS, ROWS, TILES)
    first = tile * BLOCK_K
    if first >= N:
        return
    C = HEADS * HEAD_DIM
    plane = HEADS * TOKENS.to(tl.int64)
    grad_scale = scale if EXACT else scale * LOG_2

    j = first + tl.arange(0, BLOCK_K)
    key_tokens = tl.load(tokens + j)
    key_rows = load_key_rows(table_rows, j, N)
    k = ()
    v = ()
    base = ()
    grad_base = ()
    row_base = ()
    dk = ()
    dv = ()
    for g in tl.static_range(GROUP):
        origin = origin_of(origins, box, boxes, g)
        pointer = qkv + origin * (3 * C) + head * HEAD_DIM
        base = base + (pointer,)
        grad_base = grad_base + (grad_out + origin * C + head * HEAD_DIM,)
        row_base = row_base + (statistics + head.to(tl.int64) * TOKENS + origin,)
        k = k + (load_rows(pointer + C, key_tokens * (3 * C), HEAD_DIM, CHANNELS),)
        v = v + (load_rows(pointer + 2 * C, key_tokens * (3 * C), HEAD_DIM, CHANNELS),)
        dk = dk + (tl.zeros([BLOCK_K, CHANNELS], tl.float32),)
        dv = dv + (tl.zeros([BLOCK_K, CHANNELS], tl.float32),)

    for at_query in range(0, N, BLOCK_Q):
        i = at_query + tl.arange(0, BLOCK_Q)
        query_tokens = tl.load(tokens + i)
        bias = tl.load(table + (key_rows[:, None] + tl.load(table_rows + i)[None, :]))
        new_dk = ()
        new_dv = ()
        for g in tl.static_range(GROUP):
            q = load_rows(base[g], query_tokens * (3 * C), HEAD_DIM, CHANNELS)
            g_out = load_rows(grad_base[g], query_tokens * C, HEAD_DIM, CHANNELS)
            x = tl.fma(tl.dot(k[g], tl.trans(q), input_precision="ieee"), scale, bias)
            p = power(x - tl.load(row_base[g] + query_tokens)[None, :], EXACT)
            if EXACT:
                p *= tl.load(row_base[g] + 2 * plane + query_tokens)[None, :]
            new_dv = new_dv + (tl.dot(p.to(q.dtype), g_out, dv[g], input_precision="ieee"),)
            dp = tl.dot(v[g], tl.trans(g_out), input_precision="ieee")
            ds = p * (dp - tl.load(row_base[g] + plane + query_tokens)[None, :])
            new_dk = new_dk + (tl.dot(ds.to(q.dtype), q, dk[g], input_precision="ieee"),)
        dk = new_dk
        dv = new_dv

    keep = j < N
    for g in tl.static_range(GROUP):
        origin = origin_of(origins, box, boxes, g)
        at = grad_qkv + origin * (3 * C) + head * HEAD_DIM
        store_rows(at + C, key_tokens * (3 * C), dk[g] * grad_scale, keep, HEAD_DIM, CHANNELS)
        store_rows(at + 2 * C, key_tokens * (3 * C), dv[g], keep, HEAD_DIM, CHANNELS)


@triton.jit(do_not_specialize=COUNTS)
def grad_bias_kernel(
    grad_out,
    qkv,
    table,
    statistics,
    grad_bias,
    starts,
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
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Writes a group's piece of `grad_bias`, (h, P, P) float32: the sum of ds over its boxes, P tokens padded to BLOCK.

    Pairs with padding get zero.
    """
    pair, head, N, box, boxes, tokens, table_rows, table = work(
        groups, tokens, table_rows, table, HEADS, ROWS, TILES * TILES
    )
    first_q = pair // TILES * BLOCK
    first_k = pair % TILES * BLOCK
    if (first_q >= N) | (first_k >= N):
        return
    C = HEADS * HEAD_DIM
    plane = HEADS * TOKENS.to(tl.int64)

    i = first_q + tl.arange(0, BLOCK)
    j = first_k + tl.arange(0, BLOCK)
    query_tokens = tl.load(tokens + i)
    key_tokens = tl.load(tokens + j)
    key_rows = load_key_rows(table_rows, j, N)
    bias = tl.load(table + (tl.load(table_rows + i)[:, None] + key_rows[None, :]))
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for b in range(box, box + boxes):
        origin = tl.load(origins + b).to(tl.int64)
        pointer = qkv + origin * (3 * C) + head * HEAD_DIM
        q = load_rows(pointer, query_tokens * (3 * C), HEAD_DIM, CHANNELS)
        k = load_rows(pointer + C, key_tokens * (3 * C), HEAD_DIM, CHANNELS)
        v = load_rows(pointer + 2 * C, key_tokens * (3 * C), HEAD_DIM, CHANNELS)
        g_out = load_rows(grad_out + origin * C + head * HEAD_DIM, query_tokens * C, HEAD_DIM, CHANNELS)
        row = statistics + head.to(tl.int64) * TOKENS + origin + query_tokens
        x = tl.fma(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, bias)
        p = power(x - tl.load(row)[:, None], EXACT)
        if EXACT:
            p *= tl.load(row + 2 * plane)[:, None]
        dp = tl.dot(g_out, tl.trans(v), input_precision="ieee")
        acc += p * (dp - tl.load(row + plane)[:, None])
    side = tl.cdiv(N, BLOCK)
    tile = tl.load(starts + tl.program_id(0) // (TILES * TILES) // HEADS).to(tl.int64) * HEADS + head * side * side
    tl.store(grad_bias + tile * (BLOCK * BLOCK) + i[:, None] * (side * BLOCK) + j[None, :], acc)


@triton.jit(do_not_specialize=["HEADS"])
def add_up_kernel(grad_bias, shapes, HEADS, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """For a shape of boxes, the sum of its pieces of `grad_bias`, in order, in the place of the first."""
    shape = shapes + tl.program_id(1) * 6
    pieces = tl.load(shape + 1)
    side = tl.load(shape + 2)
    size = side.to(tl.int64) * side * HEADS * TILE
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if (pieces == 1) | (first >= size):
        return
    number = first + tl.arange(0, BLOCK)
    keep = number < size
    sum_at = grad_bias + tl.load(shape).to(tl.int64) * HEADS * TILE + number
    at = sum_at
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, pieces):
        total += tl.load(at, mask=keep, other=0.0)
        at += size
    tl.store(sum_at, total, mask=keep)


@triton.jit(do_not_specialize=["SHAPES", "HEADS", "WD", "WH", "WW", "TD", "TH", "TW"])
def fold_kernel(
    grad_bias,
    shapes,
    grad_table,
    SHAPES,
    HEADS,
    WD,
    WH,
    WW,
    TD,
    TH,
    TW,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """The rows of grad_table (L, h) that a (WD, WH, WW) window reads: sums over shapes and over the pairs of a row."""
    head = tl.program_id(1)
    offset = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    across = 2 * WW - 1
    plane = (2 * WH - 1) * across
    # Query minus key on each axis.
    a = offset // plane - (WD - 1)
    b = offset // across % (2 * WH - 1) - (WH - 1)
    c = offset % across - (WW - 1)
    total = tl.zeros([BLOCK_R], tl.float32)
    for shape in range(0, SHAPES):
        start = tl.load(shapes + shape * 6).to(tl.int64)
        side = tl.load(shapes + shape * 6 + 2)
        bd = tl.load(shapes + shape * 6 + 3)
        bh = tl.load(shapes + shape * 6 + 4)
        bw = tl.load(shapes + shape * 6 + 5)
        at = grad_bias + (start * HEADS + head * side * side) * (BLOCK * BLOCK)
        for first in range(0, bd * bh * bw, BLOCK_I):
            i = first + tl.arange(0, BLOCK_I)
            d = (i // (bh * bw))[None, :] - a[:, None]
            h = (i // bw % bh)[None, :] - b[:, None]
            w = (i % bw)[None, :] - c[:, None]
            pair = (d >= 0) & (d < bd) & (h >= 0) & (h < bh) & (w >= 0) & (w < bw) & (i < bd * bh * bw)[None, :]
            j = (d * bh + h) * bw + w
            total += tl.sum(tl.load(at + i[None, :] * (side * BLOCK) + j, mask=pair, other=0.0), 1)
    row = ((a + TD - 1) * (2 * TH - 1) + b + TH - 1) * (2 * TW - 1) + c + TW - 1
    tl.store(grad_table + row * HEADS + head, total, mask=offset < (2 * WD - 1) * plane)


PROGRAMS = 512
"""Of grad_bias_kernel, at least, where the boxes suffice: four for each multiprocessor of a large GPU, of which image
windows of stage 4 would else fill 32. A constant, so that sums have one order on every GPU."""


def table_gradient(problem: Problem, table_shape: torch.Size, tensors: tuple[Tensor, ...]) -> Tensor:
    """(L, h) float32. `tensors` are grad_out, qkv, the padded table and the statistics."""
    settings = problem.config("grad_bias")
    block, tiles = settings.block_q, triton.cdiv(problem.tokens, settings.block_q)
    on_gpu = problem.qkv.is_cuda  # the interpreter pays by the program
    most = len(problem.boxes.origins) * problem.heads * tiles**2 // (PROGRAMS if on_gpu else 1)
    settings = settings._replace(group=min(settings.group, max(1, most)))
    sums = bias_sums(*problem.map, settings.group, block)
    grad_bias = torch.empty(sums.tiles * problem.heads * block**2, dtype=torch.float32, device=tensors[0].device)
    tensors = (*tensors, grad_bias, sums.starts)
    problem.launch(grad_bias_kernel, settings, tiles, tiles**2, tensors, BLOCK=block)
    size, step = problem.heads * (tiles * block) ** 2, 1024 if on_gpu else 2**16
    add_up_kernel[(triton.cdiv(size, step), len(sums.shapes))](
        grad_bias, sums.shapes, problem.heads, TILE=block**2, BLOCK=step
    )
    grad_table, rows = grad_bias.new_zeros(table_shape), 16 if on_gpu else 1024
    fold_kernel[(triton.cdiv(table_size(problem.window), rows), problem.heads)](
        grad_bias, sums.shapes, grad_table, len(sums.shapes), problem.heads, *problem.window, *problem.table_window,
        BLOCK=block, BLOCK_R=rows, BLOCK_I=64,
    )  # fmt: skip
    return grad_table


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window_size: Sequence[int],
    shift: Sequence[int],
    table_window: Sequence[int],
    scale: float,
    train_table: bool,
) -> tuple[Tensor, Tensor]:
    """The op's backward: gradients to qkv (its shape and dtype) and to bias_table (float32). Copies strided inputs."""
    grad_out, qkv, out, lse = (x.contiguous() for x in (grad_out, qkv, out, lse))
    problem = Problem(qkv, num_heads, window_size, shift, table_window, scale)
    grad_qkv = torch.empty_like(qkv)
    if problem.tokens == 1 or not len(qkv):  # a token alone has probability 1, whatever its score
        grad_qkv.zero_()[..., 2 * grad_out.shape[-1] :] = grad_out
        return grad_qkv, bias_table.new_zeros(bias_table.shape if train_table else (0,))
    table = padded_table(bias_table, problem.unit)
    statistics = lse.new_empty((3 if problem.exact else 2, num_heads, qkv.shape[:4].numel()))
    problem.walk(grad_q_kernel, "grad_q", (grad_out, qkv, table, out, lse, statistics, grad_qkv))
    problem.walk(grad_kv_kernel, "grad_kv", (grad_out, qkv, table, statistics, grad_qkv))
    if not train_table:
        return grad_qkv, bias_table.new_empty(0)
    return grad_qkv, table_gradient(problem, bias_table.shape, (grad_out, qkv, table, statistics))
