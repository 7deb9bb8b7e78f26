"""What a run writes down: one JSON row a log step, the same to TensorBoard, and a line a person can follow."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from bevt.config import AnyConfig, UserError
from bevt.data.batch import BadFile, Batch
from bevt.data.build import samples
from bevt.train.distributed import World
from bevt.train.phases import Phases
from bevt.train.step import StepResult


class MetricsWriter:
    """Rows to `metrics.jsonl` and TensorBoard event files of one run folder.

    A run that starts from step `start_step` continues the files: rows written after that checkpoint are dropped first,
    so that they read like those of an uninterrupted run.

    Event files are written here, row by row: on a full disk TensorBoard's own writer, a thread, loses what it holds and
    prints a traceback. All methods raise RunError where the files cannot be written.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.path = folder / "metrics.jsonl"
        with self._explained():
            if self.path.exists():
                # The row of a step comes before its checkpoint, the evaluation of the last step after it.
                rows = [row for row in read_rows(self.path) if row["step"] < start_step + (row["event"] == "train")]
                part = self.path.with_suffix(".part")
                part.write_text("".join(json.dumps(row) + "\n" for row in rows))
                part.replace(self.path)
            self._rows = _Unbuffered(self.path, "a")
            (folder / "tensorboard").mkdir(exist_ok=True)
            # TensorBoard knows a file by "tfevents" and reads a folder's in order of their names.
            self._events = _Unbuffered(folder / "tensorboard" / f"events.out.tfevents.{time.time():.6f}", "x")
            self._records = RecordWriter(self._events)
            self._record(file_version="brain.Event:2")
            self._record(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))  # drops from there on

    def write(self, row: dict[str, Any]) -> None:
        """One row; it needs `event` and `step`, numbers go to TensorBoard under `event/name`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"{row['event']}/{name}", simple_value=value)
            for name, value in row.items()
            if isinstance(value, (int, float)) and name != "step"
        ]
        with self._explained():
            self._rows.write((json.dumps(row) + "\n").encode())
            self._record(step=row["step"], summary=Summary(value=values))

    def close(self) -> None:
        """Close both."""
        with self._explained(), self._rows, self._events:  # network file systems may tell only now
            pass

    def _record(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write the rows of {self.path.parent}: {error.strerror}; make room or mend the folder, then "
                "continue with --resume"
            ) from error


class _Unbuffered(FileIO):
    """A file whose `write` writes all or raises OSError. With a buffer `close` would fail at the same bytes again."""

    def write(self, data: Any) -> int:
        """Length of `data`."""
        left = memoryview(data)
        while left:
            left = left[super().write(left) :]
        return len(data)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class BadFiles:
    """`bad_files.jsonl` of one run folder: a row for every unreadable file, when this process first meets it.

    Processes but the first write `bad_files_rank<n>.jsonl`. What an earlier part of the run has listed, in any of these
    files, is not listed again. The loader names the files in the log.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._path = folder / ("bad_files.jsonl" if world.main else f"bad_files_rank{world.rank}.jsonl")
        self._listed = {
            (row["stream"], row["path"]) for path in folder.glob("bad_files*.jsonl") for row in read_rows(path)
        }

    def add(self, bad: Iterable[BadFile]) -> None:
        """List those that are not listed yet."""
        lines = []
        for entry in bad:
            if (entry.stream, entry.path) not in self._listed:
                self._listed.add((entry.stream, entry.path))
                lines.append(json.dumps(asdict(entry)) + "\n")
        if lines:
            with self._path.open("a+b") as file:
                if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                    file.write(b"\n")  # ends what a kill has torn
                file.write("".join(lines).encode())


class RunError(UserError):
    """A run that cannot start or go on; the message says what is wrong and what to do."""


