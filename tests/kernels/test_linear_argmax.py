"""linear_argmax: every implementation against torch.argmax, exactly where arithmetic is exact."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from bevt_kernels import NoImplementation, Spec, linear_argmax, resolve, select
from bevt_kernels.testing import ArgmaxCase, assert_argmax, random_argmax_case
from targets import NATIVE, REFERENCE, TARGETS, TRITON, Target, each_dtype
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(params=[t.param() for t in TARGETS])
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


def whole_numbers(rows: int, channels: int, classes: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu"):
    """x, weight, bias of small whole numbers: every sum is exact in any order, and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(-3, 4, shape, generator=generator).to(device, dtype)
        for shape in ((rows, channels), (classes, channels), (classes,))
    )


def logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().t() + bias.double()


@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 5, 31), (129, 7, 33), (300, 16, 513), (257, 3, 1300), (1, 64, 8192), (0, 4, 9), (5, 0, 7)],
    ids=str,
)
def test_equals_argmax_with_ties_to_the_lowest(target: Target, dtype: torch.dtype, shape: tuple) -> None:
    inputs = whole_numbers(*shape, dtype, device=target.device)
    assert torch.equal(linear_argmax(*inputs, impl=target.impl), logits(*inputs).argmax(1))


@each_dtype
def test_a_chosen_class_is_the_largest_up_to_float32_rounding(target: Target, dtype: torch.dtype) -> None:
    inputs = ArgmaxCase(200, 96, 1000).inputs(dtype, 1, target.device)
    assert_argmax(linear_argmax(*inputs, impl=target.impl), *inputs)


def random_case(target: Target, seed: int) -> tuple[ArgmaxCase, torch.dtype]:
    """Shape and dtype of a seed. Triton's interpreter takes 20 ms for a tile of logits."""
    return random_argmax_case(seed, 2**15 if target.interpreted else 2**20), target.dtypes[seed % len(target.dtypes)]


@pytest.mark.parametrize("seed", range(200))
def test_random_shapes_of_whole_numbers_are_exact(target: Target, seed: int) -> None:
    case, dtype = random_case(target, seed)
    inputs = whole_numbers(case.rows, case.channels, case.classes, dtype, seed, target.device)
    assert torch.equal(linear_argmax(*inputs, impl=target.impl), logits(*inputs).argmax(1)), case


@pytest.mark.parametrize("seed", range(200))
def test_random_shapes_up_to_float32_rounding(target: Target, seed: int) -> None:
    case, dtype = random_case(target, seed)
    inputs = case.inputs(dtype, seed, target.device)
    assert_argmax(linear_argmax(*inputs, impl=target.impl), *inputs)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, under Triton's interpreter
@pytest.mark.parametrize("seed", range(20))
def test_order_of_special_values(target: Target, seed: int) -> None:
    """NaN of either sign above +inf, the first of them; zeros of either sign tie, as -inf does; subnormals count."""
    rng = random.Random(seed)
    special = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0]
    values = rng.sample(special, rng.randint(1, 3))
    bias = torch.tensor(rng.choices(values, k=rng.choice((3, 40, 700))), device=target.device)
    x, weight = torch.zeros(2, 3, device=target.device), torch.zeros(len(bias), 3, device=target.device)
    expected = int(bias.cpu().argmax())
    assert linear_argmax(x, weight, bias, impl=target.impl).tolist() == [expected] * 2, values


def test_infinite_inputs_meet_no_padding(target: Target) -> None:
    """A zero beside the tensors times inf would be NaN, and NaN would win."""
    x, weight, bias = whole_numbers(5, 7, 33, target.dtypes[-1], device=target.device)
    x[1, 3], weight[:, 3] = math.inf, weight[:, 3].abs() + 1
    expected = logits(x, weight, bias).argmax(1)
    assert expected[1] == 0
    assert torch.equal(linear_argmax(x, weight, bias, impl=target.impl), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # likewise
def test_logits_beyond_float32_are_infinite(target: Target) -> None:
    x, weight = torch.full((1, 2), 3e38, device=target.device), torch.ones(40, 2, device=target.device)
    weight[:5] = 0
    assert linear_argmax(x, weight, torch.zeros(40, device=target.device), impl=target.impl).item() == 5


def test_strided_inputs(target: Target) -> None:
    x, weight, bias = whole_numbers(130, 6, 50, torch.float32, device=target.device)
    strided = (x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2])
    assert torch.equal(linear_argmax(*strided, impl=target.impl), logits(x, weight, bias).argmax(1))


def test_half_rows_with_float_weight(target: Target) -> None:
    x, weight, bias = whole_numbers(130, 6, 50, target.dtypes[-1], device=target.device)
    weight = weight.float()
    weight[:, 0] += torch.arange(50, device=target.device) * 2**-14  # lost in 16 bits
    expected = logits(x, weight, bias).argmax(1)
    assert not torch.equal(expected, logits(x, weight.to(x.dtype), bias).argmax(1))
    assert torch.equal(linear_argmax(x, weight, bias, impl=target.impl), expected)


