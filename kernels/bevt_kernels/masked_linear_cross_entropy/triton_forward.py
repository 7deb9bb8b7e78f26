"""Masked linear cross-entropy in Triton around library products: three of them, a chunk of slots at a time.

For a chunk of k slots, with rows X (k, C) gathered from hidden, W (V, C) and b (V,),

    Z = X W^T (library)    z_v := Z_kv + b_v
    loss_k = log sum_v exp z_v - z_target,   D_kv = exp(z_v) / sum_v exp z_v - [v = target]   (here, in place of Z)
    dW += D^T X,   dX = D W (library; dX takes the place of X),   db += column sums of D (here)

so a chunk's logits, 33 MB for 2048 rows of 8192 classes in 16 bits, are read and written once and stay in the L2 cache
of a large GPU. A program owns some rows and walks them one at a time, a whole row in registers, with the column sums of
D in registers beside it: no atomics, no second reading, nothing adds in an order that varies. D is not divided by the
number of used slots: p - 1 and p keep their leading digits in 16 bits, where p / 12,544 would be subnormal in float16.

At the end rows of dX go to the rows of hidden they belong to. A row in several slots gets their sum in the slots'
order: the program that owns the row of hidden looks for them, so that this too is deterministic.

Letters: M rows of hidden, C channels, V classes, K slots, k slots of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevt_kernels.registration import chunks, statistics_dtype

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

STAGES = 1
"""Of software pipelining: the loss kernel asks for its next row by hand."""

PROGRAMS = 128
"""That share out a chunk's rows; each keeps column sums, 4 V bytes: 4 MB for 8192 classes."""


@triton.jit(do_not_specialize=["start", "hidden_rows"])
def gather_kernel(hidden, index, rows, start, hidden_rows, row_stride, channel_stride, C, BLOCK_C: tl.constexpr):
    """Rows (k, C) of `hidden`, zeros for an unused slot (and for one out of range, which the loss will tell)."""
    slot = tl.program_id(0)
    row = tl.load(index + start + slot)
    there = tl.where((row >= 0) & (row < hidden_rows), C, 0)  # channels that can be read
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        x = tl.load(hidden + row * row_stride + channel.to(tl.int64) * channel_stride, mask=channel < there, other=0.0)
        tl.store(rows + slot.to(tl.int64) * C + channel, x, mask=channel < C)


@triton.jit(do_not_specialize=["start", "rows", "hidden_rows", "rows_a_program"])
def loss_kernel(
    logits,
    bias,
    targets,
    index,
    losses,
    correct,
    column_sums,
    start,
    rows,
    hidden_rows,
    rows_a_program,
    V,
    BLOCK_V: tl.constexpr,
    FULL: tl.constexpr,
    EXACT: tl.constexpr,
    GRAD: tl.constexpr,
    SUMS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Losses and hits of a chunk's rows; with GRAD D in place of the logits, with SUMS too the sums of D's columns.

    FULL: V is BLOCK_V, so that nothing needs a mask. Logits are taken times log2 e, in one step with the bias; where
    EXACT, for float32, only after the maximum is gone, since rounding a larger number would break the error rule.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_V)
    inside = column < (BLOCK_V if FULL else V)
    unit = 1.0 if EXACT else LOG2_E
    b = tl.load(bias + column, mask=inside, other=float("-inf")).to(tl.float32) * unit  # [BLOCK_V]
    sums = tl.zeros([BLOCK_V], tl.float32)
    if SUMS and not FIRST:
        sums = tl.load(column_sums + program.to(tl.int64) * V + column, mask=inside, other=0.0)
    first = program * rows_a_program
    last = min(first + rows_a_program, rows) - 1
    here = logits + first.to(tl.int64) * V
    if first <= last:
        ahead = tl.load(here + column, mask=inside, other=0.0)
        for row in range(first, last + 1):
            x = tl.fma(ahead.to(tl.float32), tl.full([BLOCK_V], unit, tl.float32), b)
            slot = tl.load(index + start + row)
            target = tl.load(targets + start + row)
            used = slot != -1
            right = (slot >= 0) & (slot < hidden_rows) & (target >= 0) & (target < V)
            target = tl.where(right, target, 0).to(tl.int32)
            # By the same two operations as the row, so that it equals the maximum where it is the maximum.
            z, c = tl.load(here + target).to(tl.float32), tl.load(bias + target).to(tl.float32)
            at_target = tl.fma(z, unit, c * unit)
            # The next row is asked for before this one is worked on; after the last, the last once more.
            ahead = tl.load(here + tl.where(row < last, V, 0) + column, mask=inside, other=0.0)
            top = tl.max(x, 0)
            e = tl.exp2((x - top) * (LOG2_E / unit))
            total = tl.sum(e, 0)
            loss = (top - at_target) / unit + tl.log2(total) * LN_2
            hit = at_target == top
            if hit:  # one row in ten: only there a tie with a lower class matters
                hit = tl.min(tl.where(x == top, column, V), 0) == target
            tl.store(losses + start + row, tl.where(used, tl.where(right, loss, float("nan")), 0.0))
            tl.store(correct + start + row, tl.where(used & hit, 1.0, 0.0))
            if GRAD:
                d = e * tl.where(used, 1.0 / total, 0.0) - tl.where(column == tl.where(used, target, -1), 1.0, 0.0)
                tl.store(here + column, d.to(logits.dtype.element_ty), mask=inside)
                if SUMS:
                    sums += d
            here += V
    if SUMS:
        tl.store(column_sums + program.to(tl.int64) * V + column, sums, mask=inside)


