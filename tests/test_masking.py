"""Masks against a per-sample oracle that draws the same numbers, and against the published statistics."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevt.config import ConfigError, MaskConfig
from bevt.masking import capacity, generate

BLOCK = MaskConfig(kind="block")
TUBE = MaskConfig(kind="tube")
VIDEO_KINDS = ("tube", "random_3d", "frame_diff", "random_frame")
FRAME = (1, 14, 14)
CLIP = (8, 14, 14)
DRAWS = 20_000


# The oracle: plain Python, one sample and one patch at a time.


def splitmix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def step(key: int, index: int) -> int:
    return splitmix((key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64)


def uniform(key: int, index: int) -> float:
    return (step(key, index) >> 11) / 2**53


def oracle_block(config: MaskConfig, key: int, h: int, w: int) -> np.ndarray:
    mask = np.zeros((h, w), bool)
    limit = round(config.ratio * h * w)
    log_aspect = math.log(config.min_aspect)
    block = 0
    while mask.sum() < limit:
        remaining = limit - int(mask.sum())
        for attempt in range(10):
            u = [uniform(key, (block * 10 + attempt) * 4 + i) for i in range(4)]
            area = config.min_block + (remaining - config.min_block) * u[0]
            aspect = math.exp(log_aspect * (1 - 2 * u[1]))
            rows, cols = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows >= h or cols >= w:
                continue
            top, left = int(u[2] * (h - rows + 1)), int(u[3] * (w - cols + 1))
            patches = [(i, j) for i in range(top, top + rows) for j in range(left, left + cols) if not mask[i, j]]
            if 0 < len(patches) <= remaining:
                for i, j in patches:
                    mask[i, j] = True
                break
        else:
            break
        block += 1
    return mask


def oracle(config: MaskConfig, seed: int, grid: tuple[int, int, int]) -> np.ndarray:
    d, h, w = grid
    key = splitmix(seed % 2**64)
    mask = np.zeros(grid, bool)
    if config.kind == "block":
        mask[0] = oracle_block(config, step(key, 1), h, w)
        return mask
    shortest, longest = max(1, int(config.tube[0] * d)), max(1, int(config.tube[1] * d))
    if config.kind == "random_3d":
        numbers = [step(step(key, 1), i) for i in range(d * h * w)]
        for i in sorted(range(d * h * w), key=numbers.__getitem__)[: capacity(config, grid)]:
            mask.reshape(-1)[i] = True
        return mask
    time = step(key, 0)
    length = shortest + int(uniform(time, 0) * (longest - shortest + 1))
    if config.kind == "random_frame":
        frames = sorted(range(d), key=lambda f: uniform(time, 2 + f))[:length]
    elif config.wrap:
        frames = [(int(uniform(time, 1) * d) + i) % d for i in range(length)]
    else:
        frames = [int(uniform(time, 1) * (d - length + 1)) + i for i in range(length)]
    for f in frames:
        stream = 1 + f if config.kind == "frame_diff" else 1
        mask[f] = oracle_block(config, step(key, stream), h, w)
    return mask


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (BLOCK, FRAME),
        (MaskConfig(kind="block", ratio=0.4), (1, 14, 14)),
        (MaskConfig(kind="block", min_block=3), (1, 6, 6)),
        (MaskConfig(kind="block", min_block=4), (1, 5, 11)),
        (TUBE, CLIP),
        (dataclasses.replace(TUBE, wrap=True), CLIP),
        (MaskConfig(kind="tube", tube=(0.25, 0.75), min_block=2), (5, 6, 6)),
        (MaskConfig(kind="frame_diff"), CLIP),
        (MaskConfig(kind="random_frame"), CLIP),
        (MaskConfig(kind="random_3d"), CLIP),
    ],
    ids=lambda value: value.kind if isinstance(value, MaskConfig) else "x".join(map(str, value)),
)
def test_equals_the_per_sample_oracle(config: MaskConfig, grid: tuple[int, int, int]) -> None:
    seeds = np.concatenate([np.arange(-3, 60), [2**62 + 11, -(2**63), 2**63 - 1]])
    got = generate(config, seeds, grid)
    assert got.dtype == np.bool_
    for seed, mask in zip(seeds.tolist(), got):
        np.testing.assert_array_equal(mask, oracle(config, seed, grid), err_msg=f"seed {seed}")


@settings(max_examples=30, deadline=None)
@given(
    h=st.integers(4, 20),
    w=st.integers(4, 20),
    min_block=st.integers(1, 3),
    ratio=st.floats(0.4, 0.75),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_block_equals_the_oracle_on_any_grid(h: int, w: int, min_block: int, ratio: float, seed: int) -> None:
    config = MaskConfig(kind="block", ratio=ratio, min_block=min_block)
    mask = generate(config, np.array([seed]), (1, h, w))[0, 0]
    assert mask.sum() <= round(ratio * h * w)
    np.testing.assert_array_equal(mask, oracle_block(config, step(splitmix(seed % 2**64), 1), h, w))


# Statistics. The seeds are fixed, so these cannot flake; each tolerance is the rounding of the published figure plus
# four standard errors of this many draws.


def test_block_counts_have_the_published_statistics() -> None:
    counts = generate(BLOCK, np.arange(DRAWS), FRAME).sum((1, 2, 3))
    exact = counts == 98
    assert abs(counts.mean() - 97.5) < 0.05 + 4 * counts.std() / math.sqrt(DRAWS)
    assert abs(exact.mean() - 0.70) < 0.005 + 4 * math.sqrt(0.7 * 0.3 / DRAWS)
    assert counts.max() == 98
    assert 82 <= counts.min() <= 90  # an extreme value: 82..88 in ten other sets of 20,000; published 87


def test_block_masks_favour_no_side() -> None:
    share = generate(BLOCK, np.arange(DRAWS), FRAME).mean((0, 1))
    error = 4 * math.sqrt(0.25 / DRAWS)
    for name, mirrored in (("left-right", share[:, ::-1]), ("up-down", share[::-1]), ("transposed", share.T)):
        assert np.abs(share - mirrored).max() < math.sqrt(2) * error, name


def chi_square_is_plausible(counts: np.ndarray) -> bool:
    """Whether counts over equally likely cells lie within five standard deviations of chi-square's mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def tube_frames(config: MaskConfig) -> np.ndarray:
    return generate(config, np.arange(DRAWS), CLIP).any((2, 3))


