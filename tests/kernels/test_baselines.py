"""The rivals that benchmarks compare with compute the same function, and say why where they cannot."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bevt_kernels import Spec
from bevt_kernels.baselines import CONV3X3, LINEAR, LINEAR_ARGMAX, MASKED_LINEAR_CROSS_ENTROPY, WINDOW_ATTENTION
from bevt_kernels.baselines.window_attention import _flex, _flex_constants
from bevt_kernels.testing import (
    ArgmaxCase,
    ConvCase,
    LinearCase,
    LossCase,
    WindowCase,
    assert_accuracy,
    assert_argmax,
    assert_within_budget,
    eager_masked_linear_cross_entropy,
    eager_window_attention,
)

CASES = {
    "unshifted": WindowCase(2, (4, 6, 8), (4, 3, 4), heads=2, head_dim=16),
    "shifted": WindowCase(2, (4, 6, 8), (4, 3, 4), (0, 1, 2), heads=2, head_dim=16),
    "shifted on every axis": WindowCase(1, (4, 6, 4), (2, 3, 2), (1, 1, 1), heads=3, head_dim=32),
    "clipped table": WindowCase(2, (1, 14, 14), (1, 7, 7), (0, 3, 3), (8, 7, 7), heads=2, head_dim=16),
}
WIDTHS = (torch.float32, torch.float64)
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


LOSS_CASES = {
    "some slots unused": LossCase(70, 24, 61, 50, 33),
    "all slots used": LossCase(40, 24, 64, 40, 40),
    "rows in several slots": LossCase(20, 8, 16, 64, 64, duplicates=True),
}


def loss_and_gradients(function, inputs, grad, *more) -> dict:
    """Loss, accuracy and gradients of `function(hidden, weight, bias, targets, index, *more)`, by name."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    loss, accuracy = function(*leaves, *inputs[3:], *more)
    found = torch.autograd.grad(loss, leaves, grad.to(loss.dtype))
    return dict(zip(("loss", "accuracy", "grad hidden", "grad weight", "grad bias"), (loss.detach(), accuracy, *found)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES.keys())
@pytest.mark.parametrize("name", MASKED_LINEAR_CROSS_ENTROPY)
def test_loss_baseline_is_within_budget(name: str, case: LossCase, dtype: torch.dtype) -> None:
    if name == "eager compiled" and DEVICE == "cpu" and (case.used == case.slots or dtype != torch.float32):
        pytest.skip("compiled once on a CPU, where that takes 10 s of g++")
    torch._dynamo.reset()
    baseline = MASKED_LINEAR_CROSS_ENTROPY[name]
    if reasons := baseline.reasons(Spec(DEVICE, dtype, True, classes=case.classes)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    *inputs, grad = case.inputs(dtype, seed=1, device=DEVICE)
    got = loss_and_gradients(baseline.function, inputs, grad, case)
    eager = loss_and_gradients(eager_masked_linear_cross_entropy, inputs, grad)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    oracle = loss_and_gradients(eager_masked_linear_cross_entropy, wide, grad)
    accuracy = got.pop("accuracy")
    assert (accuracy is None) == (baseline.lacks == "accuracy")
    if accuracy is not None:
        assert_accuracy(accuracy, *inputs)
    eager["loss"] = eager["loss"].to(got["loss"].dtype)  # some return it in the dtype of hidden
    for what in got:
        assert_within_budget(got[what], eager[what], oracle[what], f"{name}, {what}")


def plain_loss(rows, weight, labels, bias=None, ignore_index=-100):
    return F.cross_entropy(F.linear(rows, weight, bias), labels, ignore_index=ignore_index)


def fake_liger(rows, weight, labels, *, bias, accum_dtype, return_token_accuracy):
    assert accum_dtype == torch.float32
    assert return_token_accuracy
    correct = F.linear(rows, weight, bias).argmax(1) == labels
    return SimpleNamespace(loss=plain_loss(rows, weight, labels, bias), token_accuracy=correct.double().mean())


def fake_cut(rows, weight, labels, bias, *, impl):
    assert impl in ("cce", "cce_exact")
    return plain_loss(rows, weight, labels, bias)


def fake_quack(rows, weight, labels, *, ignore_index):
    for size in (*rows.shape, *weight.shape[1:]):
        assert size % 8 == 0
    return plain_loss(rows, weight, labels, ignore_index=ignore_index)


PACKAGES = {
    "liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", fake_liger),
    "cut cross-entropy": ("cut_cross_entropy", "linear_cross_entropy", fake_cut),
    "cut cross-entropy exact": ("cut_cross_entropy", "linear_cross_entropy", fake_cut),
    "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", fake_quack),
}


@pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES.keys())
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_for_cuda_get_what_they_take(name: str, case: LossCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plain function in the place of the package's: rows, classes, bias and alignment are ours to arrange."""
    path, function, fake = PACKAGES[name]
    for i, part in enumerate(path.split(".")):
        monkeypatch.setitem(sys.modules, ".".join(path.split(".")[: i + 1]), ModuleType(part))
    setattr(sys.modules[path], function, fake)
    *inputs, grad = case.inputs(torch.float64)
    got = loss_and_gradients(MASKED_LINEAR_CROSS_ENTROPY[name].function, inputs, grad, case)
    expected = loss_and_gradients(eager_masked_linear_cross_entropy, inputs, grad)
    for what in got.keys() if got["accuracy"] is not None else got.keys() - {"accuracy"}:
        torch.testing.assert_close(got[what], expected[what], msg=lambda message, what=what: f"{what}: {message}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["eager", "eager compiled"])
def test_argmax_baseline_takes_the_largest(name: str, dtype: torch.dtype) -> None:
    if name == "eager compiled" and DEVICE == "cpu" and dtype != torch.float32:
        pytest.skip("compiled once on a CPU, where that takes 10 s of g++")
    case = ArgmaxCase(200, 64, 513)
    inputs = case.inputs(dtype, device=DEVICE)
    assert_argmax(LINEAR_ARGMAX[name].function(*inputs, case), *inputs)


@pytest.mark.parametrize("name", CONV3X3)
def test_convolution_baseline(name: str) -> None:
    case = ConvCase(2, 9, 7, 5, 6)
    inputs = case.inputs(torch.float64)
    expected = F.conv2d(inputs[0].clamp(min=0), *inputs[1:], padding=1)
    assert torch.equal(CONV3X3[name].function(*inputs, case), expected)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_baseline_is_within_budget(name: str) -> None:
    case = LinearCase(300, 40, 70)
    if reasons := LINEAR[name].reasons(Spec("cpu", torch.float32)):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    found = []
    for function, dtype in ((LINEAR[name].function, torch.float32), *((LINEAR["eager"].function, d) for d in WIDTHS)):
        *leaves, grad = (x.to(dtype).requires_grad_() for x in case.inputs(torch.float32))
        out = function(*leaves, case)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.detach())])
    for got, eager, oracle, what in zip(*found, ("out", "grad x", "grad weight", "grad bias")):
        assert_within_budget(got, eager, oracle, f"{name}, {what}")


def test_argmax_in_half_precision_has_ties_that_are_not_there() -> None:
    case = ArgmaxCase(2000, 64, 8192)
    inputs = case.inputs(torch.bfloat16, device=DEVICE)
    with pytest.raises(AssertionError, match="are not the largest logit"):
        assert_argmax(LINEAR_ARGMAX["eager half"].function(*inputs, case), *inputs)


def test_reasons_of_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(name: str, device: str, dtype: torch.dtype) -> str:
        return "; ".join(MASKED_LINEAR_CROSS_ENTROPY[name].reasons(Spec(device, dtype)))

    assert "liger_kernel serves CUDA, not cpu" in why("liger", "cpu", torch.bfloat16)
    assert "takes bfloat16 and float16, not torch.float32" in why("quack", "cuda", torch.float32)
    without_bias = ModuleType("cut_cross_entropy")
    without_bias.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    without_bias.linear_cross_entropy = lambda e, c, targets: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", without_bias)
    assert why("cut cross-entropy", "cuda", torch.bfloat16).startswith("this version takes no bias: pip install git+")
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    assert "has no chunked linear_cross_entropy" in why("torch linear_cross_entropy", "cpu", torch.float32)
    assert "is eager itself" in "; ".join(LINEAR_ARGMAX["eager half"].reasons(Spec("cpu", torch.float32)))


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
