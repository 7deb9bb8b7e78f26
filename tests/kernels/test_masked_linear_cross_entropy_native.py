"""masked_linear_cross_entropy in C++: threads, scratch, products that are not computed, extreme logits."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from bevt_kernels import native
from bevt_kernels.masked_linear_cross_entropy.ops import forward
from bevt_kernels.testing import LossCase, assert_accuracy, assert_within_budget, eager_masked_linear_cross_entropy
from torch import Tensor
from torch.profiler import profile

pytestmark = pytest.mark.skipif(not native.loaded(), reason=f"native library {native.status()}")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
MASKS = list(itertools.product((False, True), repeat=3))
NAMES = ("loss", "accuracy", "grad hidden", "grad weight", "grad bias")
SEVERAL_CHUNKS = LossCase(2000, 24, 1003, 2600, 2000)  # of at most 768 slots


def run(inputs: tuple[Tensor, ...], mask: tuple[bool, ...] = (True, True, True)) -> dict[str, Tensor]:
    """The op's results by name; the gradients are those of the sum of the losses."""
    return dict(zip(NAMES, forward(*inputs[:5], mask, "native")))


def eager(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The same by autograd, in the dtype of `inputs`."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    loss, accuracy = eager_masked_linear_cross_entropy(*leaves, *inputs[3:5])
    used = int((inputs[4] >= 0).sum())
    return dict(zip(NAMES, (loss.detach(), accuracy, *torch.autograd.grad(loss * max(1, used), leaves))))


def oracle(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return eager(tuple(x.double() if x.is_floating_point() else x for x in inputs))


def assert_within_budgets(got: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> None:
    plain, exact = eager(inputs), oracle(inputs)
    for name in set(NAMES) - {"accuracy"}:
        # The gradients of weight and bias are float32; eager's are in the dtype.
        assert_within_budget(got[name].to(plain[name].dtype), plain[name], exact[name], name)
    assert_accuracy(got["accuracy"], *inputs[:5])


def peak_bytes(prof: profile) -> int:
    """The most that torch's CPU allocator held above what it held at first."""
    events = prof.profiler.kineto_results.events()
    return max(
        itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]")
    )


@pytest.mark.parametrize("unused", [0, 2000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scratch_is_at_most_an_eighth_of_the_used_slots_logits(dtype: torch.dtype, unused: int) -> None:
    """Above 4 MiB, which any problem may take."""
    case = LossCase(3000, 64, 8192, 1200 + unused, 1200)
    inputs = case.inputs(dtype)
    with profile(profile_memory=True) as prof:
        got = run(inputs)
    outputs = sum(x.nbytes for x in got.values())
    assert peak_bytes(prof) - outputs <= case.used * case.classes * 4 // 8


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_products_of_used_slots_and_of_gradients_asked_for_only(
    mask: tuple[bool, ...], set_threads: Callable[[int], None]
) -> None:
    set_threads(1)  # the profiler does not see others
    case = SEVERAL_CHUNKS
    inputs = case.inputs(torch.float32)
    with profile(record_shapes=True) as prof:
        got = run(inputs, mask)
    products = [e.concrete_inputs for e in prof.events() if e.name == "bevt_kernels::product"]
    terms = case.used * case.channels * case.classes * (1 + sum(mask[:2]))
    assert sum(math.prod(map(int, sizes)) for sizes in products) == terms
    assert len(products) == 3 * (1 + sum(mask[:2]))  # three chunks
    assert [x.numel() > 0 for x in list(got.values())[2:]] == list(mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_that_are_not_asked_for_change_nothing(dtype: torch.dtype) -> None:
    inputs = SEVERAL_CHUNKS.inputs(dtype)
    everything = run(inputs)
    for mask in MASKS:
        for name, value in run(inputs, mask).items():
            assert not value.numel() or torch.equal(value, everything[name]), f"{name}, mask {mask}"


def test_same_on_one_thread_and_two(set_threads: Callable[[int], None]) -> None:
    """Logits of whole numbers are exact, whatever the library's products do; what follows has one order."""
    inputs = [torch.round(x) if x.is_floating_point() else x for x in SEVERAL_CHUNKS.inputs(torch.float32)]
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        results.append(run(tuple(inputs)))
    for name in ("loss", "accuracy", "grad bias"):
        assert torch.equal(results[0][name], results[1][name]), name
    for name in NAMES:
        assert torch.equal(results[1][name], results[2][name]), f"{name}, run twice"


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_blocks_of_classes_and_channels(threads: int, set_threads: Callable[[int], None]) -> None:
    """Of 256 and 512 at most, and of 64 at least where that is a thread's share; the last ones shorter."""
    inputs = LossCase(300, 1100, 600, 300, 200).inputs(torch.float32)
    set_threads(threads)
    assert_within_budgets(run(inputs), inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_in_slots_of_several_chunks(dtype: torch.dtype) -> None:
    inputs = LossCase(3, 40, 300, 2100, 2000, duplicates=True).inputs(dtype)
    assert_within_budgets(run(inputs), inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("strides", ["transposed", "every other channel"])
def test_any_strides(strides: str, dtype: torch.dtype) -> None:
    inputs = SEVERAL_CHUNKS.inputs(dtype)
    if strides == "transposed":
        first = [x.t().contiguous().t() for x in inputs[:2]]
    else:
        first = [x.repeat_interleave(2, 1)[:, ::2] for x in inputs[:2]]
    rest = [x.repeat_interleave(2)[::2] for x in inputs[2:5]]
    assert_within_budgets(run((*first, *rest)), inputs)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_large_logits(scale: float) -> None:
    inputs = LossCase(60, 24, 1003, 90, 60, scale=scale).inputs(torch.float32)
    assert_within_budgets(run(inputs), inputs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["hidden", "weight", "bias"])
def test_numbers_that_are_not_finite_come_out_as_in_eager(where: str, value: float) -> None:
    inputs = LossCase(20, 8, 37, 30, 20).inputs(torch.float32)
    inputs[("hidden", "weight", "bias").index(where)].view(-1)[3] = value
    got, expected = run(inputs), eager(inputs)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("target", range(4))
@pytest.mark.parametrize(
    "bias", [(1, 1, 0, 1), (0, torch.nan, 5, torch.nan), (0, torch.inf, 0, torch.inf), (-torch.inf,) * 4], ids=str
)
@pytest.mark.parametrize("classes", [4, 40])
def test_accuracy_is_that_of_argmax(classes: int, bias: tuple[float, ...], target: int) -> None:
    """Ties go to the lowest class, and the first NaN wins; `target` is in the tail of a vector, or among several."""
    logits = torch.tensor(bias * (classes // 4))
    inputs = torch.zeros(1, 3), torch.zeros(classes, 3), logits, torch.tensor([target]), torch.tensor([0])
    assert run(inputs)["accuracy"].item() == (logits.argmax().item() == target)


@pytest.mark.parametrize(("index", "target"), [(5, 0), (-2, 0), (0, 4), (0, -1)])
def test_a_slot_out_of_range_is_named_as_the_reference_does(index: int, target: int) -> None:
    inputs = torch.zeros(5, 3), torch.zeros(4, 3), torch.zeros(4), torch.tensor([9, target]), torch.tensor([-1, index])
    messages = []
    for impl in ("native", "reference"):
        with pytest.raises(ValueError, match=f"slot 1 has index {index} and target {target}") as error:
            forward(*inputs, (True, True, True), impl)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
