"""RandAugment against Pillow, frame by frame and level for level; what is drawn; what it may not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from bevt.config import ConfigError
from bevt.data import randaugment
from bevt.data.randaugment import OPERATIONS, rand_augment

T, H, W = 4, 41, 58
GREY = (128, 128, 128)
MAGNITUDES = (0, 1, 7, 15, 30)


def _clip() -> Tensor:
    """(T, H, W, 3) uint8: noise, a bright and a dark gradient with some noise, and one colour."""
    generator = np.random.default_rng(0)
    y, x, c = np.mgrid[0:H, 0:W, 0:3]
    gradient = 3 * y + 2 * x + 20 * c + generator.normal(0, 8, (H, W, 3))
    frames = [generator.integers(0, 256, (H, W, 3)), gradient, 60 + 0.3 * gradient, np.full((H, W, 3), (90, 90, 200))]
    return torch.from_numpy(np.stack(frames).clip(0, 255).astype(np.uint8))


def _signed(most: float, m: int, sign: int) -> float:
    return sign * most * m / 30


def _seen_through(forward: list[list[float]]) -> Callable[[Image.Image], Image.Image]:
    """What moves each point of a frame by a (2, 3) matrix, in pixels from the top left corner."""
    inverse = np.linalg.inv([*forward, [0, 0, 1]])[:2].ravel().tolist()
    return lambda frame: frame.transform(frame.size, Image.Transform.AFFINE, inverse, fillcolor=GREY)


PILLOW: dict[str, Callable[[int, int], Callable[[Image.Image], Image.Image]]] = {
    "identity": lambda m, sign: lambda frame: frame,
    "autocontrast": lambda m, sign: ImageOps.autocontrast,
    "equalize": lambda m, sign: ImageOps.equalize,
    "invert": lambda m, sign: ImageOps.invert,
    "rotate": lambda m, sign: lambda frame: frame.rotate(-_signed(30, m, sign), fillcolor=GREY),
    "posterize": lambda m, sign: lambda frame: ImageOps.posterize(frame, 8 - int(0.2 * m)),
    "solarize": lambda m, sign: lambda frame: ImageOps.solarize(frame, 256 - int(256 * m / 30)),
    "colour": lambda m, sign: lambda frame: ImageEnhance.Color(frame).enhance(1 + _signed(0.9, m, sign)),
    "contrast": lambda m, sign: lambda frame: ImageEnhance.Contrast(frame).enhance(1 + _signed(0.9, m, sign)),
    "brightness": lambda m, sign: lambda frame: ImageEnhance.Brightness(frame).enhance(1 + _signed(0.9, m, sign)),
    "sharpness": lambda m, sign: lambda frame: ImageEnhance.Sharpness(frame).enhance(1 + _signed(0.9, m, sign)),
    "shear_x": lambda m, sign: _seen_through([[1, math.tanh(_signed(0.3, m, sign)), 0], [0, 1, 0]]),
    "shear_y": lambda m, sign: _seen_through([[1, 0, 0], [math.tanh(_signed(0.3, m, sign)), 1, 0]]),
    "translate_x": lambda m, sign: _seen_through([[1, 0, _signed(0.33, m, sign) * W], [0, 1, 0]]),
    "translate_y": lambda m, sign: _seen_through([[1, 0, 0], [0, 1, _signed(0.33, m, sign) * H]]),
    "blur": lambda m, sign: lambda frame: frame.filter(ImageFilter.BLUR),
    "smooth": lambda m, sign: lambda frame: frame.filter(ImageFilter.SMOOTH),
}
"""Each operation but cutout as imgaug's source describes it, by magnitude and sign."""


def test_operations_are_the_ones_known() -> None:
    """The eighteen of imgaug, each of which the tests below look at."""
    assert set(OPERATIONS) == {*PILLOW, "cutout"}
    assert len(OPERATIONS) == 18


@pytest.mark.parametrize("m", MAGNITUDES)
@pytest.mark.parametrize("name", PILLOW)
def test_operation_equals_pillow(name: str, m: int) -> None:
    """Both signs, every level of every frame; and the clip itself is left alone."""
    clip = _clip()
    for sign, u in ((1, 0.25), (-1, 0.75)):
        expected = [np.asarray(PILLOW[name](m, sign)(Image.fromarray(frame))) for frame in clip.numpy()]
        got = OPERATIONS[name](clip, m, u, 0.5)
        assert got.dtype == torch.uint8
        np.testing.assert_array_equal(got.numpy(), np.stack(expected))
    assert torch.equal(clip, _clip())


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "cutout"])
def test_geometry_without_magnitude_moves_nothing(name: str) -> None:
    """Pixel for pixel."""
    assert torch.equal(OPERATIONS[name](_clip(), 0, 0.25, 0.5), _clip())


@pytest.mark.parametrize(("u", "v", "box"), [(0.5, 0.5, (19, 37, 19, 37)), (0.0, 0.9, (42, 57, 0, 8))])
def test_cutout_is_a_grey_square(u: float, v: float, box: tuple[int, int, int, int]) -> None:
    """Magnitude 15 of 57 x 57: a side of 17.8 (20/32 * 15/30) about (57 u, 57 v), cut off at the border; by hand."""
    clip = torch.stack([torch.zeros(57, 57, 3, dtype=torch.uint8), torch.full((57, 57, 3), 9, dtype=torch.uint8)])
    top, bottom, left, right = box
    expected = clip.clone()
    expected[:, top:bottom, left:right] = 128
    assert torch.equal(OPERATIONS["cutout"](clip, 15, u, v), expected)