@triton.jit(do_not_specialize=["K", "hidden_rows"])
def count_kernel(index, counts, firsts, K, hidden_rows, BLOCK: tl.constexpr):
    """How many slots each row of hidden is in, and the first of them; integers, so that order does not matter."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + slot, mask=slot < K, other=-1)
    used = (row >= 0) & (row < hidden_rows)
    tl.atomic_add(counts + row, 1, mask=used, sem="relaxed")
    tl.atomic_min(firsts + row, slot, mask=used, sem="relaxed")


@triton.jit(do_not_specialize=["K"])
def scatter_kernel(rows, index, counts, firsts, grad_hidden, K, C, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """A row of grad_hidden: the rows (K, C) of the slots that it is in, zeros where it is in none."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    first = tl.load(firsts + row)
    for begin in range(0, C, BLOCK_C):
        channel = begin + tl.arange(0, BLOCK_C)
        inside = channel < C
        there = channel < tl.where(count > 0, C, 0)
        total = tl.load(rows + first.to(tl.int64) * C + channel, mask=there, other=0.0).to(tl.float32)
        if count > 1:
            for others in range(first + 1, K, BLOCK_K):
                slot = others + tl.arange(0, BLOCK_K)
                mine = tl.load(index + slot, mask=slot < K, other=-1) == row
                more = tl.load(
                    rows + slot.to(tl.int64)[:, None] * C + channel[None], mask=mine[:, None] & inside[None], other=0.0
                )  # [BLOCK_K, BLOCK_C]
                total += tl.sum(more.to(tl.float32), 0)
        tl.store(grad_hidden + row * C + channel, total.to(grad_hidden.dtype.element_ty), mask=inside)


def _scatter(rows: Tensor, index: Tensor, hidden: Tensor) -> Tensor:
    """grad_hidden (M, C) from the slots' rows (K, C)."""
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    counts = torch.zeros(len(hidden), dtype=torch.int32, device=hidden.device)
    firsts = torch.full((len(hidden),), len(index), dtype=torch.int32, device=hidden.device)
    if len(index) and len(hidden):
        count_kernel[(triton.cdiv(len(index), 256),)](index, counts, firsts, len(index), len(hidden), BLOCK=256)
    if grad_hidden.numel():
        block = min(1024, triton.next_power_of_2(hidden.shape[1]))
        scatter_kernel[(len(hidden),)](
            rows,
            index,
            counts,
            firsts,
            grad_hidden,
            len(index),
            hidden.shape[1],
            BLOCK_C=block,
            BLOCK_K=16,
            num_warps=2,
        )
    return grad_hidden


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a b to `total` in float32 whatever the factors' dtype; `first` overwrites it."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, torch.float32, beta=beta, out=total)
    else:  # the interpreter's: CPUs have no product with another output dtype
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)


def warps(block_v: int) -> int:
    """32 logits a thread: fewer, and what a reduction costs is spread over less; more do not fit into registers."""
    return max(1, min(32, block_v // 1024))


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op; arguments and results as in `reference.forward`."""
    (rows, channels), classes, slots = hidden.shape, len(weight), len(index)
    dtype, device = statistics_dtype(hidden.dtype), hidden.device
    want_hidden, want_weight, want_bias = output_mask
    weight, bias = weight.to(hidden.dtype), bias.contiguous()
    index, targets = index.contiguous(), targets.contiguous()
    parts = list(chunks(slots, classes, device))
    most = parts[0].stop if parts else 0
    logits = torch.empty(most, classes, dtype=hidden.dtype, device=device)
    gathered = torch.empty(slots if want_hidden else most, channels, dtype=hidden.dtype, device=device)
    losses = torch.empty(2, slots, dtype=dtype, device=device)
    programs = min(PROGRAMS, most)
    column_sums = torch.empty(programs if want_bias else 0, classes, dtype=dtype, device=device)
    grad_weight = torch.empty(weight.shape if want_weight else (0,), dtype=dtype, device=device)
    block_v = max(16, triton.next_power_of_2(classes))
    for part in parts:
        first, n = part.start == 0, part.stop - part.start
        x = gathered[part] if want_hidden else gathered[:n]
        if channels:
            gather_kernel[(n,)](
                hidden, index, x, part.start, rows, *hidden.stride(), channels,
                BLOCK_C=min(1024, triton.next_power_of_2(channels)), num_warps=2,
            )  # fmt: skip
        z = torch.mm(x, weight.t(), out=logits[:n])
        loss_kernel[(programs,)](
            z, bias, targets, index, losses[0], losses[1], column_sums, part.start, n, rows,
            triton.cdiv(most, programs), classes, BLOCK_V=block_v, FULL=classes == block_v,
            EXACT=hidden.dtype == torch.float32, GRAD=any(output_mask), SUMS=want_bias, FIRST=first,
            num_warps=warps(block_v), num_stages=STAGES, enable_fp_fusion=True,
        )  # fmt: skip
        if want_weight:
            _accumulate(grad_weight, z.t(), x, first)
        if want_hidden:
            torch.mm(z, weight, out=x)
    if not parts:
        grad_weight.zero_()
    del logits  # before grad_hidden takes its place
    count = (index != -1).sum().clamp(min=1)
    grad_hidden = _scatter(gathered, index, hidden) if want_hidden else hidden.new_empty(0)
    grad_bias = column_sums.sum(0) if want_bias else column_sums.new_empty(0)
    loss = losses[0].sum(dtype=torch.float64) / count  # in float32 off by units in the last place
    return loss.to(dtype), losses[1].sum() / count, grad_hidden, grad_weight, grad_bias
