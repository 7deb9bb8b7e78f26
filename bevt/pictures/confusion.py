"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

SIDE, MOST = 900, 64
"""About the side of the map, and the most of one cell, in pixels."""
NUMBERED, NAMED = 30, 60
"""Most classes whose cells have numbers; most names on an axis, and most classes without a list of pairs."""
PAIRS = 10
"""Confused pairs in the list."""
LENGTH = 40
"""Letters of a name on an axis."""


def confusion(out: Path, counts: np.ndarray, classes: Sequence[str], title: str) -> None:
    """A PNG with a row for each class: how its files' answers are spread, in percent of the row.

    Up to 30 classes the cells have numbers, up to 60 every class is named; where there are more, every second, third...
    is, and the ten pairs (class, wrong answer) with most files stand below. A class without a file is a grey row.

    Args:
        out: the PNG; its folder is made where it is missing.
        counts: (K, K) integers, files of each class (rows) by their answer (columns).
        classes: (K,) names.
        title: one line above the picture.

    Raises:
        ValueError: `counts` does not fit the classes.
    """
    k = len(classes)
    if counts.shape != (k, k) or counts.dtype.kind not in "iu" or not k:
        raise ValueError(f"counts must be ({k}, {k}) integers, as the classes, got {counts.shape} {counts.dtype}")
    files = counts.sum(1, keepdims=True)
    shares = np.where(files > 0, 100 * counts / np.maximum(files, 1), np.nan)
    cell = min(MOST, max(1, round(SIDE / k)))
    side = k * cell
    figure = Figure(
        figsize=(side / 100, side / 100), dpi=100
    )  # the map alone: names and bar are added when it is saved
    axes, bar = figure.add_axes((0, 0, 1, 1)), figure.add_axes((1 + 16 / side, 0, 14 / side, 1))
    # The square root: two files in a hundred can be seen, too.
    image = axes.imshow(
        shares,
        cmap=colormaps["Blues"].with_extremes(bad="0.85"),
        norm=PowerNorm(0.5, 0, 100),
        interpolation="nearest",
    )
    figure.colorbar(image, bar, ticks=[0, 1, 5, 10, 25, 50, 75, 100], format="%d %%").ax.tick_params(labelsize=8)
    axes.spines[:].set_color("0.7")
    shown = range(0, k, -(-k // NAMED))
    names = [name if len(name) <= LENGTH else name[: LENGTH - 1] + "…" for name in (classes[i] for i in shown)]
    points = 9 if k <= NUMBERED else 7
    axes.set_xticks(shown, names, rotation=90, fontsize=points, parse_math=False)
    axes.set_yticks(shown, names, fontsize=points, parse_math=False)
    axes.tick_params(length=2, color="0.7")
    axes.set_title(title, loc="left", fontsize=12, pad=10, parse_math=False)
    axes.set_ylabel("class", fontsize=10)
    below = "answer (% of the class's files" + ("; grey: the class has no file)" if (files == 0).any() else ")")
    if k <= NUMBERED:
        for y, x in np.argwhere(counts):
            colour = "white" if shares[y, x] > 40 else "black"
            axes.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", color=colour, fontsize=points - 1)
    if k > NAMED:
        below += "\n\n" + "\n".join(["Most often confused (files, class → answer):", *_pairs(counts, classes)])
    axes.set_xlabel(below, loc="left", fontsize=10, parse_math=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.15)


def _pairs(counts: np.ndarray, classes: Sequence[str]) -> list[str]:
    """A line for each of the pairs with most files; of equal ones, that with the larger share comes first."""
    wrong, files = counts - np.diag(counts.diagonal()), counts.sum(1)
    pairs = sorted(np.argwhere(wrong).tolist(), key=lambda pair: (-wrong[pair[0], pair[1]], files[pair[0]]))
    return [
        f"{wrong[y, x]} of {files[y]} ({100 * wrong[y, x] / files[y]:.0f} %)  {classes[y]}  →  {classes[x]}"
        for y, x in pairs[:PAIRS]
    ]
