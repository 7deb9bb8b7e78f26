"""What happens to a batch on the device: normalisation, colour jitter, and the tokenizer's second resize.

Letters: B clips, M images or frames, T frames of a clip, H x W pixels. Nothing here reads a value back to the host.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MEAN = (123.675, 116.28, 103.53)
"""Per-channel mean of ImageNet in RGB levels (0..255), as the official configuration has it."""
STD = (58.395, 57.12, 57.375)

LUMA = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in a grey version, torchvision's."""

_FIXED_POINT = 2048
"""OpenCV's resize rounds its weights to 1/2048."""


def normalize(frames: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 RGB -> (..., 3, H, W) float32, `(x - MEAN) / STD`, contiguous."""
    mean = torch.tensor(MEAN, device=frames.device)
    std = torch.tensor(STD, device=frames.device)
    return ((frames.float() - mean) / std).movedim(-1, -3).contiguous()


def to_encoder_clips(clips: Tensor) -> Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) float32, normalised."""
    return normalize(clips).transpose(1, 2).contiguous()


def to_encoder_images(images: Tensor) -> Tensor:
    """(M, H, W, 3) uint8 -> (M, 3, H, W) float32, normalised."""
    return normalize(images)


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
