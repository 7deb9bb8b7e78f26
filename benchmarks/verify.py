"""The gate: no time is printed for a wrong result, nor while an op's own tests are red."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from bevt_kernels.testing import assert_within_budget

from benchmarks.problems import Problem

ROOT = Path(__file__).parents[1]
STAMPS = ROOT / "build" / "gate"


class GateClosed(Exception):
    """The op's tests fail, or one of our implementations is wrong; the message says which and by how much."""


def tree() -> str:
    """Hash of the kernels (sources and native library) and of their tests."""
    digest = hashlib.sha256()
    files = [ROOT / "tests" / "conftest.py"]
    for folder in ("kernels", "tests/kernels"):
        files += [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _stamp(paths: list[str], device: str) -> Path:
    """The file that says that `paths` were green."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    state = (tree(), paths, device, gpu, torch.__version__, sys.version)
    return STAMPS / hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def green(pattern: str, device: str, seconds: float) -> str:
    """Run the tests that `pattern` (from the repository's root) names and return a line that says so.

    What was green for the same kernels, tests, torch and device is remembered under `build/gate`. Raises GateClosed
    where a test fails, none is found, or `seconds` are not enough.
    """
    paths = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
    if not paths:
        raise GateClosed(f"no tests match {pattern}")
    stamp = _stamp(paths, device)
    folders = sorted({str(Path(path).parent) for path in paths})  # a green folder holds green files
    if stamp.exists() or _stamp(folders, device).exists():
        return f"tests: {' '.join(paths)} green on {device} (remembered)"
    if not find_spec("pytest"):
        raise GateClosed("the tests that come first need pytest: pip install pytest pytest-benchmark")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "--maxfail=20", "--tb=short", "-q", *paths]
    if device == "cpu":  # where Triton is only interpreted, for ten minutes, and nothing of it is timed
        command += ["-k", "not triton"]
    elif find_spec("xdist"):  # most of their time is compilation
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
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(done.stdout[-200:])
    return f"tests: {' '.join(paths)} green on {device} ({time.monotonic() - start:.0f} s)"


def contestants(problem: Problem, names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Which of `names` compute the problem within the error rule, and what is wrong with the others.

    Outputs and gradients are judged on the very inputs that are timed. Raises GateClosed where one of ours is wrong; a
    rival that is wrong, or breaks, is left out.
    """
    oracle, eager = (problem.judged(results) for results in problem.truth())
    good, wrong = [], {}
    for name in names:
        try:
            for frozen in (False, True) if problem.contestants[name].ours and problem.frozen else (False,):
                results = problem.judged(problem.step(name, frozen))
                for what, result in results.items():
                    assert_within_budget(result, eager[what], oracle[what], f"{what}, frozen table" if frozen else what)
            good.append(name)
        except Exception as error:  # whatever breaks in somebody else's code must not cost us the other figures
            if problem.contestants[name].ours:
                raise GateClosed(f"{name} is wrong, so nothing is timed: {error}") from error
            wrong[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    return good, wrong