class Meter:
    """What the steps since the last row did; device scalars are read once a row."""

    def __init__(
        self,
        config: AnyConfig,
        world: World,
        names: list[str],
        out: Path,
        *,
        flop: float = 0.0,
        tokenizing: float = 0.0,
        peak: float = 0.0,
    ) -> None:
        """`flop`: counted operations of one step over all devices but for `tokenizing`'s; `peak`: what one device can
        do a second, 0: not known.
        """
        self.config, self.world, self.names, self.out = config, world, names, out
        self.flop, self.tokenizing, self.peak = flop / world.size, tokenizing / world.size, peak
        self._unchecked: list[tuple[int, list[str], StepResult]] = []
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = self._timed = 0
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """The time of the first row counts from here."""
        self._start = time.perf_counter()

    @contextmanager
    def paused(self, phases: Phases) -> Iterator[None]:
        """What is done here is no step's: its time is in neither the row nor its phases. Waits for the device."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # else steps under way would run in this time
        start = time.perf_counter()
        yield
        phases.mark("")
        self._start += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """The steps of a row that is not written yet, over all processes: a stop must not change what it will say."""
        sums = {name: float(self.world.mean(value.clone())) for name, value in self._sums.items()}
        return {"count": self._count, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the row of `state`."""
        self._count = state["count"]
        device = self.world.device
        self._sums = {name: torch.tensor(v, dtype=torch.float64, device=device) for name, v in state["sums"].items()}

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch, and how long the loop stood still for it."""
        start = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - start
        return batch

    def add(self, step: int, batches: list[Batch], result: StepResult) -> None:
        """Step `step` (1-based) is under way on the device."""
        ids = [name for batch in batches for name in (*batch.clip_ids, *batch.image_ids)]
        replaced = len({(bad.stream, bad.position) for batch in batches for bad in batch.bad})
        counted = {"replaced": torch.full((), float(replaced), device=self.world.device)}  # a kernel, not a copy
        for name, value in {**result.values, **counted}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.double()
        self._count += 1
        self._timed += 1
        self._unchecked.append((step, ids, result))

    def check_finite(self) -> None:
        """Raise RunError for the first step since the last check whose loss or gradients were not finite.

        Its update was skipped on the device.
        """
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked or all(torch.stack([result.finite for _, _, result in unchecked]).tolist()):
            return
        step, ids, result = next(entry for entry in unchecked if not entry[2].finite)
        worst = int(result.worst)
        parameter = self.names[worst] if worst >= 0 else None
        where = f"the gradient of {parameter} is the first that is not" if parameter else "every gradient is finite"
        values = {name: float(value) for name, value in result.values.items()}
        plain = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}  # JSON has no NaN
        path = self.out / f"nonfinite{'' if self.world.main else f'_rank{self.world.rank}'}.json"
        path.write_text(
            json.dumps({"step": step, "parameter": parameter, "values": plain, "inputs": ids}, indent=2) + "\n"
        )
        raise RunError(
            f"step {step}: the loss or a gradient is not finite "
            f"({', '.join(f'{k} {v:.4g}' for k, v in values.items())}). Going back from the loss, {where}. "
            f"The step was not applied; its {len(ids)} inputs are listed in {path}. "
            "A lower --optim.lr, --train.precision float32 or a longer warm-up are the usual cures"
        )

    def row(self, step: int, lr: float, phases: dict[str, float]) -> dict[str, Any]:
        """The means since the last row, over all processes: one device read.

        `replaced` is a count: samples whose file turned out unreadable, so that another was read in its place. Of this
        process alone: `*_seconds` of a step and its `phases` (seconds since the last row); `tflops`, the counted
        operations (masked positions only, activations computed once) of a GPU a second, in 10**12; `mfu`, their share
        of its matrix-product rate; `memory_gib`, the peak: on CUDA of tensors since the last row, on a
        CPU of the process since it began.
        """
        seconds = time.perf_counter() - self._start
        values = self.world.mean(torch.stack(list(self._sums.values())) / self._count)
        row: dict[str, Any] = {"event": "train", "step": step, **dict(zip(self._sums, values.tolist())), "lr": lr}
        row["replaced"] = round(row["replaced"] * self._count * self.world.size)
        row["step_seconds"] = seconds / self._timed
        row |= {f"{phase}_seconds": spent / self._timed for phase, spent in phases.items()}
        row["data_wait"] = self._waited / seconds
        for stream, count in zip(("clips", "images"), samples(self.config), strict=True):
            if count:
                row[f"{stream}_per_second"] = count * self._timed / seconds
        if self.flop:
            flop = self.flop + self.tokenizing * (1 - row.get("tokens_cached", 0.0))
            row["tflops"] = flop * self._timed / seconds / 1e12
        if self.flop and self.peak:
            row["mfu"] = row["tflops"] * 1e12 / self.peak
        row["memory_gib"] = peak_memory(self.world.device) / 2**30
        self._clear()
        return row


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: on CUDA of the allocator since this was last asked, else of the process since it began."""
    if device.type != "cuda":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


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
                BarColumn(bar_width=10),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", table_column=Column()),  # wraps on a narrow terminal
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
                right = f" acc {100 * row[f'accuracy_{stream}']:.1f}%" if f"accuracy_{stream}" in row else ""
                parts.append(f"{stream} {row[f'loss_{stream}']:.3f}{right}")
                parts.append(f"{row[f'{stream}_per_second']:.1f} {unit}")
        parts.append(f"data wait {100 * row['data_wait']:.0f}%")
        if "mfu" in row:
            parts.append(f"MFU {100 * row['mfu']:.1f}%")
        parts.append(f"{row['memory_gib']:.1f} GiB")
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
