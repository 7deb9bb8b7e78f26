"""The native library: torch ops in C++ for the CPU, beside this file as `_native.so` where it was built.

It holds ops, not a Python module, so one build serves every Python; it is bound to the torch it was built with, whose
version it carries as text, so that a stale library is recognised without loading it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from bevt_kernels.select import NoImplementation, Spec, float32_reasons

PATH = Path(__file__).with_name("_native.so")
BUILD = "BEVT_NATIVE=ON pip install --no-build-isolation -e ."
_MARK = re.compile(rb"bevt_kernels native library, torch ([0-9][0-9A-Za-z.+_-]*)")


def load(path: Path) -> tuple[bool, str]:
    """Load the library at `path` into this process: whether that worked, and a sentence that says so or why not."""
    if not path.is_file():
        return False, f"not built: there is no {path.name} beside {path.parent.name}; build it with `{BUILD}`"
    mark = _MARK.search(path.read_bytes())
    if mark is None:
        return False, f"{path.name} is not this project's library or is damaged: rebuild with `{BUILD}`"
    built = mark[1].decode()
    if built != torch.__version__:
        return False, f"built for torch {built} but torch {torch.__version__} is installed: rebuild with `{BUILD}`"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return False, f"built for torch {built} but it does not load ({error}): rebuild with `{BUILD}`"
    return True, f"built with torch {built}, loaded, instruction set {torch.backends.cpu.get_cpu_capability()}"


_loaded, _status = load(PATH)


def loaded() -> bool:
    """Whether the native ops can be called."""
    return _loaded


def status() -> str:
    """One line for people: "built with torch X, loaded, instruction set AVX2", or what is wrong and what to do."""
    return _status


def reasons(spec: Spec, *, only_float32: bool = False) -> list[str]:
    """For `select`: why the library's ops cannot serve; empty where they can."""
    found = [] if _loaded else [f"native library: {_status}"]
    if spec.device != "cpu":
        found.append(f"serves the CPU, not {spec.device}")
    return found + float32_reasons(spec, only=only_float32)


def require(op: str) -> None:
    """Raise NoImplementation without the library: for a call of the torch op itself, past `resolve`."""
    if not _loaded:
        raise NoImplementation(f"{op}: native library: {_status}")
