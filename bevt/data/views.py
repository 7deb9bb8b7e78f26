"""The two views of contrastive learning: BYOL's distortions (arXiv 2006.07733, appendix B) in the strengths of MoBY's
code (SwinTransformer/Transformer-SSL at 4510de1, `data/build.py`), on the device.

Letters: M images, H x W pixels. The crop and the flip are the loader's. Nothing here reads a value back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bevt import draws
from bevt.data import augment

_VIEWS = 2**32 + 4
"""Sequence of a sample's random numbers that is its views'."""

_NUMBERS = 10
"""Random numbers of one view."""

_ORDERS = np.array(list(permutations(range(4))))

_HUE = 3

_RADIUS = 6
"""Of the blur's kernel, in pixels: three times the largest sigma."""


@dataclass(frozen=True)
class Distortions:
    """What is done to each of M images, from top to bottom: NumPy arrays."""

    factors: np.ndarray
    """(M, 3) of brightness, contrast and saturation; 1: none."""
    hue: np.ndarray
    """(M,) in turns of the colour wheel; 0: none."""
    order: np.ndarray
    """(M, 4) in which the four are applied: 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    grey: np.ndarray
    """(M,) bool."""
    sigma: np.ndarray
    """(M,) of the Gaussian blur, in pixels; 0: none."""
    solarize: np.ndarray
    """(M,) bool."""


def draw(seeds: np.ndarray, second: bool) -> Distortions:
    """Those of the first or second view of samples with `seeds` (M,); a function of each sample's seed and the view.

    Jitter with probability 0.8: brightness and contrast 0.6 to 1.4, saturation 0.8 to 1.2, hue -0.1 to 0.1. Grey with
    0.2. Blur with sigma 0.1 to 2: in the first view always, in the second with 0.1. Solarised with 0.2, the second
    alone.
    """
    u = draws.uniform(draws.sequence(draws.keys(seeds), _VIEWS), np.arange(_NUMBERS) + _NUMBERS * second)
    jitter = (u[:, :1] < 0.8) * np.array([0.4, 0.4, 0.2, 0.1]) * (2 * u[:, 1:5] - 1)
    return Distortions(
        factors=1 + jitter[:, :3],
        hue=jitter[:, 3],
        order=_ORDERS[(len(_ORDERS) * u[:, 5]).astype(np.int64)],
        grey=u[:, 6] < 0.2,
        sigma=np.where(u[:, 7] < (0.1 if second else 1.0), 0.1 + 1.9 * u[:, 8], 0.0),
        solarize=second & (u[:, 9] < 0.2),
    )


def byol(images: Tensor, seeds: np.ndarray, second: bool) -> Tensor:
    """The first or second view of (M, H, W, 3) uint8 crops: (M, 3, H, W) float32, normalised. `seeds`: (M,)."""
    return augment.normalize(distort(images, draw(seeds, second)))


@torch.no_grad()
def distort(images: Tensor, how: Distortions) -> Tensor:
    """(M, H, W, 3) uint8 -> the same in float32, whole levels.

    After each operation levels are cut (jitter, grey) or rounded (blur) to whole ones, as torchvision's tensor
    transforms do. MoBY's code has Pillow's, which round the grey version, keep 256 steps of hue, and blur by three box
    filters: on noise that is at most 4 levels off inside the picture from sigma 1 on, and a stronger blur below 0.5.
    """
    place = np.argsort(how.order, axis=1)
    early = place[:, :3] < place[:, 3:]  # adjustments before the hue's
    order = how.order[how.order != _HUE].reshape(-1, 3)
    columns = [np.where(early, how.factors, 1), order, np.where(early, 1, how.factors), order]
    columns += [how.hue, how.grey, how.sigma, how.solarize]
    one = augment.sent(np.column_stack(columns).astype(np.float32), images.device)  # (M, 16): one transfer
    before, after, rest = one.split([6, 6, 4], dim=1)
    hue, grey, sigma, solarize = rest[:, :, None, None, None].unbind(1)  # (M, 1, 1, 1)
    x = augment.color_jitter(_turn(augment.color_jitter(images, before), hue), after).float()
    red, green, blue = (share * channel for share, channel in zip(augment.LUMA, x.split(1, dim=-1)))
    x = _blur(torch.where(grey > 0, (red + green + blue).floor(), x), sigma.flatten())
    return torch.where((solarize > 0) & (x >= 128), 255 - x, x)


def _turn(images: Tensor, turns: Tensor) -> Tensor:
    """(M, H, W, 3) uint8 with hues turned by `turns` (M, 1, 1, 1), at the same value and saturation of HSV."""
    x = images.float()
    red, green, blue = x.split(1, dim=-1)
    top = x.amax(-1, keepdim=True)
    span = top - x.amin(-1, keepdim=True)
    slope = torch.where(top == red, green - blue, torch.where(top == green, blue - red, red - green))
    sextant = torch.where(top == red, 0, torch.where(top == green, 2, 4)) + slope / span.clamp(min=1) + 6 * turns
    # How far below the top a channel lies is a trapezium over the wheel, two sextants later for each next channel.
    k = (sextant + torch.arange(5, 0, -2, device=x.device)) % 6
    x = top - span * torch.minimum(k, 4 - k).clamp(0, 1)
    return (x * (255.999 / 255)).to(torch.uint8)  # torchvision's way from 0..1 to levels


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """(M, H, W, 3) float32 blurred by `sigma` (M,), mirrored at the borders; whole levels. Sides above _RADIUS."""
    taps = torch.arange(-_RADIUS, _RADIUS + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)  # the least sigma leaves one tap
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, dim=0)[:, None]  # (3M, 1, taps)
    with torch.autocast(x.device.type, enabled=False):
        y = F.pad(x.movedim(-1, 1), [_RADIUS] * 4, mode="reflect").flatten(0, 1)
        y = F.conv2d(y, kernel[..., None], groups=len(kernel))
        y = F.conv2d(y, kernel[:, :, None], groups=len(kernel))
    return y.unflatten(0, (-1, 3)).movedim(1, -1).round()
