"""Peak memory of a step above its inputs, constants that a module keeps not counted; output and gradients are.

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

import torch

from benchmarks.problems import Problem, build

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def peaks(problem: Problem, op: str, case: str, name: str, threads: int) -> tuple[int, int] | None:
    """Bytes at the peak of the forward, and of forward and backward; None where the system does not tell."""
    if problem.device == "cuda":
        return _cuda(lambda mark: problem.step(name, False, mark))
    if not (STATUS.exists() and os.access(RESET, os.W_OK)):
        return None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", op, case, name],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"  peak memory of {name} is not known: its process ended with code {done.returncode}", file=sys.stderr)
        return None
    forward, total = json.loads(done.stdout.splitlines()[-1])
    return forward, total


def _cuda(step: Callable[[Callable[[], None]], object]) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    marks: list[int] = []
    step(lambda: marks.append(torch.cuda.max_memory_allocated()))
    return marks[0] - before, torch.cuda.max_memory_allocated() - before


def _resident(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None, f"{STATUS} has no {key}"
    return 1024 * int(match[1])


def _child(op: str, case: str, name: str) -> None:
    problem = build(op, case, "cpu")
    step = lambda mark: problem.step(name, False, mark)  # noqa: E731
    step(lambda: None)
    RESET.write_text("5")  # the high-water mark of resident memory (proc(5))
    before = _resident("VmRSS")
    marks: list[int] = []
    step(lambda: marks.append(_resident("VmHWM")))
    print(json.dumps([marks[0] - before, _resident("VmHWM") - before]))


if __name__ == "__main__":
    _child(*sys.argv[1:])
