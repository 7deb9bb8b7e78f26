"""Device-side augmentation against OpenCV's and torchvision's results, loops over samples, and known distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bevt.data import augment

# cv2.resize(image, (6, 6), interpolation=cv2.INTER_LANCZOS4) of `_pattern`, channels first; OpenCV 4.14.0.
LANCZOS4 = [
    [
        [41, 69, 156, 185, 91, 196],
        [167, 139, 107, 100, 81, 57],
        [100, 95, 107, 107, 117, 136],
        [145, 177, 210, 151, 149, 229],
        [124, 208, 68, 138, 247, 123],
        [59, 114, 68, 70, 178, 135],
    ],
    [
        [104, 84, 194, 114, 164, 82],
        [220, 196, 179, 149, 177, 114],
        [62, 72, 44, 30, 74, 171],
        [176, 179, 141, 193, 57, 133],
        [161, 36, 145, 215, 68, 56],
        [38, 219, 99, 125, 112, 120],
    ],
    [
        [213, 118, 61, 166, 137, 128],
        [72, 44, 240, 199, 151, 108],
        [198, 115, 94, 145, 146, 146],
        [155, 137, 186, 57, 129, 104],
        [32, 151, 171, 17, 107, 109],
        [144, 202, 67, 209, 137, 197],
    ],
]

# Factors of brightness, contrast and saturation, their order, and what adjust_brightness, adjust_contrast and
# adjust_saturation of torchvision 0.28.0 (transforms.functional, uint8 tensors) make of `_pattern()[0, :3, :4]`.
JITTERED: list[tuple[tuple[float, ...], tuple[int, ...], str]] = [
    (
        (1.25, 0.75, 1.375),
        (2, 0, 1),
        "36 89 157 105 173 227 202 227 36 36 104 173 55 123 191 150 218 227 "
        "227 48 116 101 170 227 89 158 226 206 227 36 61 130 198 179 227 36",
    ),
    (
        (0.75, 1.3125, 0.625),
        (1, 2, 0),
        "7 21 54 75 108 140 151 177 59 12 36 69 22 54 87 121 154 174 "
        "144 30 63 72 104 136 59 91 123 156 178 63 29 61 93 130 163 52",
    ),
]


def _pattern() -> torch.Tensor:
    """(1, 10, 13, 3) uint8 without any smoothness."""
    i, j, c = np.mgrid[0:10, 0:13, 0:3]
    return torch.from_numpy(((i * 37 + j * 91 + c * 53 + i * j * 11) % 256).astype(np.uint8))[None]


def test_tokenizer_view_equals_opencv() -> None:
    """Lanczos-4 without antialiasing, level for level."""
    view = augment.tokenizer_view(_pattern(), 6)
    torch.testing.assert_close(view[0] * 255, torch.tensor(LANCZOS4, dtype=torch.float32), rtol=0, atol=1e-4)


def test_tokenizer_view_ignores_autocast() -> None:
    """A half-precision resize would give other tokens."""
    expected = augment.tokenizer_view(_pattern(), 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.tokenizer_view(_pattern(), 6), expected)


def test_tokenizer_view_of_equal_size_is_the_frame() -> None:
    """No resize where none is needed."""
    frame = _pattern()[:, :, :10]
    assert torch.equal(augment.tokenizer_view(frame, 10), frame.permute(0, 3, 1, 2) / 255)


def test_encoder_layout_and_normalisation() -> None:
    """One pixel, by hand: its place in (B, 3, T, H, W) and its value."""
    clips = torch.zeros(2, 3, 4, 5, 3, dtype=torch.uint8)
    clips[1, 2, 3, 4] = torch.tensor([200, 100, 50])
    out = augment.to_encoder_clips(clips)
    assert out.shape == (2, 3, 3, 4, 5)
    expected = torch.tensor([(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375])
    torch.testing.assert_close(out[1, :, 2, 3, 4], expected)
    torch.testing.assert_close(augment.to_encoder_images(clips[1])[2, :, 3, 4], expected)


def test_color_jitter_equals_torchvision() -> None:
    """Two images, each with its own factors and order, level for level."""
    images = _pattern()[:, :3, :4].expand(2, -1, -1, -1)
    params = torch.tensor([[*factors, *order] for factors, order, _ in JITTERED])
    expected = torch.tensor(
        [[int(level) for level in levels.split()] for *_, levels in JITTERED], dtype=torch.uint8
    ).view(2, 3, 4, 3)
    assert torch.equal(augment.color_jitter(images, params), expected)


def test_color_jitter_identity() -> None:
    """Factors of one change nothing, in either type."""
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = torch.tensor([[1.0, 1.0, 1.0, 2.0, 0.0, 1.0]] * 2)
    assert torch.equal(augment.color_jitter(images, params), images)
    torch.testing.assert_close(augment.color_jitter(images / 255, params), images / 255)


def _boxes(clips: Tensor) -> list[tuple[int, int, int, int]]:
    """(top, left, rows, columns) of what is 0 in each clip of ones; it must be a box, in all frames and channels."""
    found = []
    for clip in clips:
        hidden = (clip == 0).numpy()
        rows, columns = np.flatnonzero(hidden[0, 0].any(1)), np.flatnonzero(hidden[0, 0].any(0))
        if len(rows):
            found.append((rows[0], columns[0], rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]))
            top, left, height, width = found[-1]
            expected = torch.ones_like(clip)
            expected[..., top : top + height, left : left + width] = 0
            assert torch.equal(clip, expected)
    return found


def _timm_box(generator: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """One box, as timm's documentation and defaults have it."""
    while True:
        area = generator.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            return generator.randint(0, height - rows), generator.randint(0, width - columns), rows, columns


