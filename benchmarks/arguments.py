"""Types of the commands' arguments, and what is looked at before any work."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import bevt_kernels

from benchmarks import rows, verify
from bevt.data.processes import cores


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def threads(text: str) -> int:
    """As many as there are cores, or fewer: more wait for each other's turn, for minutes."""
    found = positive(text)
    if found > cores():
        raise argparse.ArgumentTypeError(f"must be at most the {cores()} cores of this machine, got {found}")
    return found


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return found


def seconds(text: str) -> float:
    """Of time."""
    return above_zero(text)


def obstacle(*files: Path) -> str:
    """Why nothing should be measured here, with what to do; empty where nothing speaks against it.

    `files` are where rows will go; the folder $OUT is made.
    """
    kernels = Path(str(bevt_kernels.__file__)).resolve()
    if not kernels.is_relative_to(verify.ROOT.resolve()):
        return f"the kernels come from {kernels.parents[1]}, not from this tree: set PYTHONPATH=.:kernels"
    try:
        for file in files:
            rows.check(file)
        if out := os.environ.get("OUT"):
            rows.check(Path(out) / "rows.jsonl")
    except (rows.Unreadable, OSError) as error:
        return str(error)
    return ""
