"""What this machine can do at most: the denominators of "% of limit", measured in the run that they are for.

Arithmetic: the fastest large matrix product of any library at hand. Memory: a copy of what no cache holds, its bytes
read and written. A few seconds; what a data sheet says, nothing reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bevt_kernels import Spec, linear, select

from benchmarks import timing

SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the matrices."""
COPIED = {"cpu": 2**28, "cuda": 2**31}
"""Bytes of the copy's source."""


class Limits(NamedTuple):
    """Of one device, dtype and number of threads."""

    flops: float
    """FLOP/s of matrix products."""
    bandwidth: float
    """Bytes a second, read and written."""


def measure(device: str, dtype: torch.dtype) -> Limits:
    """The best of some rounds: a limit is what was reached, not what is usual."""
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    products: dict[str, Callable[[], Any]] = {"mm": lambda: torch.mm(a, b.t())}
    if device == "cpu" and dtype == torch.float32:  # where torch's own product may be far from the best
        image = a.view(1, side, 1, side).permute(
            0, 3, 1, 2
        )  # channels-last, so a 1 x 1 convolution is oneDNN's product
        products["convolution"] = lambda: F.conv2d(image, b[:, :, None, None])
        if not select.reasons("linear", "native", Spec(device, dtype)):
            products["linear"] = lambda: linear(a, b, impl="native")
    source = torch.randint(256, (COPIED[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        fastest = min(_least(product, device) for product in products.values())
        copy = _least(lambda: target.copy_(source), device)
    return Limits(2 * side**3 / fastest, 2 * len(source) / copy)


def _least(work: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest round."""

    def step(mark: timing.Mark) -> None:
        mark()
        work()

    return min(total for _, total in timing.interleaved({"": step}, device, 0.5, most=20)[""]) / 1e3
