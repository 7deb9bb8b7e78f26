"""The gate, for `pytest benchmarks --benchmark-only` too: the tests of the ops first."""

from __future__ import annotations

import pytest
import torch

from benchmarks import verify
from benchmarks.registry import OPS, TEST_SECONDS


@pytest.fixture(scope="session")
def device() -> str:
    """Where it is measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def _green(device: str) -> None:
    verify.green([pattern for op in OPS.values() for pattern in op.tests], device, TEST_SECONDS[device])
