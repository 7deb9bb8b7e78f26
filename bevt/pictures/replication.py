"""Accuracies by the start of the encoder, beside the paper's: points for seeds, bars for their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLOURS = {"what": "#8fa9c8", "how": "#26508f"}
PAPER = "#c8853a"


def bars(
    out: Path,
    measured: Mapping[str, Mapping[str, Sequence[float]]],
    paper: Mapping[str, float | None],
    title: str,
    paper_title: str,
) -> None:
    """Left: a group of bars for each start, one a labelling, with a point for each seed; right: the paper's, as bars.

    Args:
        out: the PNG; its folder is made where it is missing.
        measured: by start, by labelling ("what", "how"): top-1 accuracies of the seeds, 0 to 1.
        paper: by start: top-1 in percent; None: the paper has none.
        title: of the left panel.
        paper_title: of the right one.
    """
    names = list(measured)
    rows = np.arange(len(names))[::-1]
    figure = Figure(figsize=(12, 1.4 + 0.55 * len(names)), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for i, labels in enumerate(COLOURS):
        at = rows + (0.2 if i == 0 else -0.2)
        values = [100 * np.array(measured[name][labels]) for name in names]
        means = [float(value.mean()) for value in values]
        left.barh(at, means, height=0.36, color=COLOURS[labels], label=f'"{labels}"')
        for y, value, mean in zip(at, values, means):
            left.plot(value, np.full(len(value), y), "o", color="black", markersize=3)
            left.text(value.max() + 1, y, f"{mean:.1f}", va="center", fontsize=9)
    published = [paper.get(name) for name in names]
    shown = [value for value in published if value is not None]
    if shown:
        low = min(shown) - 3
        right.barh(rows, [(value - low if value is not None else 0) for value in published], left=low, color=PAPER)
        for y, top1 in zip(rows, published):
            text = f"{top1:.1f}" if top1 is not None else "not in the paper"
            right.text((low if top1 is None else top1) + 0.1, y, text, va="center", fontsize=9)
        right.set_xlim(low, max(shown) + 1)
    left.set_yticks(rows, names, fontsize=10)
    left.set_xlim(0, 110)
    left.legend(fontsize=9, loc="upper right")
    for axes, text in ((left, title), (right, paper_title)):
        axes.set_title(text, fontsize=11, loc="left")
        axes.set_xlabel("top-1 accuracy [%]", fontsize=10)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
