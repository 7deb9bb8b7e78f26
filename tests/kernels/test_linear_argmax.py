"""linear_argmax: both implementations against torch.argmax, exactly where arithmetic is exact."""

import pytest
import torch
from bevt_kernels import NoImplementation, linear_argmax, native
from torch.utils.flop_counter import FlopCounterMode

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not native.loaded(), reason=f"native library {native.status()}")
)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", NATIVE])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def whole_numbers(rows: int, channels: int, classes: int, dtype: torch.dtype, seed: int = 0):
    """x, weight, bias of small whole numbers: every sum is exact in any order, and ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(-3, 4, shape, generator=generator).to(dtype)
        for shape in ((rows, channels), (classes, channels), (classes,))
    )


def logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().t() + bias.double()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 31), (129, 7, 33), (300, 16, 513), (257, 3, 1300), (1, 64, 8192), (0, 4, 9)], ids=str
)
def test_equals_argmax_with_ties_to_the_lowest(impl: str, shape: tuple, dtype: torch.dtype) -> None:
    inputs = whole_numbers(*shape, dtype)
    assert torch.equal(linear_argmax(*inputs, impl=impl), logits(*inputs).argmax(1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_chosen_class_is_the_largest_up_to_float32_rounding(impl: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((500, 96), (1000, 96), (1000,)))
    exact = logits(x, weight, bias)
    chosen = exact.gather(1, linear_argmax(x, weight, bias, impl=impl)[:, None]).squeeze(1)
    # A float32 sum of 97 products in any order: at most 97 roundings of the sum of magnitudes.
    rounding = 97 * 2**-24 * (x.double().abs() @ weight.double().abs().t() + bias.double().abs()).amax(1)
    assert ((exact.amax(1) - chosen) <= 2 * rounding).all()


@pytest.mark.parametrize("classes", [5, 40, 1100])
def test_first_nan_wins(impl: str, classes: int) -> None:
    x, weight, bias = whole_numbers(4, 3, classes, torch.float32)
    bias[-1] = torch.nan
    assert (linear_argmax(x, weight, bias, impl=impl) == classes - 1).all()
    bias[2] = torch.nan
    assert (linear_argmax(x, weight, bias, impl=impl) == 2).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinities_tie_like_numbers(impl: str, value: float) -> None:
    x, weight, bias = torch.zeros(2, 3), torch.zeros(700, 3), torch.full((700,), value)
    assert (linear_argmax(x, weight, bias, impl=impl) == 0).all()


def test_strided_and_mixed_inputs(impl: str) -> None:
    x, weight, bias = whole_numbers(130, 6, 50, torch.float32)
    expected = logits(x, weight, bias).argmax(1)
    strided = (x.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat_interleave(2)[::2])
    assert torch.equal(linear_argmax(*strided, impl=impl), expected)
    assert torch.equal(linear_argmax(x.bfloat16(), weight, bias, impl=impl), expected)


def test_parameters_and_autocast(impl: str) -> None:
    x, weight, bias = whole_numbers(130, 6, 50, torch.float32)
    x = x + 2**-12  # lost in bfloat16
    weight[:, 0] += torch.arange(50) * 2**-10
    expected = logits(x, weight, bias).argmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        codes = linear_argmax(x.requires_grad_(), weight.requires_grad_(), bias, impl=impl)
    assert torch.equal(codes, expected)
    assert not codes.requires_grad


def test_opcheck(impl: str) -> None:
    torch.library.opcheck(torch.ops.bevt_kernels.linear_argmax.default, (*whole_numbers(9, 3, 7, torch.float32), impl))


def test_compiled_equals_eager(impl: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_argmax, backend="aot_eager", fullgraph=True)
    inputs = whole_numbers(9, 3, 7, torch.float32)
    assert torch.equal(compiled(*inputs, impl=impl), linear_argmax(*inputs, impl=impl))


def test_same_on_one_thread_and_two(impl: str) -> None:
    inputs = whole_numbers(700, 8, 600, torch.float32)
    before, codes = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes.append(linear_argmax(*inputs, impl=impl))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*codes)


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
