"""What a model answers for one clip: its frames, and the likeliest classes as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from bevt.pictures.strips import CELL, as_frames, resize, save, sheet, spread

TOP = 5
"""Most classes that are shown."""
BAR = "#0072B2"
"""Colour of a bar."""
ROOM, LENGTH = 34, 616
"""Height of a class, its name above its bar, and length of a full bar, in pixels."""


def answer(
    out: Path,
    frames: np.ndarray | Tensor,
    classes: Sequence[str],
    probabilities: Sequence[float] | np.ndarray | Tensor,
    title: str,
) -> None:
    """One clip (or, with T = 1, one image) as a PNG: frames in a row, and below them the likeliest classes in order.

    A full bar is a probability of 1; of equal ones the lower class number comes first.

    Args:
        out: the PNG; its folder is made where it is missing.
        frames: (T, H, W, 3) uint8, RGB.
        classes: (K,) names of all classes.
        probabilities: (K,) in [0, 1].
        title: one line above the picture.

    Raises:
        ValueError: the shapes or types do not belong together (names the argument).
    """
    frames, shares = as_frames(frames), np.asarray(probabilities, np.float64)
    if shares.shape != (len(classes),):
        raise ValueError(f"probabilities must be ({len(classes)},), as the classes, got {shares.shape}")
    best = np.argsort(-shares, kind="stable")[:TOP]
    shown = spread(len(frames))
    height, width = frames.shape[1:3]
    size = max(1, CELL * height // max(height, width)), max(1, CELL * width // max(height, width))
    cells = [resize(frames[t], size) for t in shown]
    below = ROOM * len(best) + 16
    figure = sheet(title, [("", cells)], [f"frame {t}" for t in shown] if len(frames) > 1 else [""], below=below)
    total_width, total_height = figure.get_size_inches() * figure.dpi
    rectangle = 12 / total_width, 12 / total_height, LENGTH / total_width, ROOM * len(best) / total_height
    axes = figure.add_axes(rectangle)
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5))
    axes.barh(np.arange(len(best)) + 0.25, 1, height=0.25, color="0.92")
    axes.barh(np.arange(len(best)) + 0.25, shares[best], height=0.25, color=BAR)
    for y, i in enumerate(best):
        axes.text(0, y - 0.02, classes[i], fontsize=10, parse_math=False)
        axes.text(1, y - 0.02, f"{100 * shares[i]:.1f} %", fontsize=10, ha="right")
    save(figure, out)