def test_half_product_with_float_bias(target: Target) -> None:
    x, weight, bias = whole_numbers(130, 6, 50, target.dtypes[-1], device=target.device)
    bias = bias.float() + torch.arange(50, device=target.device) * 2**-14
    assert torch.equal(linear_argmax(x, weight, bias, impl=target.impl), logits(x, weight, bias).argmax(1))


def test_parameters_and_autocast(target: Target) -> None:
    x, weight, bias = whole_numbers(130, 6, 50, torch.float32, device=target.device)
    x = x + 2**-12  # lost in bfloat16
    weight[:, 0] += torch.arange(50, device=target.device) * 2**-10
    expected = logits(x, weight, bias).argmax(1)
    with torch.autocast(target.device, torch.bfloat16):
        codes = linear_argmax(x.requires_grad_(), weight.requires_grad_(), bias, impl=target.impl)
    assert torch.equal(codes, expected)
    assert not codes.requires_grad


def test_opcheck(target: Target) -> None:
    inputs = whole_numbers(9, 3, 7, torch.float32, device=target.device)
    torch.library.opcheck(torch.ops.bevt_kernels.linear_argmax.default, (*inputs, target.impl))


def test_compiled_equals_eager(target: Target) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_argmax, backend="aot_eager", fullgraph=True)
    inputs = whole_numbers(9, 3, 7, torch.float32, device=target.device)
    assert torch.equal(compiled(*inputs, impl=target.impl), linear_argmax(*inputs, impl=target.impl))


@pytest.mark.parametrize("target", [t.param() for t in (REFERENCE, NATIVE)])
def test_same_on_one_thread_and_two(target: Target, set_threads: Callable[[int], None]) -> None:
    inputs = whole_numbers(700, 8, 600, torch.float32)
    codes = []
    for threads in (1, 2):
        set_threads(threads)
        codes.append(linear_argmax(*inputs, impl=target.impl))
    assert torch.equal(*codes)


@pytest.mark.parametrize("target", [TRITON.param()])
def test_codes_do_not_depend_on_how_classes_are_shared_out(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from bevt_kernels.linear_argmax import triton_forward

    inputs = ArgmaxCase(70, 40, 1300).inputs(target.dtypes[-1], 2, target.device)
    codes = []
    for processors in (1, 1000):
        monkeypatch.setattr(triton_forward, "processors", lambda device, processors=processors: processors)
        codes.append(linear_argmax(*inputs, impl="triton"))
    assert torch.equal(*codes)


@pytest.mark.parametrize(
    ("row_tiles", "processors", "tiles"),
    [(196, 132, 8), (1, 132, 1), (7, 132, 2), (10_000, 132, 16)],
    ids=["32 clips' frames", "one tile", "one frame", "many rows"],
)
def test_classes_are_shared_out_for_full_waves(row_tiles: int, processors: int, tiles: int) -> None:
    """Of 32 tiles; at 196 tiles of rows 784 programs are 5.94 waves of 132, where 196 would take the time of two."""
    reason = "needs triton: pip install triton"
    triton_forward = pytest.importorskip("bevt_kernels.linear_argmax.triton_forward", reason=reason)
    assert triton_forward.tiles_a_part(row_tiles, 32, processors) == tiles


def test_auto_is_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_gpu_reasons", list)
    monkeypatch.setattr(select, "_TRITON", "")
    assert resolve("linear_argmax", "auto", Spec("cuda", torch.float16)) == "triton"


def test_flop_counter() -> None:
    x, weight, bias = (t.to("meta") for t in whole_numbers(9, 3, 7, torch.float32))
    with FlopCounterMode(display=False) as counter:
        codes = linear_argmax(x, weight, bias)
    assert counter.get_total_flops() == 2 * 9 * 3 * 7
    assert (codes.shape, codes.dtype) == ((9,), torch.int64)


def test_float64_is_compared_in_float64() -> None:
    x, weight, bias = (torch.tensor(t, dtype=torch.float64) for t in ([[1.0]], [[1.0], [1 + 2**-40]], [0.0, 0.0]))
    assert linear_argmax(x, weight, bias).item() == 1
    with pytest.raises(NoImplementation, match=r"native: .*takes float32, bfloat16 and float16, not torch.float64"):
        linear_argmax(x, weight, bias, impl="native")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 4)}, r"x must be \(M, C\) and weight \(V, C\), got \(5, 4\) and \(4, 3\)"),
        ({0: [[1.0, 2.0, 3.0]]}, "x must be a tensor, got list"),
        ({1: torch.zeros(4, 3).to_sparse()}, "weight must be dense"),
        ({1: torch.zeros(0, 3)}, "weight has no classes"),
        ({2: torch.zeros(3)}, r"bias must be \(4,\)"),
        ({1: torch.zeros(4, 3, dtype=torch.bfloat16)}, "weight must be torch.float32"),
        ({2: torch.zeros(4, device="meta")}, "bias on meta"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    inputs = dict(enumerate(whole_numbers(5, 3, 4, torch.float32))) | change
    with pytest.raises(ValueError, match=message):
        linear_argmax(*inputs.values())
