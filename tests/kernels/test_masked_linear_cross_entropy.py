"""masked_linear_cross_entropy: the specification, the registered op, and what surrounds them."""

import pytest
import torch
from bevt_kernels import masked_linear_cross_entropy
from bevt_kernels.masked_linear_cross_entropy import reference
from bevt_kernels.testing import assert_within_budget, eager_masked_linear_cross_entropy
from torch.utils.flop_counter import FlopCounterMode

OPS = torch.ops.bevt_kernels
NAMES = ("loss", "accuracy", "grad hidden", "grad weight", "grad bias")


def problem(rows: int, channels: int, classes: int, slots: int, dtype: torch.dtype, seed: int = 0, unused: float = 0.3):
    """hidden, weight, bias, targets, index; a share `unused` of the slots is -1 with a target out of range."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, channels), (classes, channels), (classes,))
    )
    index = torch.randint(rows, (slots,), generator=generator)
    targets = torch.randint(classes, (slots,), generator=generator)
    empty = torch.rand(slots, generator=generator) < unused
    return hidden, weight, bias, targets.masked_fill(empty, 10**9), index.masked_fill(empty, -1)


def run(function, hidden, weight, bias, targets, index, grad=1.7):
    """Loss, accuracy and gradients by name, for an upstream gradient `grad`."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    loss, accuracy = function(*leaves, targets, index)
    return dict(zip(NAMES, (loss.detach(), accuracy, *torch.autograd.grad(loss * grad, leaves))))


def double(inputs):
    return [t.double() if t.is_floating_point() else t for t in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40, 16, 37, 61), (7, 8, 2, 3), (3000, 16, 701, 2001)], ids=str)
def test_error_is_within_budget(shape: tuple, dtype: torch.dtype) -> None:
    inputs = problem(*shape, dtype, seed=1)
    got = run(masked_linear_cross_entropy, *inputs)
    eager = run(eager_masked_linear_cross_entropy, *inputs)
    oracle = run(eager_masked_linear_cross_entropy, *double(inputs))
    for name in NAMES:
        assert_within_budget(got[name], eager[name], oracle[name], name)


def test_backward_equals_autograd_of_the_specification() -> None:
    inputs = problem(30, 8, 5000, 700, torch.float64, seed=2)  # four chunks
    got, expected = run(masked_linear_cross_entropy, *inputs), run(reference.masked_linear_cross_entropy, *inputs)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck() -> None:
    hidden, weight, bias, targets, index = problem(5, 3, 4, 7, torch.float64, seed=3)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *x: masked_linear_cross_entropy(*x, targets, index)[0], leaves)


@pytest.mark.parametrize("slots", [0, 6])
def test_opcheck(slots: int) -> None:
    inputs = problem(5, 3, 4, slots, torch.float32)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    torch.library.opcheck(OPS.masked_linear_cross_entropy_forward.default, (*leaves, *inputs[3:], "reference"))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(OPS.masked_linear_cross_entropy_backward.default, (torch.tensor(1.5), *plain, "reference"))


@pytest.mark.parametrize(("rows", "slots"), [(6, 5), (6, 0), (0, 5)])
def test_no_used_slot(rows: int, slots: int) -> None:
    hidden, weight, bias = torch.randn(rows, 4), torch.randn(9, 4), torch.randn(9)
    got = run(masked_linear_cross_entropy, hidden, weight, bias, torch.full((slots,), -5), torch.full((slots,), -1))
    for name in NAMES:
        assert torch.equal(got[name], torch.zeros_like(got[name])), name


def test_unused_rows_do_not_matter_even_if_not_finite() -> None:
    hidden, weight, bias, targets, index = problem(10, 4, 6, 12, torch.float32, seed=4)
    index = torch.where(index == 0, 1, index)
    clean = run(masked_linear_cross_entropy, hidden, weight, bias, targets, index)
    hidden[0] = torch.nan
    dirty = run(masked_linear_cross_entropy, hidden, weight, bias, targets, index)
    for name in NAMES:
        assert torch.equal(clean[name], dirty[name]), name