@pytest.mark.parametrize("official", [False, True])
def test_neither_the_batch_nor_the_other_frames_matter(official: bool) -> None:
    """A frame as an image by itself, with its sample's seed: the same as in a clip in a batch."""
    seeds = np.arange(20)
    clips = _clip().expand(20, -1, -1, -1, -1)
    whole = rand_augment(clips, seeds, 4, 7, official=official)
    for i, t in zip(range(20), [0, 1, 2, 3] * 5, strict=True):
        alone = rand_augment(clips[i : i + 1, t : t + 1], seeds[i : i + 1], 4, 7, official=official)
        assert torch.equal(alone[0, 0], whole[i, t])
    assert len({sample.numpy().tobytes() for sample in whole}) > 15


def _drawn(monkeypatch: pytest.MonkeyPatch, samples: int, count: int) -> list[list[tuple[str, float, float]]]:
    """What each of `samples` samples goes through: operation and its two numbers."""
    called: list[tuple[str, float, float]] = []

    def record(name: str) -> Callable[[Tensor, int, float, float], Tensor]:
        def operation(clip: Tensor, m: int, u: float, v: float) -> Tensor:
            called.append((name, u, v))
            return clip

        return operation

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: record(name) for name in OPERATIONS})
    rand_augment(torch.zeros(samples, 1, 1, 1, 3, dtype=torch.uint8), np.arange(samples), count, 7)
    return [called[i : i + count] for i in range(0, len(called), count)]


def test_operations_are_drawn_uniformly_and_never_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of four places, each of 18 has its share of 3600 samples: 200, within five standard deviations (69)."""
    drawn = _drawn(monkeypatch, 3600, 4)
    assert all(len({name for name, *_ in sample}) == 4 for sample in drawn)
    for place in range(4):
        names = [sample[place][0] for sample in drawn]
        assert all(abs(names.count(name) - 200) < 69 for name in OPERATIONS)


def test_signs_and_places_are_uniform_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations' 36 numbers have mean 1/2 and variance 1/12, and nothing to do with each other or the order."""
    samples = 1000
    drawn = _drawn(monkeypatch, samples, 18)
    places = [{name: place for place, (name, *_) in enumerate(sample)} for sample in drawn]
    order = np.array([[at[name] for name in OPERATIONS] for at in places])
    numbers = np.array(
        [[sample[at[name]][1:] for name in OPERATIONS] for sample, at in zip(drawn, places, strict=True)]
    )
    numbers = numbers.reshape(samples, 36)
    np.testing.assert_allclose(numbers.mean(0), 0.5, atol=5 / math.sqrt(12 * samples))
    np.testing.assert_allclose(12 * np.cov(numbers.T), np.eye(36), atol=5 / math.sqrt(samples))
    np.testing.assert_allclose(np.corrcoef(numbers.T, order.T)[:36, 36:], 0, atol=5 / math.sqrt(samples))


def test_official_class_flips_half_of_the_samples() -> None:
    """Of 400 without any operation, dark on the left, bright on the right: 200 within five standard deviations."""
    clips = torch.zeros(400, 1, 32, 32, 3, dtype=torch.uint8)
    clips[:, :, :, 16:] = 255
    out = rand_augment(clips, np.arange(400), 0, 7, official=True)
    assert abs(int((out[:, 0, 0, 0, 0] == 255).sum()) - 200) < 50
    assert torch.equal(rand_augment(clips, np.arange(400), 0, 7), clips)


@pytest.mark.parametrize("flip", [False, True])
def test_official_crop_equals_a_resized_cut(flip: bool) -> None:
    """Of 224 x 112 at magnitude 7, at most 7 rows and 3.5 columns a side; Pillow's bilinear resize, within a level."""
    frame = np.random.default_rng(1).integers(0, 256, (224, 112, 3)).astype(np.uint8)
    numbers = [0.25 if flip else 0.75, 0.9, 0.0, 0.6, 0.3]  # 6.3 from the top, 0 below, 2.1 from the left, 1.05
    image = ImageOps.mirror(Image.fromarray(frame)) if flip else Image.fromarray(frame)
    expected = image.crop((2, 6, 111, 224)).resize((112, 224), Image.Resampling.BILINEAR)
    got = randaugment._flip_and_crop(torch.from_numpy(frame)[None], 7, numbers)[0]
    assert int((got.int() - torch.from_numpy(np.array(expected)).int()).abs().max()) <= 1


def test_no_value_is_read() -> None:
    """Tensors without values (the meta device) go through everything: nothing waits for a device."""
    clips = torch.empty(2, T, H, W, 3, dtype=torch.uint8, device="meta")
    assert rand_augment(clips, np.arange(2), 18, 7, official=True).shape == clips.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same() -> None:
    """All operations in a row, level for level, by PyTorch's own account without a wait."""
    clips, seeds = _clip().expand(8, -1, -1, -1, -1).contiguous(), np.arange(8)
    on_gpu = clips.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = rand_augment(on_gpu, seeds, 18, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.cpu(), rand_augment(clips, seeds, 18, 7))


@pytest.mark.parametrize("wrong", [{"count": 19}, {"count": -1}, {"magnitude": 31}, {"magnitude": -1}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    """The message names the keys of the configuration."""
    with pytest.raises(ConfigError, match=r"augment\.rand_augment must be 0 to 18.*augment\.magnitude 0 to 30"):
        rand_augment(_clip()[None], np.arange(1), **({"count": 4, "magnitude": 7} | wrong))
