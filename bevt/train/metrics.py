"""What a run writes down: one JSON row a log step, the same to TensorBoard, and a line a person can follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class MetricsWriter:
    """Rows to `metrics.jsonl` and TensorBoard event files of one run folder.

    A run that starts from step `start_step` continues the files: rows written after that checkpoint are dropped first,
    so that they read like those of an uninterrupted run.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            # The row of a step comes before its checkpoint, the evaluation of the last step after it.
            rows = [row for row in read_rows(self.path) if row["step"] < start_step + (row["event"] == "train")]
            part = self.path.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            part.replace(self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """One row; it needs `event` and `step`, numbers go to TensorBoard under `event/name`."""
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self._board.add_scalar(f"{row['event']}/{name}", value, row["step"])

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@contextmanager
def counting(title: str, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar, on a terminal, for work that is counted in files: yields a function to call with (done, in all)."""
    console = Console()
    with Progress(console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield report


class Display:
    """A progress bar on a terminal, a line a log step elsewhere, nothing on other ranks."""

    def __init__(self, title: str, start: int, total: int, enabled: bool) -> None:
        self.console = Console(stderr=False, highlight=False, soft_wrap=True, quiet=not enabled)
        self._bar: Progress | None = None
        self._total = total
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn(title),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, text="")
            self._bar.start()

    def step(self, done: int) -> None:
        """`done` steps are complete."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def row(self, row: dict[str, Any], eta_seconds: float) -> None:
        """The state of the run at a log step."""
        parts = [f"loss {row['loss']:.3f}"]
        for stream, unit in (("clips", "clips/s"), ("images", "images/s")):
            if f"loss_{stream}" in row:
                parts.append(f"{stream} {row[f'loss_{stream}']:.3f} acc {100 * row[f'accuracy_{stream}']:.1f}%")
                parts.append(f"{row[f'{stream}_per_second']:.1f} {unit}")
        parts.append(f"data wait {100 * row['data_wait']:.0f}%")
        minutes, seconds = divmod(round(eta_seconds), 60)
        self.text(row["step"], "  ".join(parts), f"  ETA {minutes}:{seconds:02d}")

    def text(self, step: int, text: str, tail: str = "") -> None:
        """Any state at a log step; `tail` is what a terminal's bar shows anyway."""
        if self._bar:
            self._bar.update(self._task, text=text)
        else:
            self.console.print(f"step {step}/{self._total}  {text}{tail}")

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()