@pytest.mark.parametrize("wrap", [False, True])
def test_tube_hides_the_published_share(wrap: bool) -> None:
    share = generate(dataclasses.replace(TUBE, wrap=wrap), np.arange(DRAWS), CLIP).mean((1, 2, 3))
    expected = 0.375 * 97.5 / 98  # 0.375 where every block mask were full
    assert abs(share.mean() - expected) < 0.375 * 0.05 / 98 + 4 * share.std() / math.sqrt(DRAWS)


@pytest.mark.parametrize("wrap", [False, True])
def test_tube_lengths_are_uniform(wrap: bool) -> None:
    lengths = tube_frames(dataclasses.replace(TUBE, wrap=wrap)).sum(1)
    counts = np.bincount(lengths, minlength=9)
    assert counts[:4].sum() == 0
    assert chi_square_is_plausible(counts[4:]), counts


def test_tube_that_does_not_wrap_is_one_run_with_a_uniform_start() -> None:
    frames = tube_frames(TUBE)
    rises = frames[:, 0] + (frames[:, 1:] & ~frames[:, :-1]).sum(1)
    assert (rises == 1).all()
    for length in range(4, 8):
        starts = frames[frames.sum(1) == length].argmax(1)
        counts = np.bincount(starts, minlength=9 - length)
        assert counts.size == 9 - length
        assert chi_square_is_plausible(counts), (length, counts)


def test_wrapping_tube_is_one_run_of_a_ring_with_a_uniform_start() -> None:
    frames = tube_frames(dataclasses.replace(TUBE, wrap=True))
    rises = frames & ~np.roll(frames, 1, axis=1)
    partial = frames.sum(1) < 8
    assert (rises[partial].sum(1) == 1).all()
    assert chi_square_is_plausible(np.bincount(rises[partial].argmax(1), minlength=8))
    around = partial & frames[:, 0] & frames[:, -1]
    # Length l < 8 touches both ends from l - 1 of 8 starts; l is uniform over 4..8.
    expected = sum((length - 1) / 8 for length in range(4, 8)) / 5
    assert abs(around.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / DRAWS)


@pytest.mark.parametrize("kind", ["tube", "random_frame"])
def test_masked_frames_share_one_block_mask(kind: str) -> None:
    for mask in generate(MaskConfig(kind=kind), np.arange(200), CLIP):
        frames = mask[mask.any((1, 2))]
        assert (frames == frames[0]).all()


def test_frame_diff_has_the_tubes_frames_and_a_mask_for_each() -> None:
    seeds = np.arange(200)
    tube, diff = generate(TUBE, seeds, CLIP), generate(MaskConfig(kind="frame_diff"), seeds, CLIP)
    np.testing.assert_array_equal(diff.any((2, 3)), tube.any((2, 3)))
    for mask in diff:
        frames = mask[mask.any((1, 2))]
        assert len(np.unique(frames.reshape(len(frames), -1), axis=0)) == len(frames)


def test_random_frame_takes_the_tubes_number_of_frames_from_anywhere() -> None:
    frames = tube_frames(MaskConfig(kind="random_frame"))
    np.testing.assert_array_equal(frames.sum(1), tube_frames(TUBE).sum(1))
    assert chi_square_is_plausible(frames.sum(0))
    four = frames[frames.sum(1) == 4]
    subsets = np.bincount(four @ (1 << np.arange(8)), minlength=256)
    assert np.count_nonzero(subsets) == math.comb(8, 4)
    assert chi_square_is_plausible(subsets[subsets > 0])


def test_random_3d_hides_the_tubes_mean_share_uniformly() -> None:
    mask = generate(MaskConfig(kind="random_3d"), np.arange(4000), CLIP)
    assert (mask.sum((1, 2, 3)) == 588).all()
    share = mask.mean(0)
    assert abs(share - 0.375).max() < 5 * math.sqrt(0.375 * 0.625 / 4000)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.9, 176), (0.75, 147), (0.95, 186)])
