"""RandAugment (arXiv 1909.13719) on the device, operation for operation as imgaug's, which the official code runs.

The source is `RandAugment` of aleju/imgaug at 0a37d9a6 (`imgaug/augmenters/collections.py`; 0.4.0 has the same), whose
operations are Pillow's. They are computed here in Pillow's own fixed-point and float arithmetic: over noise and
gradients at ten magnitudes from 0 to 30 the largest difference from imgaug 0.4.0 with Pillow 13 is 0 levels, but for
pixels of a rotation that lie half-way (1 in 20,000 at 10 degrees; imgaug inverts its matrices in float32) and for
`_equalize`; of cutout the size was compared. Statistics (histograms, means) are those of each frame, as there.

Letters: T frames, H x W pixels; a clip is (T, H, W, 3) uint8. Nothing here reads a value back to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bevt import draws
from bevt.config import ConfigError

STRONGEST = 30
"""The magnitude at which every operation has the strength that its entry in `OPERATIONS` names."""

_SEQUENCE = 2**32 + 1
"""Sequence of a sample's random numbers that is RandAugment's; drop path's is 2**32 (`bevt.train.step`)."""

_FILL = 128
"""Level of pixels that come from outside the frame, and of the cut-out square."""


@torch.no_grad()
def rand_augment(clips: Tensor, seeds: np.ndarray, count: int, magnitude: int, *, official: bool = False) -> Tensor:
    """Every sample through `count` of the 18 operations, drawn without replacement, in the order drawn.

    All frames of a clip go through the same operations at the same strength. What a sample gets is a function of its
    seed, not of the batch around it; the draws for a smaller `count` are the first of those for a larger one.

    Args:
        clips: (B, T, H, W, 3) uint8, RGB; images are clips of one frame.
        seeds: (B,) integers, `Batch.clip_seeds` or `Batch.image_seeds`.
        count: operations, 0 to 18; the official configuration for Something-Something has 4.
        magnitude: 0 to 30; there 7.
        official: first flip half of the samples and cut up to magnitude / 224 off each side (resized back, bilinear).
            imgaug's class does so whatever it is asked for, so the official runs on Something-Something, which switch
            their own flip off, were trained on mirrored videos all the same.

    Returns the shape and type of `clips`. Raises ConfigError for a `count` or `magnitude` out of its range.
    """
    operations = list(OPERATIONS.values())
    total = len(operations)
    if not (0 <= count <= total and 0 <= magnitude <= STRONGEST):
        raise ConfigError(
            f"augment.rand_augment must be 0 to {total}, the number of operations, and augment.magnitude 0 to "
            f"{STRONGEST}; got {count} and {magnitude}"
        )
    drawn = draws.uniform(draws.sequence(draws.keys(seeds), _SEQUENCE), np.arange(5 + 3 * total))
    order = drawn[:, 5 : 5 + total].argsort(1, kind="stable")[:, :count]
    out = []
    for clip, numbers, chosen in zip(clips, drawn.tolist(), order.tolist(), strict=True):
        if official:
            clip = _flip_and_crop(clip, magnitude, numbers[:5])
        for i in chosen:
            at = 5 + total + 2 * i
            clip = operations[i](clip, magnitude, numbers[at], numbers[at + 1])
        out.append(clip)
    return torch.stack(out)


def _signed(most: float, m: int, u: float) -> float:
    """A strength that is `most` at the strongest magnitude, with a random sign."""
    return (1 if u < 0.5 else -1) * most * m / STRONGEST


