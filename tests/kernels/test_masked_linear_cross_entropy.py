"""masked_linear_cross_entropy: every implementation against eager PyTorch, the registered op, and what surrounds it."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from bevt_kernels import NoImplementation, Spec, masked_linear_cross_entropy, resolve
from bevt_kernels.masked_linear_cross_entropy import reference
from bevt_kernels.testing import (
    LossCase,
    assert_accuracy,
    assert_within_budget,
    eager_masked_linear_cross_entropy,
    random_loss_case,
)
from targets import REFERENCE, TARGETS, TRITON, Target, each_dtype
from torch.utils.flop_counter import FlopCounterMode

OPS = torch.ops.bevt_kernels
NAMES = ("loss", "accuracy", "grad hidden", "grad weight", "grad bias")
SMALL = LossCase(20, 8, 30, 40, 28, duplicates=True)


@pytest.fixture(params=[t.param() for t in TARGETS])
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


def run(function, hidden, weight, bias, targets, index, grad):
    """Loss, accuracy and gradients of `function(hidden, weight, bias, targets, index)`, by name."""
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    loss, accuracy = function(*leaves, targets, index)
    return dict(zip(NAMES, (loss.detach(), accuracy, *torch.autograd.grad(loss, leaves, grad.to(loss.dtype)))))


def cross_entropy(target: Target):
    """The public function of its tensors."""
    return lambda *tensors: masked_linear_cross_entropy(*tensors, impl=target.impl)


def double(inputs):
    return [t.double() if t.is_floating_point() else t for t in inputs]


def assert_case_within_budget(case: LossCase, target: Target, dtype: torch.dtype, seed: int) -> None:
    """Of one draw, or else of 16 or 64 together: eager's error of one loss is near 0 by luck in 1 case in 20."""
    for draws in (1, 16):
        try:
            return assert_draws_within_budget(case, target, dtype, *range(seed, seed + 1000 * draws, 1000))
        except AssertionError:
            continue
    return assert_draws_within_budget(case, target, dtype, *range(seed, seed + 64000, 1000))


def assert_draws_within_budget(
    case: LossCase, target: Target, dtype: torch.dtype, *seeds: int, change: Callable[[list], list] = list
) -> None:
    """All draws together; `change` makes what is given of a draw's inputs."""
    draws = []
    for seed in seeds:
        *drawn, grad = case.inputs(dtype, seed, target.device)
        inputs = [*change(drawn), grad]
        eager = run(eager_masked_linear_cross_entropy, *inputs)
        oracle = run(eager_masked_linear_cross_entropy, *double(inputs))
        draws.append((run(cross_entropy(target), *inputs), eager, oracle))
        assert_accuracy(draws[-1][0]["accuracy"], *inputs[:5])
    # In a GPU's 16 bits a near tie may fall the other way where eager's error is 0: there by the exact check alone.
    for name in (name for name in NAMES if name != "accuracy" or target.device == "cpu"):
        assert_within_budget(*(torch.stack([x[name] for x in each]) for each in zip(*draws)), f"{name} of {case}")


@each_dtype
@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        LossCase(7, 8, 2, 3, 3),
        LossCase(2400, 16, 701, 2001, 1700),  # two chunks on a CPU
        LossCase(40, 24, 9001, 33, 31),
        LossCase(90, 40, 1024, 150, 140, duplicates=True),
    ],
    ids=str,
)
def test_error_is_within_budget(case: LossCase, target: Target, dtype: torch.dtype) -> None:
    if target.interpreted and case.slots > 1000:
        pytest.skip("2001 slots take a minute under Triton's interpreter: run it on a GPU")
    assert_case_within_budget(case, target, dtype, 1)


@pytest.mark.parametrize(
    ("target", "dtype"), [t.param(dtype) for t in TARGETS for dtype in t.dtypes[: 1 if t == REFERENCE else 2]]
)
# A GPU's are compiled, 60 do; 85 and 111 exceeded the rule on an H200, and nobody knows why yet (LOG.md).
@pytest.mark.parametrize("seed", [*range(60), 85, 111] if torch.cuda.is_available() else range(200))
def test_error_is_within_budget_on_random_cases(seed: int, target: Target, dtype: torch.dtype) -> None:
    case = random_loss_case(seed, products=2**12 if target.interpreted else 2**21)
    assert_case_within_budget(case, target, dtype, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("programs", "slots_a_chunk"), [(3, 7), (5, 10), (128, 8), (4, 31)])