def test_a_row_in_several_slots_sums_its_gradients() -> None:
    hidden, weight, bias, _, _ = problem(3, 4, 5, 0, torch.float64, seed=5)
    targets, index = torch.tensor([0, 3, 3]), torch.tensor([2, 2, 1])
    got = run(masked_linear_cross_entropy, hidden, weight, bias, targets, index)
    expected = run(eager_masked_linear_cross_entropy, hidden, weight, bias, targets, index)
    torch.testing.assert_close(got["grad hidden"], expected["grad hidden"])


def test_float32_weight_beside_low_precision_rows_keeps_its_gradient() -> None:
    inputs = problem(20, 8, 30, 40, torch.bfloat16, seed=6)
    got = run(masked_linear_cross_entropy, inputs[0], inputs[1].float(), inputs[2].float(), *inputs[3:])
    low = run(masked_linear_cross_entropy, *inputs)
    assert got["grad weight"].dtype == torch.float32
    assert torch.equal(got["grad weight"].bfloat16(), low["grad weight"])


def test_autocast_casts_the_rows_as_a_linear_layer_would() -> None:
    inputs = problem(20, 8, 30, 40, torch.float32, seed=7)
    with torch.autocast("cpu", torch.bfloat16):
        got = masked_linear_cross_entropy(*inputs)
    expected = masked_linear_cross_entropy(inputs[0].bfloat16(), *inputs[1:])
    assert torch.equal(got[0], expected[0])


def test_second_derivative_is_refused() -> None:
    inputs = problem(5, 3, 4, 7, torch.float64)
    loss, _ = masked_linear_cross_entropy(inputs[0].requires_grad_(), *inputs[1:])
    with pytest.raises(NotImplementedError, match="masked_linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)


def test_compiled_equals_eager_and_masks_do_not_recompile() -> None:
    torch._dynamo.reset()
    compiles = 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(masked_linear_cross_entropy, backend=count, fullgraph=True)
    for slots, unused in ((40, 0.3), (50, 1.0), (77, 0.0)):
        inputs = problem(slots + 3, 8, 30, slots, torch.float32, seed=slots, unused=unused)
        for tensor in (inputs[0], *inputs[3:]):
            torch._dynamo.mark_dynamic(tensor, 0)
        leaves = [t.requires_grad_() for t in inputs[:3]]
        loss, accuracy = compiled(*leaves, *inputs[3:])
        got = (loss.detach(), accuracy, *torch.autograd.grad(loss * 1.7, leaves))
        for value, (name, expected) in zip(got, run(masked_linear_cross_entropy, *inputs).items()):
            assert torch.equal(value, expected), f"{slots} slots: {name}"
    assert compiles == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flop_counter(device: str) -> None:
    inputs = [t.to(device) for t in problem(10, 4, 6, 12, torch.float32)]
    product = 2 * 12 * 4 * 6
    with FlopCounterMode(display=False) as counter:
        loss, _ = masked_linear_cross_entropy(inputs[0].requires_grad_(), *inputs[1:], impl="reference")
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * product


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 4)}, r"hidden must be \(M, C\) and weight \(V, C\), got \(5, 4\) and \(4, 3\)"),
        ({1: torch.zeros(0, 3)}, "weight has no classes"),
        ({2: torch.zeros(3)}, r"bias must be \(4,\)"),
        ({3: torch.zeros(6, dtype=torch.int64)}, r"index and targets must be \(K,\)"),
        ({4: torch.zeros(7, dtype=torch.int32)}, "index and targets must be int64"),
        ({1: torch.zeros(4, 3, dtype=torch.float16)}, "weight must be torch.float32"),
        ({2: torch.zeros(4, device="meta")}, "bias on meta"),
        ({4: torch.full((7,), 5)}, r"slot 0 has index 5.*a row 0\.\.4"),
        ({4: torch.full((7,), -2)}, "slot 0 has index -2"),
        ({3: torch.full((7,), 4), 4: torch.zeros(7, dtype=torch.int64)}, r"target 4: .*a class 0\.\.3"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    inputs = dict(enumerate(problem(5, 3, 4, 7, torch.float32))) | change
    with pytest.raises(ValueError, match=message):
        masked_linear_cross_entropy(*inputs.values())
