"""Clips as strips of frames: what is hidden, what the codes stand for, what the model put in the gaps; and mask sheets.

Letters: T frames, H x W pixels, h x w patches of a frame, p pixels of a patch in the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bevt import masking
from bevt.config import MaskConfig

COLUMNS = 8
"""Most frames of a strip; a longer clip shows every second, third... frame."""
CELL = 192
"""About the side of a frame in the picture, in pixels; a patch gets a whole number of them."""
GREY = (128, 128, 128)
"""Hidden patches."""
EDGE = (255, 196, 0)
"""Outline of the hidden region in rebuilt frames."""
SEEN, HIDDEN = (222, 228, 236), (38, 60, 92)
"""A mask's patches on a sheet of masks."""
KINDS = tuple(MaskConfig(kind=kind) for kind in ("block", "tube", "frame_diff", "random_frame", "random_3d"))
"""The paper's masks at their default sizes."""


def strip(
    out: Path,
    frames: np.ndarray | Tensor,
    mask: np.ndarray | Tensor,
    rebuilt: Mapping[str, np.ndarray | Tensor],
    title: str,
) -> None:
    """One clip (or, with T = 1, one image) as a PNG, a row each:

    the frames; the frames with the hidden patches grey; what was rebuilt, with the hidden region outlined.

    Args:
        out: the PNG; its folder is made where it is missing.
        frames: (T, H, W, 3) uint8, RGB.
        mask: (T, h, w) bool, True = hidden; repeat the token grid's mask over the frames of a token first.
        rebuilt: by the row's label, (T, 3, gH, gW) float in [0, 1], any size.
        title: one line above the picture.

    Raises:
        ValueError: the shapes or types do not belong together (names the argument).
    """
    frames, mask = as_frames(frames), _array(mask)
    if mask.ndim != 3 or len(mask) != len(frames) or mask.dtype != np.bool_:
        raise ValueError(f"mask must be ({len(frames)}, h, w) bool, like the frames, got {mask.shape} {mask.dtype}")
    shown = spread(len(frames))
    p = max(1, round(CELL / max(mask.shape[1:])))
    size = mask.shape[1] * p, mask.shape[2] * p
    hidden = [mask[t].repeat(p, 0).repeat(p, 1) for t in shown]
    whole = [resize(frames[t], size) for t in shown]
    rows = [
        ("original", whole),
        ("what the\nencoder sees", [_paint(f, m, GREY) for f, m in zip(whole, hidden)]),
    ]
    for label, given in rebuilt.items():
        pixels = _array(given)
        if pixels.ndim != 4 or pixels.shape[:2] != (len(frames), 3) or pixels.dtype.kind != "f":
            name = " ".join(label.split())
            raise ValueError(f"{name!r} must be ({len(frames)}, 3, gH, gW) float, got {pixels.shape} {pixels.dtype}")
        colours = (pixels[shown].clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
        rows.append((label, [_paint(resize(f, size), _edge(m), EDGE) for f, m in zip(colours, hidden)]))
    save(sheet(title, rows, [f"frame {t}" for t in shown] if len(frames) > 1 else [""]), out)


def masks(
    out: Path, configs: Sequence[MaskConfig] = KINDS, grid: tuple[int, int, int] = (8, 14, 14), seed: int = 0
) -> None:
    """A sheet of masks as a PNG: a row per configuration, two samples of d frames in each (`block`: 2 d samples).

    Args:
        out: the PNG; its folder is made where it is missing.
        configs: the rows; by default the paper's five kinds.
        grid: (d, h, w) of the clips' token grid.
        seed: the samples of a row have the seeds from here on.

    Raises:
        ConfigError: a mask that is impossible on the grid.
        ValueError: no configurations.
    """
    if not configs:
        raise ValueError("configs is empty: a sheet of masks needs at least one")
    d, h, w = grid
    p = max(1, round(CELL / 2.5 / max(h, w)))
    rows = []
    for config in configs:
        if config.kind == "block":
            mask = masking.generate(config, np.arange(seed, seed + 2 * d), (1, h, w)).swapaxes(0, 1)
            mask = mask.reshape(2, d, h, w)
        else:
            mask = masking.generate(config, np.arange(seed, seed + 2), grid)
        canvas = np.full((2, d, h * p, w * p, 3), SEEN, np.uint8)
        canvas[mask.repeat(p, 2).repeat(p, 3)] = HIDDEN
        canvas[..., ::p, :, :] = canvas[..., :, ::p, :] = 255
        name = config.kind + (", wrapping" if config.wrap and config.kind in ("tube", "frame_diff") else "")
        rows.append((f"{name}\n{100 * mask.mean():.0f} % hidden", list(canvas.reshape(2 * d, h * p, w * p, 3))))
    columns = [f"t = {t}" for t in range(d)] * 2
    title = f"Masks on {d} x {h} x {w} tokens, two clips a row (block: {2 * d} images); dark = hidden"
    save(sheet(title, rows, columns, group=d), out)


def _array(value: np.ndarray | Tensor) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def as_frames(value: np.ndarray | Tensor) -> np.ndarray:
    """(T, H, W, 3) uint8, T > 0; ValueError where it is not."""
    frames = _array(value)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be (T, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    return frames


def spread(frames: int) -> np.ndarray:
    """Numbers of the frames of a clip that are shown."""
    return np.arange(0, frames, -(-frames // COLUMNS))


def resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8."""
    return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))


def _paint(frame: np.ndarray, where: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.where(where[..., None], np.array(colour, np.uint8), frame)


def _edge(mask: np.ndarray) -> np.ndarray:
    """The two outermost pixels inside the mask, but none along the frame's own border."""
    padded = np.pad(mask, 2, mode="edge")
    height, width = mask.shape
    inner = mask.copy()
    for y, x in ((0, 2), (4, 2), (2, 0), (2, 4)):
        inner &= padded[y : y + height, x : x + width]
    return mask & ~inner


def sheet(
    title: str, rows: list[tuple[str, list[np.ndarray]]], columns: list[str], group: int = COLUMNS, below: int = 0
) -> Figure:
    """Equal cells (uint8) on white, pixel for pixel, with a label to the left of each row and above each column.

    After every `group` columns there is a wider gap; `below` the cells so many pixels stay free.
    """
    height, width = rows[0][1][0].shape[:2]
    gap, top, margin, dpi = 6, 64, 12, 100
    left = 130 if any(label for label, _ in rows) else margin
    lefts = [left + j * (width + gap) + j // group * 4 * gap for j in range(len(columns))]
    total_width = max(lefts[-1] + width + gap + margin, 640)
    total_height = top + len(rows) * (height + gap) + margin + below
    figure = Figure(figsize=(total_width / dpi, total_height / dpi), dpi=dpi)

    def text(x: float, y: float, string: str, points: float, ha: str, va: str) -> None:
        place = x / total_width, 1 - y / total_height
        figure.text(*place, string, fontsize=points, ha=ha, va=va, parse_math=False)  # `$` in a file's name is no maths

    text(margin, 14, title, 12, "left", "top")
    canvas = np.full((total_height, total_width, 3), 255, np.uint8)
    for x, label in zip(lefts, columns):
        text(x + width / 2, top - 6, label, 9, "center", "bottom")
    for i, (label, cells) in enumerate(rows):
        y = top + i * (height + gap)
        text(left - 10, y + height / 2, label, 10, "right", "center")
        for x, cell in zip(lefts, cells):
            canvas[y : y + height, x : x + width] = cell
    figure.figimage(canvas, zorder=-1)  # below what a caller draws
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write a PNG; its folder is made where it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
