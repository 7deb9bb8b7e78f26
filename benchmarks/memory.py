"""Peak memory of a step above its inputs, constants that a module keeps not counted; outputs and gradients are.

Of a training step weights, gradients and moments are too.

On CUDA it is the allocator's own count. On a CPU it is what the operating system saw: a process of its own runs the
step twice, with a malloc that gives back every block of 64 KiB and more at once, resets its high-water mark before the
second run (Linux: `/proc/self/clear_refs`) and reads it after. Scratch that no torch allocator knows of counts too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.problems import Problem, build

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment of a process whose freed blocks of 64 KiB and more go back at once: what is resident is what lives."""


class Peaks(NamedTuple):
    """Bytes above the inputs."""

    forward: int
    """At the peak of the forward pass."""
    both: int
    """At the peak of forward and backward."""


def peaks(problem: Problem, op: str, case: str, names: Sequence[str], threads: int) -> dict[str, Peaks]:
    """By contestant; one is missing where the system does not tell, or where its step ends the process."""
    if problem.device == "cuda":
        return {name: _cuda(problem, name) for name in names}
    if not (STATUS.exists() and os.access(RESET, os.W_OK)):
        return {}
    global _process  # noqa: PLW0603
    if _process is None or _process.poll() is not None:
        environment = {**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "benchmarks.memory"]
        _process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert _process.stdin is not None
    assert _process.stdout is not None
    found: dict[str, Peaks] = {}
    for name in names:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([op, case, name, threads]), file=_process.stdin, flush=True)
        if line := _process.stdout.readline():
            found[name] = Peaks(*json.loads(line))
        else:
            ended = _process.wait()
            print(f"  peak memory of {name} is not known: its process ended with {ended}", file=sys.stderr)
            return {**found, **peaks(problem, op, case, names[len(found) + 1 :], threads)}
    return found


_process: subprocess.Popen[str] | None = None
"""Serves all cases of a run: its imports take seconds. It ends with its standard input."""


def _cuda(problem: Problem, name: str) -> Peaks:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - problem.kept(name)
    marks: list[int] = []
    results = problem.step(name, False, lambda: marks.append(torch.cuda.max_memory_allocated()))
    found = Peaks(marks[0] - before, torch.cuda.max_memory_allocated() - before)
    del results
    return found


def high_water(step: Callable[[], object]) -> int:
    """Bytes that were resident in this process at the peak of `step`."""
    _reset()
    step()
    return resident("VmHWM")


def _reset() -> None:
    """The high-water mark of this process' resident memory (proc(5))."""
    RESET.write_text("5")


def resident(key: str) -> int:
    """Bytes of this process, as the system has them under `key`."""
    match = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None, f"{STATUS} has no {key}"
    return 1024 * int(match[1])


def _serve() -> None:
    """A line a contestant: [op, case, name, threads] -> `Peaks`."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    built: tuple[str, str] | None = None
    for line in sys.stdin:
        op, case, name, threads = json.loads(line)
        if built != (op, case):
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            problem, built = build(op, case, "cpu"), (op, case)
        problem.step(name)
        _reset()
        before = resident("VmRSS") - problem.kept(name)
        marks: list[int] = []
        results = problem.step(name, False, lambda: marks.append(resident("VmHWM")))  # noqa: B023
        found = Peaks(marks[0] - before, resident("VmHWM") - before)
        del results
        print(json.dumps(found), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
