"""The implementations of an op as tests see them: what runs here, in which dtypes, and why not."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from bevt_kernels import native


class Target(NamedTuple):
    """An implementation under test."""

    impl: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    device: str = "cpu"
    missing: str = ""
    """Why it cannot run here, and how it could."""

    @property
    def dtype(self) -> torch.dtype:
        """For properties that hold in any: on a GPU the one that models run in, float32 having paths of its own."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def interpreted(self) -> bool:
        """Triton's kernels on a CPU, at a tenth of a second for a box and head."""
        return self.impl == "triton" and self.device == "cpu"

    def param(self, *more: object) -> object:
        skip = pytest.mark.skipif(bool(self.missing), reason=self.missing)
        return pytest.param(self, *more, marks=skip, id="-".join(map(str, (self.impl, *more))))


REFERENCE = Target("reference")
NATIVE = Target("native", missing="" if native.loaded() else f"native library {native.status()}")
TRITON = Target("triton", missing="" if find_spec("triton") else "needs triton: pip install triton")
if torch.cuda.is_available():
    TRITON = TRITON._replace(device="cuda")
else:  # under Triton's interpreter (conftest.py), which gets products of bfloat16 wrong
    TRITON = TRITON._replace(dtypes=(torch.float32, torch.float16))
TARGETS = [REFERENCE, NATIVE, TRITON]
each_dtype = pytest.mark.parametrize(("target", "dtype"), [t.param(dtype) for t in TARGETS for dtype in t.dtypes])

LESSER = ("default", "avx2")
"""Instruction sets below the best; a test process has chosen the best that its machine has."""


def at_instruction_set(capability: str, script: str) -> None:
    """Run `script`, which may import what lies here, in a process that chooses that set of instructions."""
    here = torch.backends.cpu.get_cpu_capability().lower()
    if capability == "avx2" and here not in ("avx2", "avx512"):
        pytest.skip(f"needs a processor with AVX2; this one has {here}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
