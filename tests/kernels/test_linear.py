"""linear in C++ against torch's own, which is the specification."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bevt_kernels import NoImplementation, Spec, linear, native, resolve
from bevt_kernels.testing import LinearCase, assert_within_budget, random_linear_case
from targets import LESSER, at_instruction_set
from torch import Tensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

NAMES = ("out", "grad x", "grad weight", "grad bias")
needs_native = pytest.mark.skipif(not native.loaded(), reason=f"native library {native.status()}")


def ours(*inputs: Tensor) -> Tensor:
    return linear(*inputs, impl="native")


def results(function: Callable[..., Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    """Output and gradients, by name, of inputs whose last is the output's gradient."""
    *leaves, grad = (x.detach().requires_grad_() for x in inputs)
    out = function(*leaves)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad.detach()))))


def assert_right(case: LinearCase, draws: int = 1, seed: int = 0) -> None:
    """The error rule, on all draws together."""
    found: list[list[dict[str, Tensor]]] = [[], [], []]
    for draw in range(draws):
        inputs = case.inputs(torch.float32, seed + 1000 * draw)
        for kind, function, wide in zip(found, (ours, F.linear, F.linear), (False, False, True)):
            kind.append(results(function, *(x.double() if wide else x for x in inputs)))
    for name in found[0][0]:
        got, eager, oracle = (torch.stack([result[name] for result in kind]) for kind in found)
        assert_within_budget(got, eager, oracle, f"{case}, {name}")


@needs_native
@pytest.mark.parametrize("seed", range(300))
def test_random_shapes_are_within_budget(seed: int) -> None:
    """A largest error of one draw of few numbers may be luck, eager's too: a case that fails is judged on 16 draws."""
    case = random_linear_case(seed)
    try:
        assert_right(case, seed=seed)
    except AssertionError:
        assert_right(case, draws=16, seed=seed)


@needs_native
@pytest.mark.parametrize("scale", [1e-3, 30.0], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        LinearCase(6272, 96, 384),
        LinearCase(6272, 384, 96),
        LinearCase(392, 768, 3072),
        LinearCase(392, 3072, 768),
        LinearCase(1568, 384, 384, bias=False),
        LinearCase(20000, 3, 1),
    ],
    ids=str,
)
def test_sizes_of_swin_are_within_budget(case: LinearCase, scale: float) -> None:
    x, *rest = case.inputs(torch.float32, seed=1)
    x = x * scale + scale / 10  # sums that grow: of a mean, not of noise alone
    got, eager = (results(f, x, *rest) for f in (ours, F.linear))
    oracle = results(F.linear, *(t.double() for t in (x, *rest)))
    for name in got:
        assert_within_budget(got[name], eager[name], oracle[name], name)


@needs_native
def test_an_element_does_not_depend_on_its_neighbours(set_threads: Callable[[int], None]) -> None:
    """Nor on threads: to the last bit, with rows cut anywhere."""
    inputs = LinearCase(700, 300, 71).inputs(torch.float32)
    x, weight, bias, grad = inputs
    set_threads(1)
    alone = results(ours, *inputs)
    for threads in (2, 5, 16):  # which cut one side, or both
        set_threads(threads)
        for name, value in results(ours, *inputs).items():
            assert torch.equal(value, alone[name]), (threads, name)
    for rows in (slice(0, 1), slice(3, 690), slice(697, 700)):
        part = results(ours, x[rows], weight, bias, grad[rows])
        assert torch.equal(part["out"], alone["out"][rows])
        assert torch.equal(part["grad x"], alone["grad x"][rows])
    for outputs in (slice(0, 1), slice(5, 70)):
        assert torch.equal(ours(x, weight[outputs], bias[outputs]), alone["out"][:, outputs])


@needs_native
def test_any_leading_axes_and_strides() -> None:
    case = LinearCase(60, 33, 40)
    inputs = x, weight, bias, grad = case.inputs(torch.float32)
    plain = results(ours, *inputs)
    shaped = results(ours, x.view(3, 4, 5, 33), weight, bias, grad.view(3, 4, 5, 40))
    strided = results(ours, *(t.t().contiguous().t() for t in (x, weight)), bias.repeat_interleave(2)[::2], grad)
    wide = results(ours, x.repeat_interleave(2, 1)[:, ::2], weight.repeat_interleave(2, 1)[:, ::2], bias, grad)
    expanded = results(ours, x, weight, bias, grad[:1].expand(60, 40))
    for name, value in plain.items():
        assert torch.equal(shaped[name].reshape(value.shape), value), name
        assert torch.equal(strided[name], value), name
        assert torch.equal(wide[name], value), name
    assert torch.equal(expanded["grad x"], plain["grad x"][:1].expand(60, 33))
    assert torch.equal(ours(x[0], weight, bias), plain["out"][0])
    assert ours(x.new_empty(2, 0, 33), weight).shape == (2, 0, 40)


@needs_native
def test_nan_and_infinity_stay_in_their_row() -> None:
    x, weight, bias, _ = LinearCase(9, 5, 33).inputs(torch.float32)
    clean = ours(x, weight, bias)
    x[4, 2] = torch.inf
    weight[32, 0] = torch.nan
    got = ours(x, weight, bias)
    assert not got[4].isfinite().any()
    assert got[:, 32].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(got[others, :32], clean[others, :32])