@pytest.mark.skipif(bool(TRITON.missing), reason=TRITON.missing)
def test_triton_in_several_chunks_and_rows_a_program(
    programs: int, slots_a_chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks after the first, a shorter last one, programs without rows: else 2048 slots of 8192 classes begin them."""
    from bevt_kernels.masked_linear_cross_entropy import triton_forward

    def chunks(items: int, *_: object) -> Iterator[slice]:
        return (slice(first, min(first + slots_a_chunk, items)) for first in range(0, items, slots_a_chunk))

    monkeypatch.setattr(triton_forward, "chunks", chunks)
    monkeypatch.setattr(triton_forward, "PROGRAMS", programs)
    assert_case_within_budget(LossCase(40, 24, 300, 45, 38, duplicates=True), TRITON, dtype, 1)


@torch.no_grad()
def test_loss_of_the_reference_in_hundreds_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one sum: one a chunk, added up, was off by units in the last place."""
    monkeypatch.setattr(reference, "chunks", lambda items, *_: (slice(i, i + 32) for i in range(0, items, 32)))
    case, draws = LossCase(100, 4, 16, 10000, 9408, duplicates=True), []
    for seed in range(16):
        *inputs, _ = case.inputs(torch.float32, seed)
        losses = cross_entropy(REFERENCE), eager_masked_linear_cross_entropy, eager_masked_linear_cross_entropy
        draws.append([f(*x)[0] for f, x in zip(losses, (inputs, inputs, double(inputs)))])
    assert_within_budget(*(torch.stack(each) for each in zip(*draws)), "loss")


def test_gradients_equal_autograd_of_the_specification() -> None:
    inputs = LossCase(30, 8, 5000, 700, 500, duplicates=True).inputs(torch.float64, seed=2)  # four chunks
    got, expected = run(masked_linear_cross_entropy, *inputs), run(reference.masked_linear_cross_entropy, *inputs)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck() -> None:
    hidden, weight, bias, targets, index, _ = LossCase(5, 3, 4, 7, 6, duplicates=True).inputs(torch.float64, seed=3)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda *x: masked_linear_cross_entropy(*x, targets, index)[0], leaves)


@pytest.mark.parametrize("slots", [0, 6])
def test_opcheck(target: Target, slots: int) -> None:
    *inputs, _ = LossCase(5, 3, 4, slots, slots // 2).inputs(target.dtype, device=target.device)
    for output_mask in ([True, True, True], [False, True, False], [False, False, False]):
        for leaf, wanted in zip(inputs, output_mask):
            leaf.requires_grad_(wanted)
        torch.library.opcheck(OPS.masked_linear_cross_entropy.default, (*inputs, output_mask, target.impl))
        plain = [t.detach() for t in inputs]
        torch.library.opcheck(OPS.masked_linear_cross_entropy_forward.default, (*plain, output_mask, target.impl))


def test_a_gradient_that_the_call_left_out_is_refused() -> None:
    *inputs, _ = SMALL.inputs(torch.float32)
    inputs[1].requires_grad_()
    loss, _ = OPS.masked_linear_cross_entropy(*inputs, [True, False, True], "reference")
    with pytest.raises(ValueError, match=r"weight needs a gradient that output_mask = \[True, False, True\] left out"):
        loss.backward()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_frozen_tensors_get_no_gradient_and_change_no_other(target: Target, wanted: int) -> None:
    *inputs, grad = SMALL.inputs(target.dtype, device=target.device)
    expected = run(cross_entropy(target), *inputs, grad)[NAMES[2 + wanted]]
    inputs[wanted].requires_grad_()
    loss, _ = cross_entropy(target)(*inputs)
    loss.backward(grad)
    assert torch.equal(inputs[wanted].grad, expected)
    assert [i for i in range(3) if inputs[i].grad is not None] == [wanted]


@pytest.mark.parametrize(("rows", "slots"), [(6, 5), (6, 0), (0, 5)])
def test_no_used_slot(target: Target, rows: int, slots: int) -> None:
    inputs = LossCase(rows, 4, 9, slots, 0).inputs(target.dtype, device=target.device)
    for name, value in run(cross_entropy(target), *inputs).items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_unused_rows_do_not_matter_even_if_not_finite(target: Target) -> None:
    hidden, *rest = LossCase(10, 4, 6, 12, 5).inputs(target.dtype, 4, target.device)
    clean = run(cross_entropy(target), hidden, *rest)
    index = rest[3]
    unused = torch.ones(10, dtype=torch.bool, device=target.device).index_fill_(0, index[index >= 0], False)
    assert unused.sum() == 5
    hidden[unused] = torch.nan
    dirty = run(cross_entropy(target), hidden, *rest)
    for name in NAMES:
        assert torch.equal(clean[name], dirty[name]), name


def test_a_row_in_several_slots_sums_its_gradients(target: Target) -> None:
    inputs = LossCase(3, 24, 50, 70, 60, duplicates=True).inputs(target.dtype, 5, target.device)
    got = run(cross_entropy(target), *inputs)["grad hidden"]
    eager, oracle = (run(eager_masked_linear_cross_entropy, *x)["grad hidden"] for x in (inputs, double(inputs)))
    assert_within_budget(got, eager, oracle, "grad hidden")


def test_ties_count_for_the_lowest_class(target: Target) -> None:
    hidden, weight, bias = (torch.zeros(shape, device=target.device) for shape in ((3, 4), (600, 4), (600,)))
    bias[[77, 400]] = 1
    targets, index = (torch.tensor(x, device=target.device) for x in ([77, 400, 0], [0, 1, 2]))
    accuracy = masked_linear_cross_entropy(hidden, weight, bias, targets, index, impl=target.impl)[1]
    assert accuracy.item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("scale", [3e2, 1e4])
def test_extreme_logits_stay_finite(target: Target, scale: float) -> None:
    inputs = LossCase(20, 16, 300, 24, 20, scale=scale).inputs(torch.float32, 6, target.device)
    got = run(cross_entropy(target), *inputs)
    eager, oracle = (run(eager_masked_linear_cross_entropy, *x) for x in (inputs, double(inputs)))
    for name in NAMES:
        assert_within_budget(got[name], eager[name], oracle[name], name)


def test_a_row_that_is_not_finite_makes_the_loss_nan(target: Target) -> None:
    hidden, weight, bias, targets, index, _ = SMALL.inputs(torch.float32, device=target.device)
    hidden[index[index >= 0][0]] = torch.nan
    assert masked_linear_cross_entropy(hidden, weight, bias, targets, index, impl=target.impl)[0].isnan()


def test_strided_inputs(target: Target) -> None:
    def strided(inputs: list) -> list:
        hidden, weight, *rest = inputs
        return [hidden.t().contiguous().t(), weight.t().contiguous().t(), *(x.repeat_interleave(2)[::2] for x in rest)]

    assert_draws_within_budget(SMALL, target, target.dtype, *range(16), change=strided)


def test_float32_weight_beside_low_precision_rows_keeps_its_gradient(target: Target) -> None:
    dtype = target.dtypes[1]
    hidden, weight, bias, *rest = SMALL.inputs(dtype, 6, target.device)
    got = run(cross_entropy(target), hidden, weight.float(), bias.float(), *rest)
    low = run(cross_entropy(target), hidden, weight, bias, *rest)
    for name in ("grad weight", "grad bias"):
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name].to(dtype), low[name])
        assert not torch.equal(got[name].to(dtype).float(), got[name]), f"{name} has been rounded"


