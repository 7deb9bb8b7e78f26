"""What happens to a batch on the device: normalisation, colour jitter, the tokenizer's second resize; where classes are
learned, erasing, mixing and soft targets (`bevt.data.randaugment` is the rest).

Letters: B clips, M images or frames, T frames of a clip, H x W pixels, K classes. Nothing here reads a value back to
the host; random numbers are drawn on the host, as functions of a sample's seed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from bevt import draws
from bevt.config import IMAGENET, Pixels

LUMA = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in a grey version, torchvision's."""

_FIXED_POINT = 2048
"""OpenCV's resize rounds its weights to 1/2048."""

_ERASING = 2**32 + 2
"""Sequence of a sample's random numbers that is random erasing's; RandAugment's is the one before."""
_MIXING = 2**32 + 3
"""Likewise, mixing's."""

_COLOR = 2**32 + 6
"""Likewise, colour augmentation's."""

_ORDERS = np.array(list(permutations(range(3))))

_TRIES = 10
"""Boxes that random erasing draws; where none fits, nothing is erased."""


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """`values` on their way to `device`, which nobody waits for."""
    host = torch.from_numpy(values)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def normalize(frames: Tensor, pixels: Pixels = IMAGENET) -> Tensor:
    """(..., H, W, 3) uint8 RGB -> (..., 3, H, W) float32, `(x - mean) / std`, contiguous."""
    mean = torch.tensor(pixels.mean, device=frames.device)
    std = torch.tensor(pixels.std, device=frames.device)
    return ((frames.float() - mean) / std).movedim(-1, -3).contiguous()


