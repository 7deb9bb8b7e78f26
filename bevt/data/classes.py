"""Which class each file is of: names of classes, and the number of each file's label among them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bevt.data import DataError
from bevt.data.manifest import Manifest

MOST_NAMED = 5
"""Files or classes that an error names; the others are counted."""


def read_classes(path: str) -> tuple[str, ...]:
    """The names in a file, by number: one a line, `number,name` lines (Kinetics' label map, with or without a header),
    or SSv2's json {template: number}.

    Raises DataError where the file cannot be read, a name comes twice, or the numbers are not 0, 1, 2, ...
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"head.classes: {path} cannot be read as text ({error})") from error
    if path.endswith(".json"):
        try:
            numbered = [(int(number), name) for name, number in json.loads(text).items()]
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"head.classes: {path} is not {{name: number}} ({error})") from error
    else:
        rows = [row for row in csv.reader(text.splitlines()) if any(map(str.strip, row))]
        body = rows[1:] if rows and [cell.strip().lower() for cell in rows[0]] == ["id", "name"] else rows
        if body and all(len(row) > 1 and row[0].strip().isdecimal() for row in body):
            numbered = [(int(row[0]), ",".join(row[1:]).strip()) for row in body]
        else:
            lines = [line.strip() for line in text.rstrip().splitlines()]
            if "" in lines:
                raise DataError(
                    f"head.classes: line {lines.index('') + 1} of {path} is empty: name a class or delete it"
                )
            numbered = list(enumerate(lines))
    numbered.sort()
    names = tuple(name for _, name in numbered)
    if [number for number, _ in numbered] != list(range(len(names))):
        raise DataError(f"head.classes: the numbers in {path} are not 0, 1, 2, ... without a gap")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"head.classes: {path} names {twice[0]!r} twice")
    if len(names) < 2:
        raise DataError(f"head.classes: {path} names {len(names)} classes; at least two are needed")
    return names


def found_classes(manifest: Manifest, source: str) -> tuple[str, ...]:
    """The classes that the labels of a source speak of: 0 to the highest number, or all names in alphabetical order.

    Raises DataError where a file has no label, some labels are numbers and others names, a number is below 0 or has no
    file, or there are fewer than two classes.
    """
    labels = _labels(manifest, source)
    texts = {label for label in labels if isinstance(label, str)}
    present = {label for label in labels if isinstance(label, int)}
    if texts and not present:
        names = tuple(sorted(texts))
    elif present and not texts:
        highest = max(present)
        if min(present) < 0:
            raise DataError(f"{source}: the label {min(present)} is below 0: classes count from 0")
        if gaps := highest + 1 - len(present):
            absent = next(number for number in range(highest + 1) if number not in present)
            more = f" and {gaps - 1} more" if gaps > 1 else ""
            start = " (classes count from 0, not from 1)" if (absent, gaps) == (0, 1) else ""
            raise DataError(
                f"{source}: labels go up to {highest}, but no file has class {absent}{more}{start}; if these "
                "classes exist, name all with --head.classes FILE, one a line"
            )
        names = tuple(map(str, range(highest + 1)))
    else:
        raise DataError(f"{source}: some labels are numbers, others names ({min(texts)!r}); use one of both")
    if len(names) < 2:
        raise DataError(f"{source}: all files have the label {names[0]!r}; at least two classes are needed")
    return names


def class_numbers(manifest: Manifest, source: str, classes: Sequence[str], *, numbered: bool) -> np.ndarray:
    """(files,) int64: the class of each file, unreadable ones too, in the manifest's order.

    `numbered`: the classes have numbers that somebody gave them, so that labels may be such. Raises DataError, naming
    the first, for files without a label, and for labels that are not among the classes.
    """
    by_name = {name: number for number, name in enumerate(classes)}
    labels = _labels(manifest, source)
    if not numbered and (number := next((label for label in labels if isinstance(label, int)), None)) is not None:
        raise DataError(
            f"{source}: labels are numbers ({number}), but the classes are known by names ({classes[0]!r}, ...): say "
            "which number is which with --head.classes FILE"
        )
    numbers = np.array(
        [
            (label if 0 <= label < len(classes) else -1) if isinstance(label, int) else by_name.get(label, -1)
            for label in labels
        ],
        np.int64,
    )
    if wrong := np.flatnonzero(numbers < 0).tolist():
        first = f"{manifest.entries[wrong[0]].path} has {labels[wrong[0]]!r}"
        known = (
            f"0 to {len(classes) - 1}" if isinstance(labels[wrong[0]], int) else f"{classes[0]!r} to {classes[-1]!r}"
        )
        raise DataError(
            f"{source}: {len(wrong)} files have a label that is none of the {len(classes)} classes ({known}): {first}"
        )
    return numbers


def are_numbers(classes: Sequence[str]) -> bool:
    """The classes have no names but their numbers."""
    return tuple(classes) == tuple(map(str, range(len(classes))))


def without_files(numbers: np.ndarray, classes: Sequence[str]) -> str:
    """The classes that none of the files is of, in words; empty where each has one."""
    absent = np.flatnonzero(np.bincount(numbers, minlength=len(classes)) == 0).tolist()
    return f"{len(absent)} of {len(classes)} classes: {_some([repr(classes[i]) for i in absent])}" if absent else ""


def _labels(manifest: Manifest, source: str) -> list[str | int]:
    """Every entry's label. Raises DataError where one has none."""
    labels, without = [], []
    for entry in manifest.entries:
        if entry.label is None:
            without.append(entry)
        else:
            labels.append(entry.label)
    if without:
        odd = " (the label beside it is neither a number nor a text)" if without[0].mislabelled else ""
        raise DataError(
            f"{source}: {len(without)} of {len(manifest.entries)} files have no label, {without[0].path} the "
            f"first{odd}; give a list of `path label` lines, a published annotation file, or a folder for each class"
        )
    return labels


def _some(items: Sequence[object]) -> str:
    text = ", ".join(map(str, items[:MOST_NAMED]))
    return text if len(items) <= MOST_NAMED else f"{text} and {len(items) - MOST_NAMED} more"
