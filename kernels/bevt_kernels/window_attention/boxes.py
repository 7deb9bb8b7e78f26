"""A shifted window as a cut of the map into boxes, and the index arrays with which the Triton kernels walk them.

On an axis of `size` tokens with windows of w and shift s, the cut points are s, s + w, s + 2w, ...: the first segment
has s tokens, the last w - s, the others w. Without a shift the segments are the windows. Every product of three
segments is a box in which each token attends to each; no pair has to be excluded (README.md).

Boxes of one shape share everything but their origin: the places of their tokens on the map relative to it, and the bias
between any two of their tokens. So a kernel needs, for a shape, two arrays over a box's tokens, and a list of origins.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Size3 = tuple[int, int, int]

T = TypeVar("T")

PAD = 128
"""The arrays of a shape are padded to a multiple of this many tokens, so that no tile reads past them."""


class Cut(NamedTuple):
    """All boxes of a batch, on a device; int32 throughout. A shape's arrays begin at its `start`."""

    shapes: list[tuple[Size3, int, int, int]]
    """(box, start, first, count), largest boxes first: `origins[first : first + count]` are the boxes of that shape."""
    tokens: Tensor
    """Of each token of a box, its place on the map relative to the box's first token; padded with the last one's."""
    table_rows: Tensor
    """Of each token of a box, the row of the bias table relative to the box's first token; padded with the number of
    rows, which is past the end of the table for any partner (see `padded_table`)."""
    origins: Tensor
    """Of each box, the place of its first token among the tokens of all clips."""
    reach: int
    """The largest of `tokens`."""


def segments(size: int, window: int, shift: int) -> list[tuple[int, int]]:
    """(start, length) of the segments of one axis."""
    cuts = sorted({0, *range(shift, size, window), size})
    return [(start, end - start) for start, end in itertools.pairwise(cuts)]


def kept(make: Callable[..., T]) -> functools._lru_cache_wrapper[T]:
    """Cache for good: a CUDA graph may hold an array's address.

    On a thread of its own, as the first call may be inside what prepares a CUDA graph (`torch.compile` with
    mode="reduce-overhead"), where memory taken by the thread itself becomes the graph's.
    """

    @functools.cache
    @functools.wraps(make)
    def made(*args: Hashable) -> T:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make, *args).result()

    return made


@kept
def cut(batch: int, grid: Size3, window: Size3, shift: Size3, table_window: Size3, device: torch.device) -> Cut:
    """The boxes of `batch` clips of D x H x W tokens."""
    _, height, width = grid
    table_strides = ((2 * table_window[1] - 1) * (2 * table_window[2] - 1), 2 * table_window[2] - 1, 1)
    by_shape: dict[Size3, list[int]] = {}
    for box in itertools.product(*map(segments, grid, window, shift)):
        (d, bd), (h, bh), (w, bw) = box
        by_shape.setdefault((bd, bh, bw), []).append((d * height + h) * width + w)

    clip_starts = torch.arange(batch, dtype=torch.int32)[:, None] * math.prod(grid)
    shapes, tokens, table_rows, origins = [], [], [], []
    start = first = 0
    for shape, of_clip in sorted(by_shape.items(), key=lambda item: -math.prod(item[0])):
        place = torch.cartesian_prod(*map(torch.arange, shape)).view(-1, 3)
        padding = -len(place) % PAD
        on_map = (place * torch.tensor([height * width, width, 1])).sum(1)
        in_table = (place * torch.tensor(table_strides)).sum(1)
        tokens.append(torch.cat([on_map, on_map[-1:].expand(padding)]))
        table_rows.append(torch.cat([in_table, in_table.new_full((padding,), table_size(table_window))]))
        origins.append((clip_starts + torch.tensor(of_clip, dtype=torch.int32)).flatten())
        shapes.append((shape, start, first, len(origins[-1])))
        start += len(tokens[-1])
        first += len(origins[-1])
    on_map, in_table, first_tokens = (torch.cat(parts).to(torch.int32) for parts in (tokens, table_rows, origins))
    return Cut(shapes, on_map.to(device), in_table.to(device), first_tokens.to(device), int(on_map.max()))


@kept
def groups(
    batch: int, grid: Size3, window: Size3, shift: Size3, table_window: Size3, device: torch.device, size: int
) -> Tensor:
    """(G, 4) int32, groups of at most `size` boxes of one shape: tokens a box, `start`, first of the boxes, count."""
    rows = [
        (math.prod(box), start, at, min(size, first + count - at))
        for box, start, first, count in cut(batch, grid, window, shift, table_window, device).shapes
        for at in range(first, first + count, size)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 4)


class BiasSums(NamedTuple):
    """Where the sums of ds over each of `groups` lie: a piece for a group, counted in tiles of block x block pairs."""

    starts: Tensor
    """(G,) int32: tiles before the group's piece, of one head."""
    shapes: Tensor
    """(S, 6) int32, of each shape: tiles before its first piece, number of pieces, tiles a side, the box's sides."""
    tiles: int
    """Of all pieces, of one head."""


@kept
def bias_sums(
    batch: int,
    grid: Size3,
    window: Size3,
    shift: Size3,
    table_window: Size3,
    device: torch.device,
    size: int,
    block: int,
) -> BiasSums:
    """For groups of at most `size` boxes. A piece is as large as its shape of boxes needs."""
    starts: list[int] = []
    shapes, tiles = [], 0
    for box, _, _, count in cut(batch, grid, window, shift, table_window, device).shapes:
        pieces, side = -(-count // size), -(-math.prod(box) // block)
        shapes.append((tiles, pieces, side, *box))
        starts += range(tiles, tiles + pieces * side**2, side**2)
        tiles += pieces * side**2
    of_groups, of_shapes = (torch.tensor(rows, dtype=torch.int32, device=device) for rows in (starts, shapes))
    return BiasSums(of_groups, of_shapes, tiles)


def as_size(numbers: Sequence[int]) -> Size3:
    """Three integers, hashable."""
    depth, height, width = numbers
    return int(depth), int(height), int(width)


def table_size(table_window: Size3) -> int:
    """Rows of the bias table."""
    return math.prod(2 * t - 1 for t in table_window)


def padded_table(bias_table: Tensor, factor: float) -> Tensor:
    """(L, h) -> (h, 3 L): times `factor`, a head in one piece; then -inf, where pairs with padding look."""
    rows, heads = bias_table.shape
    table = bias_table.new_full((heads, 3 * rows), -math.inf)
    table[:, :rows] = bias_table.t() * factor
    return table
