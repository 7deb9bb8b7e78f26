"""Peak memory of a step above its inputs, constants that a module keeps not counted; outputs and gradients are.

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
from collections.abc import Callable
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


def peaks(problem: Problem, op: str, case: str, name: str, threads: int) -> Peaks | None:
    """None where the system does not tell."""
    if problem.device == "cuda":
        return _cuda(lambda mark: problem.step(name, False, mark))
    if not (STATUS.exists() and os.access(RESET, os.W_OK)):
        return None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", op, case, name],
        env={**os.environ, **MALLOC} | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"  peak memory of {name} is not known: its process ended with code {done.returncode}", file=sys.stderr)
        return None
    return Peaks(*json.loads(done.stdout.splitlines()[-1]))


def _bytes(results: Leaves) -> int:
    return sum(x.nbytes for x in results.values())


def _cuda(step: Callable[[Callable[[], None]], Leaves]) -> Peaks:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    marks: list[int] = []
    results = step(lambda: marks.append(torch.cuda.max_memory_allocated()))
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


def _child(op: str, case: str, name: str) -> None:
    problem = build(op, case, "cpu")
    step = lambda mark: problem.step(name, False, mark)  # noqa: E731
    step(lambda: None)
    RESET.write_text("5")  # the high-water mark of resident memory (proc(5))
    before = resident("VmRSS")
    marks: list[int] = []
    results = step(lambda: marks.append(resident("VmHWM")))
    print(json.dumps([marks[0] - before, resident("VmHWM") - before, _bytes(results)]))


if __name__ == "__main__":
    _child(*sys.argv[1:])
