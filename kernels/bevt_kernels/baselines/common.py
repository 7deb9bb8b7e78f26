"""What rivals of every op share."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bevt_kernels.select import Spec, Supports, float_reasons


class Baseline(NamedTuple):
    """One rival."""

    function: Callable[..., Any]
    """(tensors of the op, case) -> the op's results."""
    reasons: Supports
    """Why it cannot serve a spec; empty where it can."""
    package: str = "torch"
    """The distribution whose version it depends on."""
    lacks: str = ""
    """What of the op's task it does not do, and is timed without."""
    compiles: bool = False
    """Whether it is compiled for each case."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile.

    It compiles on the first call with a case; `fullgraph` makes torch's limit of recompilations an error, where it
    would else run eagerly, so call `torch._dynamo.reset()` between many cases.
    """
    return torch.compile(function, fullgraph=True, dynamic=False)


def compile_reasons(spec: Spec) -> list[str]:
    """Why torch.compile cannot serve."""
    reasons = float_reasons(spec)
    compiler = os.environ.get("CXX", "g++")
    if spec.device == "cpu" and shutil.which(compiler) is None:
        reasons.append(f"torch.compile needs a C++ compiler on the CPU, and there is no {compiler}: install g++")
    if spec.device == "cuda" and importlib.util.find_spec("triton") is None:
        reasons.append("torch.compile needs triton on CUDA: pip install triton")
    return reasons


def package_reasons(module: str, install: str = "") -> Supports:
    """Of a rival that is a package for CUDA alone; `install` is what pip calls it, by default `module`."""

    def reasons(spec: Spec) -> list[str]:
        found = float_reasons(spec)
        if importlib.util.find_spec(module) is None:
            found.append(f"{module} is not installed: pip install {install or module}")
        if spec.device != "cuda":
            found.append(f"{module} serves CUDA, not {spec.device}")
        return found

    return reasons
