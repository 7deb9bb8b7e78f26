"""Numbers of rows, and plain tables, as the commands print them."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Columns two blanks apart, numbers to the right, and those at `left` (negative: from the last) to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    ends = {i % len(widths) for i in left}
    sides = [str.ljust if i in ends else str.rjust for i in range(len(widths))]
    padded = ("  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def short(x: float) -> float:
    """Five digits: more are noise."""
    return float(f"{x:.5g}")