def to_encoder_clips(clips: Tensor, pixels: Pixels = IMAGENET) -> Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) float32, normalised."""
    return normalize(clips, pixels).transpose(1, 2).contiguous()


def to_encoder_images(images: Tensor, pixels: Pixels = IMAGENET) -> Tensor:
    """(M, H, W, 3) uint8 -> (M, 3, H, W) float32, normalised."""
    return normalize(images, pixels)


@torch.no_grad()
def color_jitter(images: Tensor, params: Tensor) -> Tensor:
    """Brightness, contrast and saturation of each image by its own factors, in its own order.

    images: (M, H, W, 3), uint8 in 0..255 or float in 0..1. params: (M, 6), `Batch.image_jitter`: the three factors,
    then the three adjustments (0 brightness, 1 contrast, 2 saturation) in the order in which they are applied. Each
    blends the image with black, with the mean of its grey version, or with its grey version, and clamps; uint8 results
    are cut to whole levels after each, as torchvision's tensor transforms do. Returns the type and shape of `images`.

    The official pipeline (`ColorJitter` of its mmaction) departs from this in three ways: it jitters the whole rescaled
    image before the crop, so that contrast blends with the grey mean of all of it, here with that of the crop; it stays
    in float32 and clamps and cuts to whole levels once, after the last adjustment; and it draws one order when the
    pipeline is built, for all images of a process, here every image has its own.
    """
    whole = images.dtype == torch.uint8
    top = 255.0 if whole else 1.0
    luma = torch.tensor(LUMA, device=images.device)
    x = images.float()
    factors, order = params[:, :3].to(x), params[:, 3:].long()
    for step in range(3):
        kind = order[:, step].view(-1, 1, 1, 1)
        factor = factors.gather(1, order[:, step : step + 1]).view(-1, 1, 1, 1)
        grey = (x * luma).sum(-1, keepdim=True)
        grey = grey.floor() if whole else grey
        other = torch.where(kind == 1, grey.mean((1, 2, 3), keepdim=True), grey) * (kind != 0)
        x = (factor * x + (1 - factor) * other).clamp(0, top)
        x = x.floor() if whole else x
    return x.to(images.dtype)


@torch.no_grad()
def color_augment(clips: Tensor, seeds: np.ndarray, color: float, grey: float) -> Tensor:
    """ViViT's colour augmentation of (B, T, H, W, 3) uint8, alike for all frames of a clip.

    With probability `color` brightness, contrast and saturation change as in `color_jitter`, by factors uniform in 0.6
    to 1.4 in an order of their own; then with probability `grey` colours are dropped. A function of each sample's seed
    (B,). Scenic's (`dataset_lib/video_ops`) also turns the hue, and adds to the brightness instead of scaling it.
    """
    u = draws.uniform(draws.sequence(draws.keys(seeds), _COLOR), np.arange(6))
    factors = np.where(u[:, :1] < color, 0.6 + 0.8 * u[:, 1:4], 1.0)
    order = _ORDERS[(len(_ORDERS) * u[:, 4]).astype(np.int64)]
    drawn = sent(np.column_stack([factors, order, u[:, 5] < grey]).astype(np.float32), clips.device)
    b, t, h, w, _ = clips.shape
    x = color_jitter(clips.reshape(b, t * h, w, 3), drawn[:, :6]).view(clips.shape)
    luma = torch.tensor(LUMA, device=clips.device)
    flat = (x.float() * luma).sum(-1, keepdim=True).floor().to(x.dtype).expand_as(x)
    return torch.where(drawn[:, 6].view(-1, 1, 1, 1, 1) > 0, flat, x)


@torch.no_grad()
def tokenizer_view(frames: Tensor, size: int) -> Tensor:
    """What the tokenizer sees of the encoder's crop: (M, H, W, 3) uint8 -> (M, 3, size, size) float32 in [0, 1].

    The resize is Lanczos-4 over 8 fixed taps *without* antialiasing, with replicated borders and results rounded to
    whole levels: OpenCV's INTER_LANCZOS4 on uint8, which the official code uses (a resize with antialiasing gives other
    tokens). It is done in OpenCV's own fixed-point arithmetic, so the two are equal: the largest difference from
    opencv-python-headless 4.14 and 5.0 over random and smooth images of eight sizes is 0 levels.
    """
    _, height, width, _ = frames.shape
    with torch.autocast(frames.device.type, enabled=False):
        x = frames.movedim(-1, 1).float()  # (M, 3, H, W)
        if width != size or height != size:
            rows = x @ _lanczos4(width, size, frames.device).T  # whole numbers below 2**20: exact
            # Split so that every product and sum below stays a whole number under 2**24 (and every factor under 2**11,
            # which TF32 holds too): floating point then is integer arithmetic.
            high = (rows / 1024).floor()
            vertical = _lanczos4(height, size, frames.device)
            total = (vertical @ high).int() * 1024 + (vertical @ (rows - high * 1024)).int()
            x = ((total + (_FIXED_POINT**2 >> 1)) >> 22).clamp(0, 255).float()
        return x / 255


@torch.no_grad()
def erase(clips: Tensor, seeds: np.ndarray, probability: float) -> Tensor:
    """Random erasing (arXiv 1708.04896): with `probability`, a box of a sample is set to 0, the same in all frames.

    clips: (B, 3, T, H, W) or (B, 3, H, W), normalised, so that 0 is the mean colour; seeds: (B,) integers. Returns the
    shape and type of `clips`.

    The box is that of timm's `RandomErasing` at its defaults, which the official pipeline has for Something-Something:
    its share of the frame uniform in 0.02 .. 1/3, its height over its width log-uniform in 0.3 .. 1/0.3, the first of
    ten tries with both sides shorter than the frame's, anywhere.
    """
    height, width = clips.shape[-2:]
    u = draws.uniform(draws.sequence(draws.keys(seeds), _ERASING), np.arange(1 + 4 * _TRIES))
    share, aspect, down, right = u[:, 1:].reshape(-1, 4, _TRIES).swapaxes(0, 1)  # (B, tries) each
    area = height * width * (0.02 + (1 / 3 - 0.02) * share)
    aspect = np.exp(math.log(0.3) * (1 - 2 * aspect))
    rows, columns = np.rint(np.sqrt(area * aspect)).astype(int), np.rint(np.sqrt(area / aspect)).astype(int)
    fits = (rows < height) & (columns < width)
    top, left = (down * (height - rows + 1)).astype(int), (right * (width - columns + 1)).astype(int)
    out = clips.clone()
    for i in np.flatnonzero((u[:, 0] < probability) & fits.any(1)):
        k = fits[i].argmax()
        out[i, ..., top[i, k] : top[i, k] + rows[i, k], left[i, k] : left[i, k] + columns[i, k]] = 0
    return out


def smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) int64 in 0 .. K - 1 -> (B, K) float32: `smoothing / K` everywhere, and 1 - `smoothing` more at the label.

    So do timm, `torch.nn.CrossEntropyLoss` and the official `LabelSmoothing` (mmaction/datasets/blending_utils.py).
    """
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)