def test_random_tube_hides_the_same_patches_of_all_frames(ratio: float, hidden: int) -> None:
    """As many in every sample, rounded down as in VideoMAE's code, each patch equally often."""
    mask = generate(MaskConfig(kind="random_tube", ratio=ratio), np.arange(4000), CLIP)
    assert (mask == mask[:, :1]).all()
    assert (mask[:, 0].sum((1, 2)) == hidden).all()
    share = hidden / 196
    assert abs(mask[:, 0].mean(0) - share).max() < 5 * math.sqrt(share * (1 - share) / 4000)


# Seeds.


@pytest.mark.parametrize("kind", VIDEO_KINDS)
def test_a_mask_depends_on_its_own_seed_only(kind: str) -> None:
    config = MaskConfig(kind=kind)
    seeds = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 33)
    together = generate(config, seeds, CLIP)
    np.testing.assert_array_equal(generate(config, seeds[::-1], CLIP), together[::-1])
    alone = np.concatenate([generate(config, seeds[i : i + 1], CLIP) for i in range(len(seeds))])
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("kind", VIDEO_KINDS)
def test_neighbouring_seeds_give_unrelated_masks(kind: str) -> None:
    masks = generate(MaskConfig(kind=kind), np.arange(2000), CLIP).reshape(2000, -1)
    assert len(np.unique(masks, axis=0)) == 2000
    first, second = masks[:-1].astype(float), masks[1:].astype(float)
    centre = masks.mean(0)
    each = ((first - centre) * (second - centre)).mean(1)
    assert abs(each.mean()) < 5 * each.std() / math.sqrt(len(each))


def test_no_seeds_give_no_masks() -> None:
    assert generate(TUBE, np.zeros(0, np.int64), CLIP).shape == (0, 8, 14, 14)


# Capacity and errors.


@pytest.mark.parametrize(
    ("config", "grid", "expected"),
    [
        (BLOCK, FRAME, 98),
        (TUBE, CLIP, 8 * 98),
        (MaskConfig(tube=(0.25, 0.75)), CLIP, 6 * 98),
        (MaskConfig(kind="frame_diff", tube=(0.5, 0.5)), CLIP, 4 * 98),
        (MaskConfig(kind="random_frame", ratio=0.4), CLIP, 8 * 78),
        (MaskConfig(kind="random_3d"), CLIP, 588),
        (MaskConfig(tube=(0.1, 0.1)), (4, 14, 14), 98),
        (MaskConfig(kind="random_tube", ratio=0.9), CLIP, 8 * 176),
    ],
)
def test_capacity(config: MaskConfig, grid: tuple[int, int, int], expected: int) -> None:
    assert capacity(config, grid) == expected
    counts = generate(config, np.arange(500), grid).sum((1, 2, 3))
    assert counts.max() == expected


@pytest.mark.parametrize(
    ("config", "grid", "message"),
    [
        (BLOCK, CLIP, r"image_mask\.kind 'block' .*8x14x14"),
        (MaskConfig(min_block=99), CLIP, r"clip_mask\.min_block = 99 must lie in 1\.\.98"),
        (MaskConfig(kind="block", min_block=0), FRAME, r"image_mask\.min_block = 0"),
        (MaskConfig(ratio=0.001, min_block=1), CLIP, r"min_block = 1 must lie in 1\.\.0.*ratio = 0\.001"),
        (MaskConfig(ratio=1.0, min_block=31), (8, 6, 6), r"no block of clip_mask\.min_block = 31 .* 8x6x6"),
        (MaskConfig(kind="block", min_block=1), (1, 1, 14), r"no block of image_mask\.min_block = 1 "),
        (MaskConfig(ratio=1.5), CLIP, r"clip_mask\.ratio .* 1\.5"),
        (MaskConfig(tube=(0.8, 0.5)), CLIP, r"clip_mask\.tube .*0\.8, 0\.5"),
        (MaskConfig(min_aspect=2.0), CLIP, r"clip_mask\.min_aspect .* 2\.0"),
        (TUBE, (0, 14, 14), "0x14x14"),
        (MaskConfig(kind="random_tube", ratio=0.004), CLIP, r"clip_mask\.ratio = 0\.004 hides 0 of 196 patches"),
        (MaskConfig(kind="random_tube", ratio=1.0), CLIP, r"clip_mask\.ratio = 1\.0 hides 196 of 196 patches"),
    ],
)
def test_impossible_masks_are_refused_by_key(config: MaskConfig, grid: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(config, np.arange(2), grid)
    with pytest.raises(ConfigError, match=message):
        capacity(config, grid)


@pytest.mark.parametrize("seeds", [np.zeros((2, 2), np.int64), np.zeros(2)])
def test_seeds_must_be_a_vector_of_integers(seeds: np.ndarray) -> None:
    with pytest.raises(ValueError, match="vector of integers"):
        generate(TUBE, seeds, CLIP)


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, bevt.masking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