def test_half_gradients_are_scaled_by_a_float32_factor(target: Target) -> None:
    """And rounded once: a factor in bfloat16 is off by up to 2^-9, which every number of the gradient would share."""
    *inputs, _ = LossCase(300, 8, 4, 3, 3).inputs(target.dtypes[1], 7, target.device)
    kept = OPS.masked_linear_cross_entropy_forward(*inputs, [True, False, False], target.impl)[2]
    grad, used = torch.tensor(1.7, device=target.device), torch.tensor(3, device=target.device)
    got = run(cross_entropy(target), *inputs, grad)["grad hidden"]
    assert kept.any()
    # Not `/ 3`: by a Python number CUDA divides as times its reciprocal, which is another float32.
    assert torch.equal(got, (kept.float() * (grad / used)).to(kept.dtype))


def test_autocast_casts_the_rows_as_a_linear_layer_would() -> None:
    *inputs, _ = SMALL.inputs(torch.float32, 7)
    with torch.autocast("cpu", torch.bfloat16):
        got = masked_linear_cross_entropy(*inputs)
    expected = masked_linear_cross_entropy(inputs[0].bfloat16(), *inputs[1:])
    assert torch.equal(got[0], expected[0])


def test_a_kept_graph_gives_its_gradients_again(target: Target) -> None:
    *inputs, grad = SMALL.inputs(target.dtype, device=target.device)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    loss, _ = cross_entropy(target)(*inputs)
    first = torch.autograd.grad(loss, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, grad)
    for name, a, b in zip(NAMES[2:], first, again):
        assert torch.equal(a, b), name


def test_gradients_are_scaled_in_place(target: Target) -> None:
    """Else the weight's would be there twice."""
    *inputs, grad = SMALL.inputs(torch.float32, device=target.device)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss, _ = cross_entropy(target)(*inputs)
    found = torch.autograd.grad(loss, leaves, grad)
    assert {g.untyped_storage().data_ptr() for g in found} <= {t.untyped_storage().data_ptr() for t in kept}


