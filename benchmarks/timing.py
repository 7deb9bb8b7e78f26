"""Times of several steps, taken in turns so that a change of clocks or load meets all of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

Mark = Callable[[], None]
Times = tuple[float, float]
"""Milliseconds from the start of a step to its mark, and to its end."""


class Step(Protocol):
    """Something that is timed; it calls `mark` once, between forward and backward."""

    def __call__(self, mark: Mark) -> object: ...


class _CPU:
    def __call__(self, step: Step) -> Times:
        marks: list[float] = []
        start = time.perf_counter()
        step(lambda: marks.append(time.perf_counter()))
        end = time.perf_counter()
        return (marks[0] - start) * 1e3, (end - start) * 1e3


class _CUDA:
    """By events, with 1 GiB written four times before each step.

    That empties the L2 cache, and keeps a GPU of 4 TB/s busy for a millisecond, in which the host queues the step, so
    that launches are hidden as they are in a training loop: a backward in Triton is six, about 50 us each.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(2**30, dtype=torch.uint8, device="cuda")

    def __call__(self, step: Step) -> Times:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        for _ in range(4):
            self.flush.zero_()
        start.record()
        step(middle.record)
        end.record()
        end.synchronize()
        return start.elapsed_time(middle), start.elapsed_time(end)


def interleaved(
    steps: dict[str, Step], device: str, seconds: float, most: int = 100, least: int = 5, warm: int = 2
) -> dict[str, list[Times]]:
    """Round by round every step once, in an order that rotates; `warm` rounds are not counted.

    It ends after `most` rounds, or after `least` where `seconds` are over. Equal positions in the lists belong to one
    round.
    """
    if not steps:  # nobody can run here
        return {}
    clock = _CUDA() if device == "cuda" else _CPU()
    names = list(steps)
    times: dict[str, list[Times]] = {name: [] for name in names}
    for _ in range(warm):
        for name in names:
            clock(steps[name])
    gc.collect()
    gc.disable()
    try:
        start = time.monotonic()
        for i in range(most):
            if i >= least and time.monotonic() - start > seconds:
                break
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                times[name].append(clock(steps[name]))
    finally:
        gc.enable()
    return times


BUSY = 0.2
"""Cores that others may take while times are measured, before it is said."""


class Others:
    """CPU time that other processes take from now on: a busy machine's times are not an idle one's."""

    def __init__(self) -> None:
        self.start = self._now()

    def cores(self) -> float | None:
        """Cores that they used on average; None where the system does not tell."""
        (began, busy, own), (now, busier, more) = self.start, self._now()
        return None if busier is None or busy is None else max(0.0, (busier - busy - more + own) / (now - began))

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        """Seconds: the clock's, those that the system's cores were busy, this process' own."""
        try:
            words = Path("/proc/stat").read_text().split()
        except OSError:
            return time.monotonic(), None, time.process_time()
        ticks = sum(int(words[i]) for i in (1, 2, 3, 6, 7, 8))  # proc(5): all but idle and iowait, guests not twice
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()
