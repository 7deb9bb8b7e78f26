"""Loss and masked accuracy of a run against its steps, beside what a model that learned nothing would score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STREAMS = {"clips": "#0072B2", "images": "#D55E00"}
"""Streams and their colours (Okabe and Ito's palette: told apart by colour-blind readers, too)."""
LINES = ("-", "--", "-.", ":")
"""One style a run."""
Row = dict[str, Any]
SMOOTH = 60
"""From this many rows on, a curve is drawn thin, with a running mean over a thirtieth of its rows on top."""


def curves(metrics: Path | Sequence[Path], out: Path) -> None:
    """Draw a run's curves, or several runs' in one picture, as a PNG.

    Left: cross-entropy in nats of the masked tokens, a line per stream; where the file has an `eval` row, a dotted
    line at the entropy of the held-out tokens (the loss of always answering their frequencies) and a diamond for the
    held-out loss. Right: masked accuracy in percent, with the share of the commonest token as the dotted line.
    Of VideoMAE the mean squared error alone, with that of predicting each patch's mean as the dotted line.
    A last line cut off by a kill is left out, and the picture says so.

    Args:
        metrics: `metrics.jsonl` of the run, or of each run; the folder's name labels a run where there are several.
        out: the PNG; its folder is made where it is missing.

    Raises:
        FileNotFoundError: a metrics file does not exist.
        ValueError: runs of pixels and of tokens together; a file that has no training rows, or a line that is no row
            of metrics (names file and line).
    """
    paths = [metrics] if isinstance(metrics, Path) else list(metrics)
    if not paths:
        raise ValueError("no metrics file was given: name the metrics.jsonl of at least one run")
    names = [f" of {path.absolute().parent.name}" if len(paths) > 1 else "" for path in paths]
    runs = [(name, *_read(path)) for name, path in zip(names, paths)]
    kinds = {"mean_clips" in row for _, rows, *_ in runs for row in rows}
    if len(kinds) > 1:
        raise ValueError("runs of pixels (VideoMAE) and of tokens have no loss in common: draw each kind by itself")
    pixels = kinds == {True}
    figure = Figure(figsize=(7 if pixels else 13, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 1 if pixels else 2, squeeze=False)[0]
    loss = panels[0]
    if pixels:
        loss.set_title("Loss on hidden patches", fontsize=13, loc="left")
        loss.set_ylabel("mean squared error of normalised pixels", fontsize=11)
        _panel(loss, runs, "loss", "mean", "always the patch's mean", 1, "")
    else:
        loss.set_title("Loss on masked tokens", fontsize=13, loc="left")
        loss.set_ylabel("cross-entropy [nats]", fontsize=11)
        _panel(loss, runs, "loss", "entropy", "entropy of the tokens", 1, " nats")
        accuracy = panels[1]
        accuracy.set_title("Accuracy on masked tokens", fontsize=13, loc="left")
        accuracy.set_ylabel("top-1 accuracy [%]", fontsize=11)
        _panel(accuracy, runs, "accuracy", "commonest", "always the commonest token", 100, " %")
        accuracy.set_ylim(bottom=0)
    entries = max(len(axes.get_legend_handles_labels()[0]) for axes in panels)
    figure.set_figheight(4.6 + 0.2 * entries)
    cut = [f"{path.absolute().parent.name}/{path.name}" for path, run in zip(paths, runs) if run[3]]
    if cut:
        note = f"The last line of {', '.join(cut)} is cut off and left out."
        figure.supxlabel(note, fontsize=9, color="#B00000")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")


def _panel(
    axes: Axes,
    runs: Sequence[tuple[str, list[Row], Row, bool]],
    quantity: str,
    chance: str,
    chance_name: str,
    scale: float,
    unit: str,
) -> None:
    """Every run's `quantity`; `chance` is the key of what knowing only the token frequencies would score."""
    levels = set()
    for (run, rows, evaluation, _), line in zip(runs, LINES * len(runs)):
        for stream, colour in STREAMS.items():
            _line(axes, rows, f"{quantity}_{stream}", scale, f"{stream}{run}", color=colour, linestyle=line)
            if f"val_{quantity}_{stream}" in evaluation:
                value = scale * evaluation[f"val_{quantity}_{stream}"]
                label = f"{stream}{run}, held out: {value:.2f}{unit}"
                axes.plot(evaluation["step"], value, "D", ms=8, mec="white", color=colour, zorder=4, label=label)
            if f"{chance}_{stream}" in evaluation:
                value = scale * evaluation[f"{chance}_{stream}"]
                label = f"{stream}, {chance_name}: {value:.2f}{unit}"
                if label not in levels:  # runs on the same held-out tokens share the line
                    axes.axhline(value, color=colour, linestyle=":", linewidth=1.6, label=label)
                levels.add(label)
    axes.set_xlabel("optimizer step", fontsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.12))


def _line(axes: Axes, rows: list[Row], key: str, scale: float, label: str, **style: Any) -> None:
    """One curve; nothing where no row has the key (a stream that takes no part)."""
    points = [(row["step"], scale * row[key]) for row in rows if key in row]
    if not points:
        return
    step, value = np.array(points, float).T
    if len(points) >= SMOOTH:
        axes.plot(step, value, lw=0.8, alpha=0.35, **style)
        width = len(points) // 30
        window = np.ones(width) / width
        step, value = np.convolve(step, window, "valid"), np.convolve(value, window, "valid")
        label += f" (mean of {width} rows)"
    axes.plot(step, value, lw=1.8, marker="o" if len(points) == 1 else None, label=label, **style)


def _read(path: Path) -> tuple[list[Row], Row, bool]:
    """Training rows, the last evaluation row ({} where there is none), and whether the last line is cut off."""
    if not path.is_file():
        raise FileNotFoundError(f"no metrics file {path}: name the metrics.jsonl in a run's folder")
    lines = path.read_text(errors="replace").splitlines()
    rows, evaluation, cut = [], {}, False
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row, cut = None, number == len(lines)
        if cut:
            continue
        if not isinstance(row, dict) or "step" not in row:
            raise ValueError(f"{path}, line {number} is no row of metrics: {line[:60]!r}")
        if row.get("event", "train") == "train":
            rows.append(row)
        elif row["event"] == "eval":
            evaluation = row
    if not any(f"loss_{stream}" in row for row in rows for stream in STREAMS):
        raise ValueError(f"{path} has no training rows yet (of {len(lines)} lines): let the run log a step first")
    return rows, evaluation, cut
