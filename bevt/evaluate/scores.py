"""Scores of predictions. A file's answer is the class of the highest mean probability over its views; only files with a
label count; where probabilities are equal, the lower class number comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from bevt.data import DataError
from bevt.evaluate.predictions import Predictions

MOST_NAMED = 10
"""Classes without a file that are named; the others are counted."""


@dataclass(frozen=True)
class Scores:
    """Shares of 1."""

    files: int
    """Files with a label."""
    unlabelled: int
    """Files without one, which do not count."""
    top1: float
    top5: float | None
    """None where there are no more than five classes."""
    mean_class: float
    """Mean over the classes that occur of the share of their files that is answered right."""
    missing: tuple[str, ...]
    """Classes that no file has."""

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f"top-5 {100 * self.top5:.2f} %, "
        mean = f"mean of the classes {100 * self.mean_class:.2f} %"
        lines = [f"top-1 {100 * self.top1:.2f} %, {top5}{mean}, of {self.files} files"]
        if self.unlabelled:
            lines.append(f"{self.unlabelled} files have no label and do not count")
        if self.missing:
            more = f" and {len(self.missing) - MOST_NAMED} more" if len(self.missing) > MOST_NAMED else ""
            lines.append(f"{len(self.missing)} classes have no file: {', '.join(self.missing[:MOST_NAMED])}{more}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ClassScore:
    """One class that occurs."""

    name: str
    files: int
    top1: float
    """Share of its files that is answered right."""
    wrong: str
    """The most frequent wrong answer for its files; empty: there is none."""
    wrong_share: float
    """Share of its files with that answer."""


def scores(predictions: Predictions) -> Scores:
    """Accuracies. Raises DataError where no file has a label."""
    counts = confusion(predictions)
    known = predictions.labels >= 0
    labels, outputs = predictions.labels[known, None], predictions.video_level()[known]
    own = np.take_along_axis(outputs, labels, 1)
    before = (outputs > own) | ((outputs == own) & (np.arange(len(predictions.classes)) < labels))
    rank = before.sum(1)
    files = counts.sum(1)
    return Scores(
        files=len(labels),
        unlabelled=len(predictions.files) - len(labels),
        top1=float((rank < 1).mean()),
        top5=float((rank < 5).mean()) if len(predictions.classes) > 5 else None,
        mean_class=float((counts.diagonal()[files > 0] / files[files > 0]).mean()),
        missing=tuple(predictions.classes[i] for i in np.flatnonzero(files == 0)),
    )


def confusion(predictions: Predictions) -> np.ndarray:
    """(K, K) int64: files of each class (rows) by their answer (columns). Raises DataError where none has a label."""
    known = predictions.labels >= 0
    if not known.any():
        raise DataError(
            f"none of the {len(known)} files has a label, so that there is nothing to score: give a list with labels, "
            "or a folder for each class"
        )
    k = len(predictions.classes)
    answers = predictions.video_level().argmax(1)
    return np.bincount(predictions.labels[known] * k + answers[known], minlength=k * k).reshape(k, k)


def per_class(predictions: Predictions) -> list[ClassScore]:
    """The classes that occur, the worst first. Raises DataError where no file has a label."""
    counts, names = confusion(predictions), predictions.classes
    right = counts.diagonal()
    wrong = counts - np.diag(right)
    rows = []
    for i in np.flatnonzero(counts.any(1)):
        files, answer = int(counts[i].sum()), int(wrong[i].argmax())
        share = int(wrong[i, answer]) / files
        rows.append(ClassScore(names[i], files, int(right[i]) / files, names[answer] if share else "", share))
    return sorted(rows, key=lambda row: row.top1)


def table(rows: Sequence[ClassScore]) -> Table:
    """The rows for a terminal."""
    out = Table("class", box=None)
    out.add_column("files", justify="right")
    out.add_column("top-1", justify="right")
    out.add_column("most frequent wrong answer")
    out.add_column("share", justify="right")
    for row in rows:
        share = f"{100 * row.wrong_share:.1f} %" if row.wrong else ""
        # Text: the brackets of `Pushing [something]` are no markup.
        out.add_row(Text(row.name), str(row.files), f"{100 * row.top1:.1f} %", Text(row.wrong), share)
    return out