def test_erased_boxes_are_distributed_as_timms() -> None:
    """Of 2000 clips of 60 x 45, a quarter within five standard deviations; means and deviations of their boxes."""
    height, width = 60, 45
    boxes = np.array(_boxes(augment.erase(torch.ones(2000, 3, 2, height, width), np.arange(2000), 0.25)))
    assert abs(len(boxes) - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75)
    generator = random.Random(0)
    expected = np.array([_timm_box(generator, height, width) for _ in range(20000)])

    def measures(boxes: np.ndarray) -> np.ndarray:
        top, left, rows, columns = boxes.T
        return np.stack([rows * columns, np.log(rows / columns), top / (height - rows), left / (width - columns)])

    got, known = measures(boxes), measures(expected)
    deviation = known.std(1)
    np.testing.assert_allclose((got.mean(1) - known.mean(1)) / deviation, 0, atol=5 / math.sqrt(len(boxes)))
    np.testing.assert_allclose(got.std(1) / deviation, 1, atol=5 / math.sqrt(2 * len(boxes)))
    np.testing.assert_allclose(np.corrcoef(got) - np.corrcoef(known), 0, atol=5 / math.sqrt(len(boxes)))
    assert {0.0, 1.0} <= set(got[2]) & set(got[3])  # every border is reached
    assert got[0].min() >= 0.02 * height * width - 30
    assert got[0].max() <= height * width / 3 + 30  # a side is rounded by up to half a pixel


def test_erasing_with_certainty_and_never() -> None:
    """Probability 1 leaves no sample whole, 0 all of them."""
    clips = torch.ones(50, 3, 2, 64, 64)
    assert len(_boxes(augment.erase(clips, np.arange(50), 1.0))) == 50
    assert torch.equal(augment.erase(clips, np.arange(50), 0.0), clips)


