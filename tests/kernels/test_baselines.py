"""The rivals that benchmarks compare with compute the same function, and say why where they cannot."""

import pytest
import torch
from bevt_kernels import Spec
from bevt_kernels.baselines import WINDOW_ATTENTION, _flex, _flex_constants
from bevt_kernels.testing import WindowCase, assert_within_budget, eager_window_attention

CASES = {
    "unshifted": WindowCase(2, (4, 6, 8), (4, 3, 4), heads=2, head_dim=16),
    "shifted": WindowCase(2, (4, 6, 8), (4, 3, 4), (0, 1, 2), heads=2, head_dim=16),
    "shifted on every axis": WindowCase(1, (4, 6, 4), (2, 3, 2), (1, 1, 1), heads=3, head_dim=32),
    "clipped table": WindowCase(2, (1, 14, 14), (1, 7, 7), (0, 3, 3), (8, 7, 7), heads=2, head_dim=16),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Not here: rivals run as their users run them, and some have no deterministic form."""


def gradients(function, case: WindowCase, qkv, table, grad) -> dict:
    """Output and gradients of `function(qkv, table, case)`, by name."""
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = function(qkv, table, case)
    return dict(zip(("out", "grad qkv", "grad bias_table"), (out, *torch.autograd.grad(out, (qkv, table), grad))))


COMBINATIONS = [
    pytest.param(name, case, dtype, id=f"{name}-{what}-{dtype}")
    for name in WINDOW_ATTENTION
    for what, case in CASES.items()
    for dtype in (torch.float32, torch.bfloat16)
    # On a CPU each compilation takes 15 s of g++; the two that differ most are enough there.
    if name != "eager compiled"
    or DEVICE == "cuda"
    or (dtype == torch.float32 and what in ("unshifted", "clipped table"))
]


@pytest.mark.parametrize(("name", "case", "dtype"), COMBINATIONS)
def test_baseline_is_within_budget(name: str, case: WindowCase, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    baseline = WINDOW_ATTENTION[name]
    if reasons := baseline.reasons(Spec(DEVICE, dtype, True, case.window, case.head_dim)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    qkv, table, grad = inputs = case.inputs(dtype, seed=1, device=DEVICE)
    got = gradients(baseline.function, case, *inputs)
    eager = gradients(eager_window_attention, case, *inputs)
    oracle = gradients(eager_window_attention, case, qkv.double(), table.double(), grad.double())
    for what in got:
        assert_within_budget(got[what].detach(), eager[what].detach(), oracle[what].detach(), f"{name}, {what}")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_flex_reads_bias_and_regions(case: WindowCase) -> None:
    """FlexAttention's modifications, uncompiled: its backward needs a GPU, its meaning does not."""
    qkv, table, _ = case.inputs(torch.float64)
    got = _flex(qkv, table, case, *_flex_constants(case, qkv.device))
    torch.testing.assert_close(got, eager_window_attention(qkv, table, case), rtol=1e-6, atol=1e-6)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    spec = Spec("cpu", torch.float32, True, (8, 7, 7), 8)
    reasons = {name: "; ".join(baseline.reasons(spec)) for name, baseline in WINDOW_ATTENTION.items()}
    assert not reasons["eager"]
    assert not reasons["sdpa"]
    assert "there is no no-such-compiler: install g++" in reasons["eager compiled"]
    assert "no backward on the CPU; FlexAttention takes head dimensions from 16, not 8" in reasons["flex"]
    assert "xformers serves CUDA, not cpu" in reasons["xformers"]
    assert all("not torch.int64" in "; ".join(b.reasons(Spec("cpu", torch.int64))) for b in WINDOW_ATTENTION.values())
