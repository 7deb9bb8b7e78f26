"""Linear argmax in Triton. A program owns a tile of rows and a part of the classes, whose tiles it walks over.

Each tile of logits is formed on chip, x W^T in float32 and then the bias, and folded into the best of each row: its
largest logit, NaN above all, and the lowest class that has it. The parts' bests are (parts, M); the codes are the
lowest part's that has the largest.

Tiles repeat the last row or class past it, so that logits need no mask; zeros in place of a class would with inf make
NaN, and NaN wins. A repeated class that wins is the last class.

Letters: M rows, C channels, V classes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bevt_kernels.select import architecture


@triton.jit
def largest(x):
    """[R] the largest of each row of [R, N] and its first column; NaN is above all.

    tl.max passes NaN over, so it gets a sixteenth of the columns, in which looking for NaN is cheap; a reduction with
    `maximum` compiles to as much but takes Triton's interpreter 80 us a number.
    A column is skipped by one comparison, x <= below, which NaN never passes. `below` is the float just under the
    largest: +inf under NaN, and under -inf a NaN, so that no column is skipped.
    """
    few = x
    for _ in tl.static_range(4):  # the larger of columns n and n + N / 2
        left, right = tl.split(tl.permute(tl.reshape(few, [few.shape[0], 2, few.shape[1] // 2]), [0, 2, 1]))
        few = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
    top = tl.where(tl.max((few != few).to(tl.int32), 1) > 0, float("nan"), tl.max(few, 1))
    bits = top.to(tl.int32, bitcast=True)
    bits = tl.where(top > 0, bits - 1, tl.where(top == 0, -0x7FFFFFFF, bits + 1))  # under 0: the smallest subnormal
    below = tl.where(top == top, bits.to(tl.float32, bitcast=True), float("inf"))
    column = tl.arange(0, x.shape[1])[None, :]
    return top, tl.min(tl.where(x <= below[:, None], x.shape[1], column), 1)


@triton.jit(do_not_specialize=["M", "V", "PART", "PARTS"])
def argmax_kernel(
    x,
    weight,
    bias,
    values,
    codes,
    M,
    V,
    C,
    PART,
    PARTS,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Writes `values` float32 and `codes` int64, (PARTS, M): the best logit of each part and its class.

    A part is PART classes, the last one fewer. C is above 0; EVEN: a multiple of BLOCK_C.
    """
    tl.assume(C > 0)
    part = tl.program_id(0) % PARTS  # programs of a tile of rows run side by side, so they read x from L2
    m = tl.program_id(0) // PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    x_tile = x + (tl.minimum(m, M - 1).to(tl.int64) * C)[:, None] + c[None, :]  # [BLOCK_M, BLOCK_C]
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    code = tl.zeros([BLOCK_M], tl.int32)
    for start in range(part * PART, tl.minimum(part * PART + PART, V), BLOCK_V):
        v = tl.minimum(start + tl.arange(0, BLOCK_V), V - 1)
        weight_tile = weight + (v.to(tl.int64) * C)[:, None] + c[None, :]  # [BLOCK_V, BLOCK_C]
        logits = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for done in range(0, C, BLOCK_C):
            if EVEN:
                a = tl.load(x_tile + done)
                b = tl.load(weight_tile + done)
            else:
                inside = (c < C - done)[None, :]
                a = tl.load(x_tile + done, mask=inside, other=0.0)
                b = tl.load(weight_tile + done, mask=inside, other=0.0)
            logits = tl.dot(a, tl.trans(b), logits, input_precision="ieee")
        logits += tl.load(bias + v).to(tl.float32)[None, :]
        top, column = largest(logits)
        better = (top > best) | ((top != top) & (best == best))
        best = tl.where(better, top, best)
        code = tl.where(better, start + column, code)
    at = part * M.to(tl.int64) + m
    tl.store(values + at, best, mask=m < M)
    tl.store(codes + at, tl.minimum(code, V - 1).to(tl.int64), mask=m < M)


class Config(NamedTuple):
    """How the kernel is cut up."""

    block_m: int
    """Rows a tile."""
    block_v: int
    """Classes a tile."""
    block_c: int
    """Channels a step of the product."""
    warps: int
    stages: int
    """Of software pipelining."""


def config(dtype: torch.dtype, architecture: str) -> Config:
    """The sizes that ship, for x and weight of `dtype` on e.g. "sm_90": the largest tile without spills (LOG.md)."""
    if architecture == "interpreter":  # pays by the operation
        return Config(64, 512, 64, 1, 1)
    if dtype == torch.float32:  # products without tensor cores
        return Config(128, 128, 32, 8, 3)
    if architecture == "sm_90":
        return Config(128, 256, 64, 8, 4)
    if architecture in ("sm_100", "sm_103"):  # two programs an SM
        return Config(128, 128, 64, 4, 3)
    return Config(128, 256, 32, 8, 4)  # 72 KiB of shared memory, which every GPU has


@cache
def processors(device: torch.device) -> int:
    """Of a GPU, its SMs; of the interpreter a number that makes tests cut the classes up."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def tiles_a_part(row_tiles: int, class_tiles: int, processors: int) -> int:
    """How many tiles of classes a program walks over, so that few processors idle in the last wave of programs.

    A program costs its tiles and an eighth for starting. Within 1 % of the cheapest the smallest parts are taken: then
    fewer rows are under way at a time, and the channels of x that all their programs read again and again stay in L2.
    """
    cost = {}
    for tiles in {triton.cdiv(class_tiles, parts) for parts in range(1, min(class_tiles, 32) + 1)}:
        waves = triton.cdiv(row_tiles * triton.cdiv(class_tiles, tiles), processors)
        cost[tiles] = waves * (tiles + 1 / 8)
    limit = 1.01 * min(cost.values())
    return min(tiles for tiles in cost if cost[tiles] <= limit)


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The op: (M,) int64. Copies x and weight where they are strided or their dtypes differ."""
    if not x.shape[1]:  # one channel of zeros: the same sums
        x, weight = x.new_zeros(len(x), 1), weight.new_zeros(len(weight), 1)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight, bias = x.to(dtype).contiguous(), weight.to(dtype).contiguous(), bias.contiguous()
    (rows, channels), classes = x.shape, len(weight)
    sizes = config(dtype, architecture(x.device))
    row_tiles, class_tiles = triton.cdiv(rows, sizes.block_m), triton.cdiv(classes, sizes.block_v)
    tiles = tiles_a_part(row_tiles, class_tiles, processors(x.device))
    parts = triton.cdiv(class_tiles, tiles)
    values = x.new_empty((parts, rows), dtype=torch.float32)
    codes = x.new_empty((parts, rows), dtype=torch.int64)
    if rows:
        argmax_kernel[(row_tiles * parts,)](
            x, weight, bias, values, codes, rows, classes, channels, tiles * sizes.block_v, parts,
            BLOCK_M=sizes.block_m, BLOCK_V=sizes.block_v, BLOCK_C=sizes.block_c,
            EVEN=channels % sizes.block_c == 0, num_warps=sizes.warps, num_stages=sizes.stages, enable_fp_fusion=True,
        )  # fmt: skip
    # torch.argmax has the rule for ties and NaN, and a part's classes are below those of the next.
    return codes[0] if parts == 1 else codes.gather(0, values.argmax(0, keepdim=True))[0]
