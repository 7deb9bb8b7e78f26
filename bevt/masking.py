"""Every mask of the paper (section 3.2, Table 9), a whole batch at a time.

A mask is a function of its own seed and nothing else: all random numbers are `bevt.draws` at fixed counters, so it
does not matter which samples share a batch, how many workers draw, or in which order.

Letters: B samples, d depth of the token grid (frames / 2), h x w patches of a frame, n masks drawn together.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from bevt import draws
from bevt.config import ConfigError, MaskConfig

TRIES = 10
"""Tries a block has to find a place before its mask is finished (BEiT, `masking_generator.py`)."""

_TIME, _SPACE = 0, 1
"""Streams of random numbers of one sample: the choice of frames, and from 1 on one stream a block mask."""


def generate(config: MaskConfig, seeds: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Masks of `config.kind`, one per seed; True = hidden from the encoder.

    `block`: one BEiT block mask; its grid has d = 1 (the image stream). Blocks are added until `ratio` of the patches
    are covered, never more; a mask ends early where a block found no place in ten tries (on 14x14: mean 97.5 of 98; on
    grids of 3x3 and below, or long and thin ones, it can end empty).
    `tube`: one block mask on a run of consecutive frames, whose length is uniform over `tube` (in frames, rounded
    down). With `wrap` the run starts anywhere and continues at the first frame (the official code); without, it starts
    where it fits (the paper's t..t+l). Either way lengths, and so the masked share, are the same.
    `frame_diff`: the tube's frames, an independent block mask in each.
    `random_frame`: as many frames as a tube would have, anywhere, all with one block mask.
    `random_tube`: VideoMAE's, the same patches of all frames, drawn uniformly, `ratio` of them rounded down (176 of
    14x14 at 0.9), in every sample as many.
    `random_3d`: patches uniform over the whole grid, as many as a tube hides on average when its blocks fill `ratio`
    (0.5 of 0.75 of the frames: 588 of 8x14x14), so that Table 9 compares shapes at one masked share. Neither the paper
    nor the official code gives a number.

    Args:
        config: the stream's mask.
        seeds: (B,) integers, one per sample.
        grid: (d, h, w).

    Returns:
        (B, d, h, w) bool.

    Raises:
        ConfigError: no such mask exists on this grid; names the key.
        ValueError: `seeds` is not a vector of integers.
    """
    _check(config, grid)
    seeds = np.asarray(seeds)
    if seeds.ndim != 1 or seeds.dtype.kind not in "iu":
        raise ValueError(f"seeds must be a vector of integers, got shape {seeds.shape}, {seeds.dtype}")
    d, h, w = grid
    keys = draws.keys(seeds)
    if config.kind == "random_3d":
        return _scattered(draws.sequence(keys, _SPACE), capacity(config, grid), d * h * w).reshape(-1, d, h, w)
    if config.kind == "random_tube":
        frame = _scattered(draws.sequence(keys, _SPACE), capacity(config, grid) // d, h * w).reshape(-1, 1, h, w)
        return frame.repeat(d, axis=1)
    if config.kind == "block":
        return _blocks(config, draws.sequence(keys, _SPACE), h, w)[:, None]
    frames = _frames(config, draws.sequence(keys, _TIME), d)
    if config.kind == "frame_diff":
        mask = np.zeros((len(keys), d, h, w), bool)
        mask[frames] = _blocks(config, draws.sequence(keys[:, None], _SPACE + np.arange(d))[frames], h, w)
        return mask
    return frames[:, :, None, None] & _blocks(config, draws.sequence(keys, _SPACE), h, w)[:, None]


def capacity(config: MaskConfig, grid: tuple[int, int, int]) -> int:
    """The most positions of the (d, h, w) grid that one sample's mask can hide.

    Raises:
        ConfigError: as `generate`.
    """
    _check(config, grid)
    d, h, w = grid
    if config.kind == "random_3d":
        shortest, longest = _lengths(config, d)
        return max(1, round(config.ratio * (shortest + longest) / 2 * h * w))
    if config.kind == "random_tube":
        return d * int(config.ratio * h * w)
    frames = 1 if config.kind == "block" else _lengths(config, d)[1]
    return frames * _limit(config, h, w)


def _scattered(keys: np.ndarray, count: int, places: int) -> np.ndarray:
    """(n, places) bool: `count` of the places, uniformly."""
    order = np.argpartition(draws.bits(keys, np.arange(places)), count - 1, axis=1)
    mask = np.zeros((len(keys), places), bool)
    np.put_along_axis(mask, order[:, :count], True, axis=1)
    return mask


def _limit(config: MaskConfig, h: int, w: int) -> int:
    """Most patches of one block mask: 98 of 14x14."""
    return round(config.ratio * h * w)


def _lengths(config: MaskConfig, d: int) -> tuple[int, int]:
    """Shortest and longest tube in frames, rounded as the official code does: (4, 8) of 8."""
    shortest, longest = (max(1, int(share * d)) for share in config.tube)
    return shortest, longest


def _frames(config: MaskConfig, keys: np.ndarray, d: int) -> np.ndarray:
    """(B, d) bool: the frames that a mask touches."""
    shortest, longest = _lengths(config, d)
    u = draws.uniform(keys, np.arange(2 + d))
    length = shortest + _below(u[:, 0], longest - shortest + 1)
    if config.kind == "random_frame":
        rank = u[:, 2:].argsort(1, kind="stable").argsort(1)
        return rank < length[:, None]
    start = _below(u[:, 1], np.full(len(keys), d) if config.wrap else d - length + 1)
    return (np.arange(d) - start[:, None]) % d < length[:, None]


def _blocks(config: MaskConfig, keys: np.ndarray, h: int, w: int) -> np.ndarray:
    """(n, h, w) bool: BEiT's blockwise masks, all n in lock step, one block a turn.

    A turn draws a block's ten tries at once (nothing about a try depends on the one before it), counts what each would
    add with an integral image of the mask so far, and keeps the first that adds something and does not overshoot.
    """
    mask = np.zeros((len(keys), h, w), bool)
    live = np.arange(len(keys))
    remaining = np.full(len(keys), _limit(config, h, w))
    counter = np.arange(TRIES * 4)
    while live.size:
        u = draws.uniform(keys[live], counter).reshape(-1, TRIES, 4)
        rows, cols = _sides(config, u[..., 0], u[..., 1], remaining[live, None], h, w)
        top, left = _below(u[..., 2], h - rows + 1), _below(u[..., 3], w - cols + 1)
        added = rows * cols - _covered(mask[live], top, left, rows, cols)
        fits = (added > 0) & (added <= remaining[live, None])
        found = fits.any(1)
        live = live[found]
        pick = np.flatnonzero(found), fits.argmax(1)[found]
        in_rows = _interval(top[pick], rows[pick], h)
        in_cols = _interval(left[pick], cols[pick], w)
        mask[live] |= in_rows[:, :, None] & in_cols[:, None, :]
        remaining[live] -= added[pick]
        live = live[remaining[live] > 0]
        counter = counter + TRIES * 4
    return mask


def _sides(
    config: MaskConfig, u_area: np.ndarray, u_aspect: np.ndarray, remaining: np.ndarray, h: int, w: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns (int64) of blocks; 0 x 0 where a side would not stay strictly below the grid's.

    The area is uniform between `min_block` and `remaining` even where fewer remain than `min_block`: a small block, or
    a larger one that overlaps, may still fill the mask exactly (as in BEiT; without it 98 is rarely reached).
    """
    area = config.min_block + (remaining - config.min_block) * u_area
    aspect = np.exp(math.log(config.min_aspect) * (1 - 2 * u_aspect))
    rows = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    cols = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    inside = (rows < h) & (cols < w)
    return rows * inside, cols * inside


def _covered(mask: np.ndarray, top: np.ndarray, left: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """(n, tries) int64: masked patches inside each rectangle, from four corners of the integral image."""
    n, h, w = mask.shape
    integral = np.zeros((n, h + 1, w + 1), np.int32)
    integral[:, 1:, 1:] = mask.cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32)
    flat = integral.reshape(-1)
    corner = np.arange(n)[:, None] * ((h + 1) * (w + 1)) + top * (w + 1) + left
    down = rows * (w + 1)
    return (flat[corner + down + cols] - flat[corner + cols] - flat[corner + down] + flat[corner]).astype(np.int64)


def _interval(start: np.ndarray, length: np.ndarray, size: int) -> np.ndarray:
    """(n, size) bool: start <= position < start + length."""
    position = np.arange(size) - start[:, None]
    return (position >= 0) & (position < length[:, None])


def _below(u: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Integers uniform in 0..bound - 1."""
    return (u * bound).astype(np.int64)


@lru_cache(maxsize=64)
def _check(config: MaskConfig, grid: tuple[int, int, int]) -> None:
    """Raise ConfigError, naming the key, where no mask of this kind exists on the grid."""
    d, h, w = grid
    stream = "image_mask" if config.kind == "block" else "clip_mask"
    where = f"on a grid of {d}x{h}x{w} patches"
    if min(grid) < 1:
        raise ConfigError(f"a mask needs a grid of at least 1x1x1 patches, got {d}x{h}x{w}")
    if config.kind == "block" and d != 1:
        raise ConfigError(
            f"image_mask.kind 'block' is for single images (depth 1), got {d}x{h}x{w}; use 'tube' for clips"
        )
    if not 0 < config.ratio <= 1:
        raise ConfigError(f"{stream}.ratio must lie in (0, 1], got {config.ratio}")
    if not 0 < config.tube[0] <= config.tube[1] <= 1:
        raise ConfigError(f"{stream}.tube must be a range inside (0, 1], got {config.tube}")
    if config.kind == "random_3d":
        return
    if config.kind == "random_tube":
        hidden = int(config.ratio * h * w)
        if not 0 < hidden < h * w:
            raise ConfigError(
                f"{stream}.ratio = {config.ratio} hides {hidden} of {h * w} patches of a frame {where}: some must be "
                "hidden and some visible"
            )
        return
    if not 0 < config.min_aspect <= 1:
        raise ConfigError(f"{stream}.min_aspect must lie in (0, 1], got {config.min_aspect}")
    limit = _limit(config, h, w)
    if not 1 <= config.min_block <= limit:
        raise ConfigError(
            f"{stream}.min_block = {config.min_block} must lie in 1..{limit}: {stream}.ratio = {config.ratio} allows "
            f"{limit} patches a frame {where}; lower min_block or raise ratio"
        )
    u_area, u_aspect = np.meshgrid(np.linspace(0, 1, 65), np.linspace(0, 1, 65))
    rows, cols = _sides(config, u_area, u_aspect, np.asarray(limit), h, w)
    if not ((rows * cols > 0) & (rows * cols <= limit)).any():
        raise ConfigError(
            f"no block of {stream}.min_block = {config.min_block} patches or more fits {where}: its sides must stay "
            f"below the grid's, its aspect within {config.min_aspect:g}..{1 / config.min_aspect:g}, its area within "
            f"{limit} patches; lower min_block"
        )