def test_smoothed_labels_give_cross_entropys_smoothed_loss() -> None:
    """PyTorch's own label smoothing is the oracle; without smoothing, one-hot."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 6, 3, 3, 1])
    loss = torch.nn.functional.cross_entropy(logits, augment.smooth(labels, 7, 0.1))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(augment.smooth(labels, 7, 0.0), torch.eye(7)[labels])


def _levels(samples: int, height: int = 24, width: int = 36) -> tuple[Tensor, Tensor]:
    """Clips (B, 3, 2, H, W), 1 everywhere in the first of a pair, 0 in the second; one-hot targets (B, 2) likewise."""
    first = torch.arange(samples) % 2 == 0
    clips = first[:, None, None, None, None].expand(-1, 3, 2, height, width).float()
    return clips, torch.stack([first, ~first], 1).float()


def test_mixup_mixes_clips_as_targets() -> None:
    """Each pixel of either sample is its target's share of the first."""
    clips, targets = augment.mix(*_levels(100), np.arange(100), 0.8, 0)
    torch.testing.assert_close(clips, targets[:, :1, None, None, None].expand_as(clips))
    torch.testing.assert_close(targets[0::2], targets[1::2].flip(1))
    torch.testing.assert_close(targets.sum(1), torch.ones(100))


def test_cutmix_swaps_a_box_and_counts_it() -> None:
    """Swapped pixels form a box in all frames; the targets are the exact shares of the pixels."""
    before, _ = _levels(100)
    clips, targets = augment.mix(*_levels(100), np.arange(100), 0, 1.0)
    _boxes(clips[0::2])
    assert torch.equal(clips[0::2], 1 - clips[1::2])
    kept = (clips == before).float().mean((1, 2, 3, 4))
    torch.testing.assert_close(targets.gather(1, torch.tensor([[0], [1]]).repeat(50, 1))[:, 0], kept)
    assert len(kept.unique()) > 30


def test_cutmix_boxes_lie_about_uniform_points() -> None:
    """Alpha so large that lambda is 1/2: sides of 34 of 50 (35.4 cut to an even number); 2000 of them.

    A side a of 1 about a uniform point keeps a - a^2 / 4 inside on average: 0.5644 of the frame's.
    """
    clips, targets = augment.mix(*_levels(4000, 50, 50), np.arange(4000), 0, 1e6)
    np.testing.assert_allclose(1 - targets[0::2, 0].mean(), 0.5644**2, atol=0.01)
    places = np.array(_boxes(clips[0::2]))
    middles = places[:, :2] + places[:, 2:] / 2
    np.testing.assert_allclose(middles.mean(0), 25, atol=5 * 50 / math.sqrt(12 * 2000))


DISTRIBUTIONS: dict[float, Callable[[np.ndarray], np.ndarray]] = {
    0.5: lambda x: 2 / math.pi * np.arcsin(np.sqrt(x)),
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
    3.0: lambda x: x**3 * (10 - 15 * x + 6 * x**2),
}
"""Distribution functions of Beta(alpha, alpha) in closed form."""


@pytest.mark.parametrize("alpha", DISTRIBUTIONS)
def test_lambda_is_a_beta_number(alpha: float) -> None:
    """Kolmogorov and Smirnov's distance of 4000 of them, below 1.63 / sqrt(4000) in 99 of 100 cases."""
    _, targets = augment.mix(*_levels(8000, 1, 1), np.arange(8000), alpha, 0)
    shares = np.sort(targets[0::2, 0].numpy())
    assert abs(DISTRIBUTIONS[alpha](shares) - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / math.sqrt(4000)


def test_mixup_and_cutmix_take_half_of_the_pairs_each() -> None:
    """Of 1000 pairs, within five standard deviations."""
    clips, _ = augment.mix(*_levels(2000), np.arange(2000), 1.0, 1.0)
    mixed = ((clips[0::2] > 0) & (clips[0::2] < 1)).flatten(1).any(1)
    assert abs(int(mixed.sum()) - 500) < 80


def test_without_alphas_nothing_is_mixed() -> None:
    """Even an odd number of samples."""
    clips, targets = _levels(3)
    mixed, soft = augment.mix(clips, targets, np.arange(3), 0, 0)
    assert torch.equal(mixed, clips)
    assert torch.equal(soft, targets)


def test_a_pair_follows_its_first_samples_seed() -> None:
    """The second's changes nothing, the first's does."""
    mixed = [augment.mix(*_levels(2), np.array(seeds), 1.0, 0)[1] for seeds in ((5, 1), (5, 2), (6, 1))]
    assert torch.equal(mixed[0], mixed[1])
    assert not torch.equal(mixed[0], mixed[2])


def test_an_odd_sample_has_no_partner() -> None:
    """The message says what is wrong."""
    with pytest.raises(ValueError, match="pairs, but the micro-batch has 3"):
        augment.mix(*_levels(3), np.arange(3), 1.0, 0)


@pytest.mark.parametrize("image", [False, True])
def test_the_micro_batch_does_not_matter(image: bool) -> None:
    """Erasing and mixing of eight samples are those of two and two; an image's are those of a clip's frame."""
    generator = torch.Generator().manual_seed(0)
    clips, targets = torch.randn(8, 3, 2, 32, 32, generator=generator), torch.eye(8)
    seeds = np.arange(8) * 1000

    def augmented(at: slice, clips: Tensor) -> tuple[Tensor, Tensor]:
        return augment.mix(augment.erase(clips[at], seeds[at], 0.5), targets[at], seeds[at], 0.8, 1.0)

    whole, soft = augmented(slice(8), clips)
    parts = [augmented(slice(i, i + 2), clips[:, :, 1] if image else clips) for i in range(0, 8, 2)]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole[:, :, 1] if image else whole)
    assert torch.equal(torch.cat([part for _, part in parts]), soft)


