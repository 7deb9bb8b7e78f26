"""Which implementation serves an op, or why none does.

A module calls `resolve` once, when it is built, and keeps the name; the functional API calls it too (a few
microseconds). An op offers an implementation by `register`; one that nobody registered is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

IMPLEMENTATIONS = ("triton", "native", "reference")
"""Every name an op may offer, in the order in which `auto` tries them: Triton is for CUDA, native for the CPU."""


class Spec(NamedTuple):
    """What a call needs: all that the choice of an implementation may depend on."""

    device: str
    """Device type: `cpu`, `cuda`, ..."""
    dtype: torch.dtype
    """Of the activations."""
    needs_grad: bool = False
    window: tuple[int, int, int] | None = None
    """Window attention alone: tokens along time, height and width."""
    head_dim: int | None = None
    """Window attention alone."""
    classes: int | None = None
    """Masked linear cross-entropy alone."""


Supports = Callable[[Spec], list[str]]
"""The reasons why an implementation cannot serve a spec; empty where it can."""


class NoImplementation(ValueError):
    """No implementation, or not the one asked for, can serve; the message holds every candidate's reasons."""


_supports: dict[str, dict[str, Supports]] = {}


def register(op: str, impl: str, supports: Supports) -> None:
    """Offer `impl` for `op`."""
    _supports.setdefault(op, {})[impl] = supports


def reasons(op: str, impl: str, spec: Spec) -> list[str]:
    """Why `impl` cannot serve `op` under `spec`; empty where it can. Raises ValueError for an unknown op."""
    if op not in _supports:
        raise ValueError(f"no op {op!r}; there are {', '.join(sorted(_supports))}")
    if impl not in _supports[op]:
        return [f"not available for {op} in this version"]
    return _supports[op][impl](spec)


def resolve(op: str, impl: str, spec: Spec) -> str:
    """The name of the implementation that serves `op`: `impl` itself, or for "auto" the first that can.

    Raises NoImplementation (a ValueError) where there is none; every candidate's reasons are in the message. Raises
    ValueError for a name that is no implementation.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be auto, {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    candidates = IMPLEMENTATIONS if impl == "auto" else (impl,)
    for candidate in candidates:
        interpreted = candidate == "triton" and spec.device == "cpu"
        if not (impl == "auto" and interpreted) and not reasons(op, candidate, spec):
            return candidate
    raise NoImplementation(_refusal(op, impl, spec))


def _refusal(op: str, impl: str, spec: Spec) -> str:
    lines = [f"{op} has no implementation for impl={impl!r} with {spec}:"]
    for candidate in IMPLEMENTATIONS:
        lines.append(f"  {candidate}: {'; '.join(reasons(op, candidate, spec)) or 'can serve'}")
    return "\n".join(lines)


def _triton_reason() -> str:
    """What is wrong with the installed triton, without importing it; empty where nothing is."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "needs triton 3.6 or newer: pip install triton"
    recent = tuple(int(part) for part in found.split("+")[0].split(".")[:2]) >= (3, 6)
    return "" if recent else f"needs triton 3.6 or newer, found {found}"


_TRITON = _triton_reason()  # once: looking a version up takes 0.7 ms, and a compiler cannot trace it


@torch.compiler.assume_constant_result
def _gpu_reasons() -> list[str]:
    if not torch.cuda.is_available():
        return ["torch sees no CUDA GPU"]
    if torch.version.hip:
        return ["serves NVIDIA GPUs; nobody has tried ROCm"]
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return [f"needs compute capability 8.0, this GPU has {'.'.join(map(str, capability))}"]
    return []


def triton_reasons(spec: Spec) -> list[str]:
    """Why Triton kernels cannot serve. On the CPU its interpreter runs them, if named: that is for tests."""
    reasons = [_TRITON] if _TRITON else []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if spec.device == "cpu" and not interpreted:
        reasons.append("serves CUDA; on the CPU only Triton's interpreter, with TRITON_INTERPRET=1 set from the start")
    elif spec.device == "cuda":
        reasons += _gpu_reasons()
    elif spec.device != "cpu":
        reasons.append(f"serves CUDA, not {spec.device}")
    reasons += float32_reasons(spec)
    if interpreted and spec.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter gets matrix products of bfloat16 wrong")
    return reasons


def float32_reasons(spec: Spec, *, only: bool = False) -> list[str]:
    """Of kernels whose arithmetic is float32: the dtype, 16-bit ones allowed unless `only`."""
    if spec.dtype == torch.float32 or (spec.dtype in (torch.bfloat16, torch.float16) and not only):
        return []
    return [f"takes float32{'' if only else ', bfloat16 and float16'}, not {spec.dtype}"]


def float_reasons(spec: Spec) -> list[str]:
    """The reference implementations' only limit: the dtype."""
    if spec.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return []
    return [f"takes float32, bfloat16, float16 and float64, not {spec.dtype}"]


@cache
def architecture(device: torch.device) -> str:
    """The name under which sizes are filed: "sm_90" for a Hopper GPU and so on, "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
