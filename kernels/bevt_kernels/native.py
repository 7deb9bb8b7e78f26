"""The native library: torch ops in C++ for the CPU, beside this file as `_native.so` where it was built.

It holds ops, not a Python module, so one build serves every Python; it is bound to the torch it was built with, whose
version it carries as text, so that a stale library is recognised without loading it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

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


def reasons() -> list[str]:
    """For `select`: empty, or why the library cannot serve."""
    return [] if _loaded else [f"native library: {_status}"]
