"""What this machine can do at most: the denominators of "% of limit", measured in the run that they are for.

Arithmetic: the fastest large matrix product, or direct convolution, of any library at hand. Memory: a copy of what no
cache holds, its bytes read and written. What a data sheet says, nothing reaches. `python -m benchmarks.limits DEVICE
THREADS` prints both in five seconds, for a run that measures them once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bevt_kernels import Spec, linear, select

from benchmarks import timing
from benchmarks.registry import DTYPES

SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Of the matrices."""
COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of the copy's source."""


class Limits(NamedTuple):
    """Of one device, dtype and number of threads."""

    flops: float
    """FLOP/s of matrix products."""
    bandwidth: float
    """Bytes a second, read and written."""


def measure(device: str) -> Limits:
    """In the dtype of the device's benchmarks. The best round: a limit is what was reached, not what is usual."""
    dtype = DTYPES[device]
    with torch.no_grad():
        flops = max(flop / _least(work, device) for flop, work in _products(device, dtype))
        source = torch.randint(256, (COPIED[device],), dtype=torch.uint8, device=device)
        targets = [torch.empty_like(source) for _ in range(3)]  # where one lies makes a difference on a CPU
        copy = min(_least(partial(target.copy_, source), device) for target in targets)
    return Limits(flops, 2 * len(source) / copy)


def _products(device: str, dtype: torch.dtype) -> Iterator[tuple[int, Callable[[], Any]]]:
    """FLOP and work of large products by each library at hand."""
    for side in SIDES[device]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        flop = 2 * side**3
        yield flop, partial(torch.mm, a, b.t())
        if device == "cpu" and not select.reasons("linear", "native", Spec(device, dtype)):
            yield flop, partial(linear, a, b, impl="native")
    if device == "cpu":  # oneDNN, where torch's own product may be far from the best
        image = torch.randn(8, 512, 28, 28).contiguous(memory_format=torch.channels_last)
        for size in (1, 3):
            weight = torch.randn(512, 512, size, size).contiguous(memory_format=torch.channels_last)
            flop = 2 * 8 * 28**2 * 512**2 * size**2
            yield flop, partial(F.conv2d, image, weight, padding="same")


def _least(work: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest round."""

    def step(mark: timing.Mark) -> None:
        mark()
        work()

    return min(total for _, total in timing.interleaved({"": step}, device, 0.5, most=20)[""]) / 1e3


def main() -> None:
    """The command."""
    from benchmarks.arguments import threads

    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=DTYPES)
    parser.add_argument("threads", type=threads)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    others = timing.Others()
    print(*measure(args.device))
    if (busy := others.cores()) and busy > timing.BUSY:
        print(f"other processes took {busy:.1f} cores meanwhile: these are no idle machine's limits", file=sys.stderr)


if __name__ == "__main__":
    main()
