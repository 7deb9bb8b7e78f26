"""The committed rows as plots and the README take them: of each case the newest run, on each machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import rows as rows_of
from benchmarks.registry import OPS, PARTS
from benchmarks.rows import Row
from benchmarks.timing import BUSY

T = TypeVar("T")
FOLDER = Path(__file__).parent / "results"
OURS = ("native", "triton")
"""Contestants that are ours in rows older than the field."""
WHOLE = ("forward+backward", "step", "forward")
"""The quantity that is all of a case's work: the first of these that it has."""


def read(folder: Path = FOLDER) -> list[Row]:
    """Rows of every op, in the order of a whole run.

    Without those of cases that the registry has no more, and those that say why somebody was not measured.
    """
    found = (row for path in sorted(folder.glob("*.jsonl")) for row in rows_of.read(path))
    rows = (row for row in found if "op" in row and "absent" not in row)
    there = [row for row in rows if row["op"] not in OPS or row["case"] in OPS[row["op"]].cases]
    order = list(dict.fromkeys(part.op for parts in PARTS.values() for part in parts))
    return sorted(there, key=lambda row: order.index(row["op"]) if row["op"] in order else len(order))


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each case on each machine the rows of its last run, a clean tree's where there is one.

    Of a tree without git nobody knows whether it was clean, so it counts as one that was not. Contestants of
    different runs are never mixed. Last is by date, then by place in the file.
    """
    found: list[Row] = []
    for of_case in grouped(rows, lambda row: (machine(row), *case(row))).values():
        clean = [row for row in of_case if row["dirty"] is False] or of_case
        last = sorted(clean, key=lambda row: row["date"])[-1]
        found += [row for row in clean if _run(row) == _run(last)]
    return found


def whole(rows: Iterable[Row]) -> list[Row]:
    """Rows of the quantity that is all of their case's work."""
    found: list[Row] = []
    for of_case in grouped(rows, case).values():
        there = {row["quantity"] for row in of_case}
        found += [row for row in of_case if row["quantity"] == next((name for name in WHOLE if name in there), None)]
    return found


def swept(row: Row) -> bool:
    """Whether its case is one of a series for memory or scaling, and not of a model."""
    entry = OPS[row["op"]].cases.get(row["case"]) if row["op"] in OPS else None
    return entry is not None and entry.group in ("memory", "scaling")


def ours(row: Row) -> bool:
    """Whether the row is of a kernel of ours, or of what is built on them; the plain reference is not."""
    return row.get("ours", row["contestant"] in OURS) and row["contestant"] != "reference"


def case(row: Row) -> tuple[str, str, str]:
    """What is computed: op, case and dtype."""
    return row["op"], row["case"], row["dtype"]


def machine(row: Row) -> str:
    """A GPU's name, or a CPU's with cores, instruction set, and threads where they are not one a core."""
    there = row["machine"]
    if there.get("gpu"):
        return there["gpu"]
    n = row["threads"]
    threads = "" if n in (None, there["cores"]) else f", {n} thread{'s' * (n > 1)}"
    return f"{there['cpu']}, {there['cores']} cores, {there['isa']}{threads}"


def grouped(rows: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Rows by what `key` says of them, in order."""
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def digits(x: float) -> str:
    """Three of them: 1.9 -> 1.90."""
    return f"{x:#.3g}".rstrip(".") if x < 999.5 else f"{x:.0f}"


def duration(ms: float) -> str:
    """In seconds from one on."""
    return f"{digits(ms / 1e3)} s" if ms >= 999.5 else f"{digits(ms)} ms"


def commit(row: Row) -> str:
    """Short, with a + where changes were not committed, a ? where no git could tell, a ! where others were at work."""
    busy = "!" if (row.get("others_cores") or 0) > BUSY else ""
    return row["commit"][:7] + {False: "", True: "+", None: "?"}[row["dirty"]] + busy


def _run(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("commit", "dirty", "tree", "date", "run", "machine", "versions"))
