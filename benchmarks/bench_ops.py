"""The registry under pytest-benchmark: `python -m pytest benchmarks --benchmark-only -k "cpu and sdpa"`.

One contestant after another: for small differences trust `benchmarks.run`, which takes them in turns.
"""

from __future__ import annotations

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import problems, verify
from benchmarks.registry import OPS

CASES = [(op, case, name) for op in OPS for case in OPS[op].cases for name in problems.KINDS[op].names]


@functools.lru_cache(maxsize=1)
def _problem(op: str, case: str, device: str) -> problems.Problem:
    torch._dynamo.reset()
    return problems.build(op, case, device)


@pytest.mark.parametrize(("op", "case", "contestant"), CASES, ids=map("-".join, CASES))
def test_step(benchmark: BenchmarkFixture, op: str, case: str, contestant: str, device: str) -> None:
    """Verified on the inputs that are timed, then timed."""
    if device not in OPS[op].cases[case].batch:
        pytest.skip(f"{case} is not measured on {device}")
    problem = _problem(op, case, device)
    if reasons := problem.contestants[contestant].reasons:
        pytest.skip(f"{contestant} cannot run: {'; '.join(reasons)}")
    good, wrong = verify.contestants(problem, [contestant])
    assert good, wrong

    def step() -> None:
        problem.step(contestant)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op}, {case}"
    benchmark.pedantic(step, rounds=10, warmup_rounds=1)