OPERATIONS: dict[str, Callable[[Tensor, int, float, float], Tensor]] = {
    "identity": lambda clip, m, u, v: clip,
    "autocontrast": lambda clip, m, u, v: _autocontrast(clip),
    "equalize": lambda clip, m, u, v: _equalize(clip),
    "invert": lambda clip, m, u, v: 255 - clip,
    "rotate": lambda clip, m, u, v: _rotate(clip, math.radians(_signed(30, m, u))),
    "posterize": lambda clip, m, u, v: _posterize(clip, 8 - 6 * m // STRONGEST),
    "solarize": lambda clip, m, u, v: _solarize(clip, 256 - 256 * m // STRONGEST),
    "colour": lambda clip, m, u, v: _blend(_grey(clip), clip, 1 + _signed(0.9, m, u)),
    "contrast": lambda clip, m, u, v: _blend(_mean_grey(clip), clip, 1 + _signed(0.9, m, u)),
    "brightness": lambda clip, m, u, v: _blend(torch.zeros_like(clip), clip, 1 + _signed(0.9, m, u)),
    "sharpness": lambda clip, m, u, v: _blend(_smooth(clip), clip, 1 + _signed(0.9, m, u)),
    "shear_x": lambda clip, m, u, v: _affine(clip, (1, -math.tanh(_signed(0.3, m, u)), 0), (0, 1, 0)),
    "shear_y": lambda clip, m, u, v: _affine(clip, (1, 0, 0), (-math.tanh(_signed(0.3, m, u)), 1, 0)),
    "translate_x": lambda clip, m, u, v: _affine(clip, (1, 0, -_signed(0.33, m, u) * clip.shape[2]), (0, 1, 0)),
    "translate_y": lambda clip, m, u, v: _affine(clip, (1, 0, 0), (0, 1, -_signed(0.33, m, u) * clip.shape[1])),
    "cutout": lambda clip, m, u, v: _cutout(clip, 20 / 32 * m / STRONGEST, u, v),
    "blur": lambda clip, m, u, v: _blur(clip),
    "smooth": lambda clip, m, u, v: _smooth(clip),
}
"""What is done to a clip at magnitude `m`, with two random numbers in [0, 1) for its sign or place.

Shears move the rows or columns by tanh(0.3 m / 30), where a tangent was meant, about the top left corner.
"""


def _autocontrast(clip: Tensor) -> Tensor:
    """Each channel's levels stretched to 0..255; a channel of one level stays."""
    low, high = (x.double().unsqueeze(-1) for x in (clip.amin((1, 2)), clip.amax((1, 2))))  # (T, 3, 1)
    levels = torch.arange(256, device=clip.device)
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)  # 255 / x is a reciprocal times 255, rounded twice
    stretched = (levels * scale - low * scale).clamp(0, 255)
    return _look_up(clip, torch.where(high > low, stretched, levels))


def _equalize(clip: Tensor) -> Tensor:
    """Each channel's histogram made flat, as Pillow does it: its step counts the pixels below the brightest level.

    The one operation that departs from imgaug, whose own version of it counts the pixels below level 255: another step
    in a frame that has no such level (a few levels' difference; imgaug means to equal Pillow).
    """
    planes = _planes(clip)
    counts = torch.zeros(*planes.shape[:2], 256, dtype=torch.int64, device=clip.device)
    counts.scatter_add_(2, planes, torch.ones_like(planes))
    below = counts.cumsum(2) - counts
    step = below.gather(2, planes.amax(2, keepdim=True)) // 255
    flat = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _look_up(clip, torch.where(step > 0, flat, torch.arange(256, device=clip.device)))


def _planes(clip: Tensor) -> Tensor:
    """(T, 3, H * W) int64."""
    return clip.movedim(-1, 1).flatten(2).long()


def _look_up(clip: Tensor, table: Tensor) -> Tensor:
    """`clip` with each level replaced by its entry in the frame's and channel's `table` (T, 3, 256), cut to uint8."""
    return table.to(torch.uint8).gather(2, _planes(clip)).unflatten(2, clip.shape[1:3]).movedim(1, -1)


def _posterize(clip: Tensor, bits: int) -> Tensor:
    """Only the highest bits of each level."""
    return clip & (256 - 2 ** (8 - bits))


def _solarize(clip: Tensor, threshold: int) -> Tensor:
    """Levels from `threshold` on inverted."""
    return torch.where(clip.int() < threshold, clip, 255 - clip)  # as int: 256 is no uint8


def _blend(base: Tensor, clip: Tensor, factor: float) -> Tensor:
    """`base` at factor 0, `clip` at 1, beyond at more: Pillow's float32 arithmetic, cut to whole levels."""
    base = base.float()
    return (base + factor * (clip - base)).clamp(0, 255).to(torch.uint8)


def _grey(clip: Tensor) -> Tensor:
    """(T, H, W, 1) int32: luma of ITU-R 601 in units of 1 / 65536, rounded to whole levels."""
    red, green, blue = clip.int().unbind(-1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).unsqueeze(-1)


def _mean_grey(clip: Tensor) -> Tensor:
    """(T, 1, 1, 1) int64: the mean of each frame's luma, rounded to a whole level."""
    pixels = clip.shape[1] * clip.shape[2]
    return (2 * _grey(clip).sum((1, 2, 3), keepdim=True) + pixels) // (2 * pixels)


def _smooth(clip: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels in which the middle one counts five times; the outermost pixels stay."""
    out = clip.clone()
    out[:, 1:-1, 1:-1] = (2 * (_box_sum(clip, 3) + 4 * clip[:, 1:-1, 1:-1].int()) + 13) // 26
    return out


def _blur(clip: Tensor) -> Tensor:
    """Mean over the rim of 5 x 5 pixels; the two outermost pixels stay."""
    out = clip.clone()
    out[:, 2:-2, 2:-2] = (_box_sum(clip, 5) - _box_sum(clip, 3)[:, 1:-1, 1:-1] + 8) // 16
    return out


def _box_sum(clip: Tensor, size: int) -> Tensor:
    """(T, H - size + 1, W - size + 1, 3) int32: sums over `size` x `size` pixels."""
    sums = F.avg_pool2d(clip.movedim(-1, 1).float(), size, stride=1, divisor_override=1)  # below 2**24: exact
    return sums.int().movedim(1, -1)


def _rotate(clip: Tensor, angle: float) -> Tensor:
    """Clockwise by `angle` in radians, about the middle of the frame."""
    _, height, width, _ = clip.shape
    cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
    return _affine(clip, (cos, sin, x - cos * x - sin * y), (-sin, cos, y + sin * x - cos * y))


def _affine(clip: Tensor, to_x: Sequence[float], to_y: Sequence[float]) -> Tensor:
    """The frame seen through an affine map: output (x, y) shows what lies at (`to_x` . (x, y, 1), `to_y` . (x, y, 1)).

    Pixels, with the origin in the top left corner. The nearest pixel, found in 16.16 fixed point as Pillow does.
    """
    _, height, width, _ = clip.shape
    x = torch.arange(width, device=clip.device)
    y = torch.arange(height, device=clip.device)[:, None]

    def source(along_x: float, along_y: float, offset: float) -> Tensor:
        a, b, c = (math.floor(65536 * z + 0.5) for z in (along_x, along_y, offset + (along_x + along_y) / 2))
        return (a * x + b * y + c) >> 16  # (H, W) int64

    column, row = source(*to_x), source(*to_y)
    outside = (column < 0) | (column >= width) | (row < 0) | (row >= height)
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return clip.flatten(1, 2)[:, index].masked_fill_(outside[..., None], _FILL)


def _cutout(clip: Tensor, share: float, u: float, v: float) -> Tensor:
    """A grey square of `share` of the height, its middle anywhere in the frame."""
    _, height, width, _ = clip.shape
    half, x, y = share * height / 2, u * width, v * height
    out = clip.clone()
    out[:, int(max(y - half, 0)) : int(y + half), int(max(x - half, 0)) : int(x + half)] = _FILL
    return out


def _flip_and_crop(clip: Tensor, magnitude: int, drawn: Sequence[float]) -> Tensor:
    """What imgaug does first: mirror half of the samples, cut something off each side, resize (bilinear)."""
    flip, *cuts = drawn
    _, height, width, _ = clip.shape
    top, bottom, left, right = (round(a * u * magnitude / 224) for a, u in zip((height, height, width, width), cuts))
    clip = (clip.flip(2) if flip < 0.5 else clip)[:, top : height - bottom, left : width - right]
    resized = F.interpolate(clip.movedim(-1, 1).float(), (height, width), mode="bilinear", align_corners=False)
    return resized.round().to(torch.uint8).movedim(1, -1)
