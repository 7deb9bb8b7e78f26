"""The gate: no time is printed for a wrong result, nor while an op's own tests are red."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.problems import Problem

ROOT = Path(__file__).parents[1]
STAMPS = ROOT / "build" / "gate"

RIVALS = 16.0
"""A rival may err so many times as much as eager: one that adds a bias' gradient up in one long sum is not wrong."""


class GateClosed(Exception):
    """The op's tests fail, or one of our implementations is wrong; the message says which and by how much."""


SOURCES = (".py", ".cpp", ".h", ".cu", ".so", ".json")


def tree(*paths: str) -> str:
    """Hash of the code at `paths`, folders or files from the root, native library included."""
    digest = hashlib.sha256()
    files: list[Path] = []
    for path in map(ROOT.joinpath, paths):
        files += [p for p in ([path] if path.is_file() else path.rglob("*")) if p.suffix in SOURCES]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environment_of_tree() -> dict[str, str]:
    """Of a process that imports this tree, installed or not."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def _stamp(path: str, device: str) -> Path:
    """The file that says that the tests at `path` were green."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    state = (tree("kernels", "tests/kernels", "tests/conftest.py"), path, device, gpu, torch.__version__, sys.version)
    return STAMPS / hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def green(patterns: Sequence[str], device: str, seconds: float) -> str:
    """Run the tests that `patterns` (from the repository's root) name and return a line that says so.

    What was green for the same kernels, tests, torch and device is remembered under `build/gate`. Raises GateClosed
    where a test fails, none is found, or `seconds` are not enough.
    """
    if not patterns:
        return "tests: none, all contestants are others'"
    found = {pattern: sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)) for pattern in patterns}
    for pattern, paths in found.items():
        if not paths:
            raise GateClosed(f"no tests match {pattern}")
    asked = sorted({path for paths in found.values() for path in paths})
    paths = [path for path in asked if not _stamp(path, device).exists()]
    if not paths:
        return f"tests: {' '.join(asked)} green on {device} (remembered)"
    if not find_spec("pytest"):
        raise GateClosed("the tests that come first need pytest: pip install pytest pytest-timeout")
    environment = environment_of_tree()
    # What failing tests had captured, torch's tracing, has filled the end of the output that a message shows.
    command = [sys.executable, "-m", "pytest", "--maxfail=20", "--tb=short", "--show-capture=no", "-q", *paths]
    # Of another device's implementations nothing is timed; on a CPU Triton's interpreter alone takes ten minutes.
    command += ["-k", "not triton" if device == "cpu" else "not (reference or native)"]
    if find_spec("xdist"):  # most of their time is compilation
        command += ["-n", str(min(12, os.cpu_count() or 1))]
        environment["OMP_NUM_THREADS"] = "1"  # threads that wait for each other's turn on a core take ten times as long
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        so_far = (error.output or b"").decode(errors="replace")  # bytes, whatever `text` says
        raise GateClosed(f"{' '.join(paths)} took over {seconds:.0f} s: run them alone\n{so_far[-4000:]}") from None
    if done.returncode:
        raise GateClosed(f"{' '.join(paths)} is not green, so nothing is timed:\n{done.stdout[-4000:]}")
    STAMPS.mkdir(parents=True, exist_ok=True)
    for path in paths:
        _stamp(path, device).write_text(done.stdout[-200:])
    return f"tests: {' '.join(paths)} green on {device} ({time.monotonic() - start:.0f} s)"


def brief(error: Exception) -> str:
    """Kind and first line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


def contestants(problem: Problem, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Which of `names` compute the problem within the error rule, and what is wrong with the others.

    Outputs and gradients are judged on the very inputs that are timed. Raises GateClosed where one of ours is wrong; a
    rival that is wrong, or breaks, is left out.
    """
    oracle, eager = (problem.judged(results) for results in problem.truth())
    good, wrong = [], {}
    for name in names:
        ours = problem.contestants[name].ours
        try:
            for frozen in (False, True) if ours and problem.frozen else (False,):
                results = problem.judged(problem.answer(name, frozen))
                problem.check(results, oracle, eager, ", frozen table" if frozen else "", 2 if ours else RIVALS)
            good.append(name)
        except Exception as error:  # whatever breaks in somebody else's code must not cost us the other figures
            if ours:
                raise GateClosed(f"{name} is wrong, so nothing is timed: {error}") from error
            wrong[name] = brief(error)
    return good, wrong
