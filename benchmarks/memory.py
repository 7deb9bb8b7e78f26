"""Peak memory of a step above its inputs, constants that a module keeps not counted; outputs and gradients are.

Of a training step weights, gradients and moments are too.

On CUDA it is the allocator's own count. On a CPU it is what the operating system saw: a process of its own runs the
step twice, with a malloc that gives back every block of 64 KiB and more at once, resets its high-water mark before the
second run (Linux: `/proc/self/clear_refs`) and reads it after. Scratch that no torch allocator knows of counts too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.problems import Leaves, Problem, build

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
    results: int
    """Of outputs and gradients, which are part of the last peak; the rest of it is scratch."""


def peaks(problem: Problem, op: str, case: str, names: Sequence[str], threads: int) -> dict[str, Peaks]:
    """By contestant; one is missing where the system does not tell, or where its step ends the process."""
    if problem.device == "cuda":
        return {name: _cuda(problem, name) for name in names}
    if not (STATUS.exists() and os.access(RESET, os.W_OK)):
        return {}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", op, case, *names],
        env={**os.environ, **MALLOC} | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    found = {name: Peaks(*figures) for name, figures in map(json.loads, done.stdout.splitlines())}
    if done.returncode:
        missing = ", ".join(name for name in names if name not in found)
        print(f"  peak memory of {missing} is not known: the process ended with {done.returncode}", file=sys.stderr)
    return found


def _bytes(results: Leaves) -> int:
    return sum(x.nbytes for x in results.values())


def _cuda(problem: Problem, name: str) -> Peaks:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - problem.kept(name)
    marks: list[int] = []
    results = problem.step(name, False, lambda: marks.append(torch.cuda.max_memory_allocated()))
    return Peaks(marks[0] - before, torch.cuda.max_memory_allocated() - before, _bytes(results))


def high_water(step: Callable[[], object]) -> int:
    """Bytes that were resident in this process at the peak of `step`."""
    RESET.write_text("5")  # the high-water mark of resident memory (proc(5))
    step()
    return resident("VmHWM")


def resident(key: str) -> int:
    """Bytes of this process, as the system has them under `key`."""
    match = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None, f"{STATUS} has no {key}"
    return 1024 * int(match[1])


def _child(op: str, case: str, *names: str) -> None:
    problem = build(op, case, "cpu")
    for name in names:
        problem.step(name)
        RESET.write_text("5")  # the high-water mark of resident memory (proc(5))
        before = resident("VmRSS") - problem.kept(name)
        marks: list[int] = []
        results = problem.step(name, False, lambda: marks.append(resident("VmHWM")))  # noqa: B023
        print(json.dumps([name, [marks[0] - before, resident("VmHWM") - before, _bytes(results)]]), flush=True)
        del results


if __name__ == "__main__":
    _child(*sys.argv[1:])