@needs_native
def test_gradients_that_nobody_wants_cost_nothing(set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    x, weight, bias, grad = LinearCase(50, 20, 30).inputs(torch.float32)
    for leaves, products in (((weight, bias), 1), ((x,), 1), ((bias,), 0), ((x, weight, bias), 2)):
        for t in (x, weight, bias):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        out = ours(x, weight, bias)
        with profile() as prof:
            torch.autograd.grad(out, leaves, grad)
        assert sum(e.name == "bevt_kernels::product" for e in prof.events()) == products


@needs_native
def test_it_keeps_its_inputs_alone() -> None:
    """And not even x where the weight is frozen."""
    x, weight, bias, _ = LinearCase(50, 20, 30).inputs(torch.float32)
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t)
    with hooks:
        ours(x.requires_grad_(), weight, bias)
        assert set(kept) == {weight.data_ptr()}
        ours(x, weight.requires_grad_(), bias)
        assert set(kept) == {x.data_ptr(), weight.data_ptr()}


@needs_native
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool) -> None:
    *inputs, grad = LinearCase(9, 3, 7, bias).inputs(torch.float32)
    leaves = [x.requires_grad_() for x in inputs] + [None] * (not bias)
    torch.library.opcheck(torch.ops.bevt_kernels.linear_forward.default, (*leaves, "native"))
    arguments = (grad, *(x.detach() for x in inputs[:2]), [True, True, bias], "native")
    torch.library.opcheck(torch.ops.bevt_kernels.linear_backward.default, arguments)


@needs_native
def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = LinearCase(9, 40, 70).inputs(torch.float32)
    got, eager = results(compiled, *inputs), results(ours, *inputs)
    for name in NAMES:
        assert torch.equal(got[name], eager[name]), name


@needs_native
def test_flop_counter() -> None:
    *leaves, grad = (x.requires_grad_() for x in LinearCase(9, 3, 7).inputs(torch.float32))
    with FlopCounterMode(display=False) as counter:
        out = ours(*leaves)
        assert counter.get_total_flops() == 2 * 9 * 3 * 7
        out.backward(grad.detach())
    assert counter.get_total_flops() == 3 * 2 * 9 * 3 * 7


@needs_native
def test_no_second_derivative() -> None:
    x, weight, bias, grad = LinearCase(9, 3, 7).inputs(torch.float32)
    out = ours(x.requires_grad_(), weight, bias)
    with pytest.raises(NotImplementedError, match="linear has no second derivative"):
        torch.autograd.grad(out, x, grad, create_graph=True)


@needs_native
def test_auto_and_autocast() -> None:
    """Float32 on a CPU is native's; what autocast would compute in 16 bits, and everything else, is torch's."""
    assert resolve("linear", "auto", Spec("cpu", torch.float32)) == "native"
    for spec in (Spec("cpu", torch.float64), Spec("cpu", torch.bfloat16), Spec("cuda", torch.float32)):
        assert resolve("linear", "auto", spec) == "reference"
    x, weight, bias, _ = LinearCase(9, 3, 7).inputs(torch.float32)
    without = ours(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        assert linear(x, weight, bias).dtype == torch.bfloat16
        assert torch.equal(ours(x, weight, bias), without)
        assert torch.equal(ours(x.bfloat16(), weight, bias), ours(x.bfloat16().float(), weight, bias))


def test_reference_is_torchs() -> None:
    inputs = LinearCase(9, 3, 7).inputs(torch.float64)
    got, expected = (results(f, *inputs) for f in (lambda *x: linear(*x, impl="reference"), F.linear))
    for name in NAMES:
        assert torch.equal(got[name], expected[name]), name


@needs_native
@pytest.mark.parametrize("capability", LESSER)
def test_lesser_instruction_sets(capability: str) -> None:
    at_instruction_set(
        capability, "import test_linear as t; [t.assert_right(t.random_linear_case(s), 16, s) for s in range(12)]"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 4)}, r"x must be \(..., C\) and weight \(N, C\), got \(5, 4\) and \(4, 3\)"),
        ({0: torch.tensor(1.0)}, r"x must be \(..., C\)"),
        ({0: [[1.0, 2.0, 3.0]]}, "x must be a tensor, got list"),
        ({1: torch.zeros(4, 3).to_sparse()}, "weight must be dense"),
        ({2: torch.zeros(3)}, r"bias must be \(4,\)"),
        ({1: torch.zeros(4, 3, dtype=torch.bfloat16)}, "weight must be torch.float32, as x, got torch.bfloat16"),
        ({2: torch.zeros(4, dtype=torch.float64)}, "bias must be torch.float32"),
        ({2: torch.zeros(4, device="meta")}, "bias on meta"),
    ],
)
@needs_native
def test_bad_arguments(change: dict, message: str) -> None:
    inputs = dict(enumerate(LinearCase(5, 3, 4).inputs(torch.float32)[:3])) | change
    with pytest.raises(ValueError, match=message):
        linear(*inputs.values())


@needs_native
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_mixed_tensors_are_refused_by_torchs_too(impl: str) -> None:
    x, weight, bias, _ = LinearCase(5, 3, 4).inputs(torch.float32)
    with pytest.raises(ValueError, match=r"weight must be torch.float64, as x, got torch.float32"):
        linear(x.double(), weight, bias, impl=impl)
    with pytest.raises(ValueError, match="weight on meta"):
        linear(x, weight.to("meta"), bias, impl=impl)


def test_native_says_why_not() -> None:
    x, weight, bias, _ = LinearCase(5, 3, 4).inputs(torch.bfloat16)
    with pytest.raises(NoImplementation, match=r"native: .*takes float32, not torch.bfloat16"):
        linear(x, weight, bias, impl="native")
    with pytest.raises(NoImplementation, match=r"triton: not available for linear"):
        linear(x, weight, bias, impl="triton")