@torch.no_grad()
def mix(clips: Tensor, targets: Tensor, seeds: np.ndarray, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of samples 2k and 2k + 1, each the other's partner.

    Both samples of a pair keep the same share of themselves, lambda, drawn from Beta(alpha, alpha). CutMix puts a box
    of area 1 - lambda about a uniform point, cuts it off at the frame's border, and corrects lambda to what is left
    (timm's `Mixup` in its mode `pair`); the box is the same in all frames. What a pair gets follows from the seed of
    its first sample, so not from the size of the micro-batch.

    Args:
        clips: (B, 3, T, H, W) or (B, 3, H, W) float.
        targets: (B, K) float, probabilities.
        seeds: (B,) integers.
        mixup: alpha of mixup; 0: none.
        cutmix: alpha of CutMix; 0: none. Where neither is 0, half of the pairs get the one, half the other.

    Returns clips and targets of the same shapes and types. Raises ValueError for an odd number of samples.
    """
    if not (mixup or cutmix):
        return clips, targets
    if len(clips) % 2:
        raise ValueError(f"samples are mixed in pairs, but the micro-batch has {len(clips)}: make it even")
    height, width = clips.shape[-2:]
    drawn = draws.uniform(draws.sequence(draws.keys(seeds[::2]), _MIXING), np.arange(5))
    mixed, soft = clips.clone(), targets.clone()
    for k, (which, a, b, x, y) in enumerate(drawn.tolist()):
        pair = slice(2 * k, 2 * k + 2)
        cut = which < 0.5 if mixup and cutmix else bool(cutmix)
        share = _beta(a, b, cutmix if cut else mixup)
        if cut:
            half_height, half_width = (int(side * math.sqrt(1 - share)) // 2 for side in (height, width))
            middle, centre = int(y * height), int(x * width)
            top, bottom = max(middle - half_height, 0), min(middle + half_height, height)
            left, right = max(centre - half_width, 0), min(centre + half_width, width)
            mixed[pair, ..., top:bottom, left:right] = clips[pair, ..., top:bottom, left:right].flip(0)
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            mixed[pair] = torch.lerp(clips[pair].flip(0), clips[pair], share)
        soft[pair] = torch.lerp(targets[pair].flip(0), targets[pair], share)
    return mixed, soft


def _beta(u: float, v: float, alpha: float) -> float:
    """Beta(alpha, alpha) of two uniform numbers, exactly and without rejection.

    Bailey's polar method (Mathematics of Computation 62, 1994) makes Student's t with 2 alpha degrees of freedom of
    them, of which x / sqrt(2 alpha + x^2) is a symmetric Beta on (-1, 1).
    """
    radius = np.sqrt(np.expm1(-math.log1p(-u) / alpha))
    return float(1 + np.sin(np.arctan(radius * math.cos(2 * math.pi * v)))) / 2


@lru_cache(maxsize=16)
def _lanczos4(source: int, target: int, device: torch.device) -> Tensor:
    """(target, source) float32: weights of every source pixel for every target pixel, in units of 1 / _FIXED_POINT."""
    if source == target:
        return _FIXED_POINT * torch.eye(source, device=device)
    # Pixel centres, in float32 as OpenCV computes them: the fraction decides how a weight rounds.
    centre = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int64)
    distance = (centre - first).astype(np.float64)[:, None] + 3 - np.arange(8)  # to taps first - 3 .. first + 4
    weights = np.sinc(distance) * np.sinc(distance / 4)
    weights = np.rint(weights / weights.sum(1, keepdims=True) * _FIXED_POINT)
    columns = (first[:, None] - 3 + np.arange(8)).clip(0, source - 1)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target)[:, None], columns), weights)
    return torch.from_numpy(matrix).to(device)