def test_second_derivative_is_refused() -> None:
    *inputs, _ = SMALL.inputs(torch.float64)
    loss, _ = masked_linear_cross_entropy(inputs[0].requires_grad_(), *inputs[1:])
    with pytest.raises(NotImplementedError, match="masked_linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)


def test_repeated_runs_give_the_same_bits(target: Target) -> None:
    inputs = LossCase(60, 16, 300, 80, 70, duplicates=True).inputs(target.dtype, device=target.device)
    first = run(cross_entropy(target), *inputs)
    for _ in range(100 if target.device == "cuda" else 4):
        again = run(cross_entropy(target), *inputs)
        for name in NAMES:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_and_masks_do_not_recompile(target: Target, backend: str) -> None:
    """With unused slots among the used: a peer's loss has gone wrong just there (Liger-Kernel issue 1338)."""
    torch._dynamo.reset()
    compiles = 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(cross_entropy(target), backend=count, fullgraph=True)
    for slots, used in ((40, 28), (50, 0), (77, 77)):
        *inputs, grad = LossCase(slots + 3, 8, 30, slots, used).inputs(target.dtype, slots, target.device)
        for tensor in (inputs[0], *inputs[3:]):
            torch._dynamo.mark_dynamic(tensor, 0)
        leaves = [t.requires_grad_() for t in inputs[:3]]
        loss, accuracy = compiled(*inputs)
        got = (loss.detach(), accuracy, *torch.autograd.grad(loss, leaves, grad))
        for value, (name, expected) in zip(got, run(cross_entropy(target), *inputs, grad).items()):
            assert torch.equal(value, expected), f"{slots} slots: {name}"
    assert compiles == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flop_counter(device: str) -> None:
    *inputs, _ = LossCase(10, 4, 6, 12, 9).inputs(torch.float32)
    inputs = [t.to(device) for t in inputs]
    product = 2 * 12 * 4 * 6
    for trained, products in (((), 1), ((0,), 2), ((0, 1, 2), 3)):
        for i in trained:
            inputs[i].requires_grad_()
        with FlopCounterMode(display=False) as counter:
            masked_linear_cross_entropy(*inputs, impl="reference")
        assert counter.get_total_flops() == products * product, trained
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        masked_linear_cross_entropy(*inputs, impl="reference")
    assert counter.get_total_flops() == product


def test_triton_refuses_more_classes_than_fit_into_registers() -> None:
    with pytest.raises(NoImplementation, match=r"triton: .*takes up to 32768 classes, not 50000"):
        resolve("masked_linear_cross_entropy", "triton", Spec("cpu", torch.float32, True, classes=50000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 4)}, r"hidden must be \(M, C\) and weight \(V, C\), got \(5, 4\) and \(4, 3\)"),
        ({0: [[1.0]]}, "hidden must be a tensor, got list"),
        ({1: torch.zeros(4, 3).to_sparse()}, "weight must be dense"),
        ({1: torch.zeros(0, 3)}, "weight has no classes"),
        ({2: torch.zeros(3)}, r"bias must be \(4,\)"),
        ({3: torch.zeros(6, dtype=torch.int64)}, r"index and targets must be \(K,\)"),
        ({4: torch.zeros(7, dtype=torch.int32)}, "index and targets must be int64"),
        ({1: torch.zeros(4, 3, dtype=torch.float16)}, "weight must be as hidden, torch.float32"),
        ({2: torch.zeros(4, device="meta")}, "bias on meta"),
        ({4: torch.full((7,), 5)}, r"slot 0 has index 5.*a row 0\.\.4"),
        ({4: torch.full((7,), -2)}, "slot 0 has index -2"),
        ({3: torch.full((7,), 4), 4: torch.zeros(7, dtype=torch.int64)}, r"target 4: .*a class 0\.\.3"),
    ],
)
@pytest.mark.parametrize("target", [t.param() for t in TARGETS if t.device == "cpu"])
def test_bad_arguments(target: Target, change: dict, message: str) -> None:
    *inputs, _ = LossCase(5, 3, 4, 7, 4).inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        cross_entropy(target)(*(dict(enumerate(inputs)) | change).values())


@pytest.mark.parametrize("target", [t.param() for t in TARGETS if t != REFERENCE and t.device == "cuda"])
def test_out_of_range_on_a_gpu_makes_the_loss_nan(target: Target) -> None:
    hidden, weight, bias, targets, index, _ = SMALL.inputs(target.dtype, device=target.device)
    used = int((index >= 0).nonzero()[0])
    for changed, value in ((targets, 30), (index, 20), (index, -2)):
        before = int(changed[used])
        changed[used] = value
        assert math.isnan(cross_entropy(target)(hidden, weight, bias, targets, index)[0])
        changed[used] = before