def test_no_value_is_read() -> None:
    """Tensors without values (the meta device) go through everything: nothing waits for a device."""
    clips = torch.empty(8, 3, 2, 32, 32, device="meta")
    targets = augment.smooth(torch.empty(8, dtype=torch.int64, device="meta"), 5, 0.1)
    mixed, soft = augment.mix(augment.erase(clips, np.arange(8), 1.0), targets, np.arange(8), 1.0, 1.0)
    assert mixed.shape == clips.shape
    assert soft.shape == targets.shape


def test_color_augment_leaves_clips_alone_that_are_not_drawn() -> None:
    clips = torch.randint(256, (4, 2, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment.color_augment(clips, np.arange(4), 0.0, 0.0), clips)


def test_color_augment_is_a_jitter_of_each_clip_by_itself() -> None:
    """Factors of 0.6 to 1.4, alike for all frames; what a clip gets does not depend on its neighbours."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(60, 180, (1, 1, 8, 8, 3), dtype=torch.uint8, generator=generator)
    clips = frame.expand(300, 3, -1, -1, -1).contiguous()
    out = augment.color_augment(clips, np.arange(300), 0.8, 0.0)
    assert (out == out[:, :1]).all(), "frames of a clip are alike before, so after too"
    changed = (out != clips).flatten(1).any(1).double().mean().item()
    assert abs(changed - 0.8) < 5 * math.sqrt(0.8 * 0.2 / 300)
    alone = torch.cat([augment.color_augment(clips[i : i + 1], np.array([i]), 0.8, 0.0) for i in range(20)])
    assert torch.equal(alone, out[:20])
    flat = torch.full((300, 1, 4, 4, 3), 100, dtype=torch.uint8)  # contrast and saturation leave it alone
    levels = augment.color_augment(flat, np.arange(300), 1.0, 0.0).flatten(1)[:, 0].double()
    assert levels.min() >= 57, "each adjustment cuts to whole levels"
    assert levels.max() <= 140
    assert abs(levels.mean() - 99) < 5 * 23.1 / math.sqrt(300)


def test_color_augment_drops_colours() -> None:
    """Grey as often as asked: all three levels are the whole part of Rec. 601's sum."""
    clips = torch.randint(256, (400, 1, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    out = augment.color_augment(clips, np.arange(400), 0.0, 0.1)
    grey = (out == out[..., :1]).flatten(1).all(1)
    assert abs(grey.double().mean().item() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 400)
    assert torch.equal(out[~grey], clips[~grey])
    expected = (clips[grey].double() @ torch.tensor(augment.LUMA, dtype=torch.float64)).floor()
    assert ((out[grey][..., 0].double() - expected).abs() <= 1).all()
