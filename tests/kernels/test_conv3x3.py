"""conv3x3 in C++, by Winograd's filtering, against the direct convolution and against the same in plain PyTorch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bevt_kernels import NoImplementation, Spec, conv3x3, native, resolve
from bevt_kernels.conv3x3.api import outputs_adjacent
from bevt_kernels.conv3x3.reference import conv3x3 as reference
from bevt_kernels.testing import ConvCase, assert_within_budget, eager_winograd, random_conv_case
from targets import LESSER, at_instruction_set
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

needs_native = pytest.mark.skipif(not native.loaded(), reason=f"native library {native.status()}")


def ours(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    return conv3x3(x, weight, bias, relu=relu, impl="native")


def assert_right(case: ConvCase, draws: int = 1, seed: int = 0) -> None:
    """At most twice the errors of the same algorithm in plain PyTorch, on all draws together."""
    found: list[list[Tensor]] = [[], [], []]
    for draw in range(draws):
        inputs = case.inputs(torch.float32, seed + 1000 * draw)
        found[0].append(ours(*inputs, case.relu))
        found[1].append(eager_winograd(*inputs, case.relu))
        found[2].append(reference(*(x.double() for x in inputs), case.relu))
    assert_within_budget(*(torch.stack(values) for values in found), name=f"{case}")


@pytest.mark.parametrize("seed", range(20))
def test_the_plain_form_is_the_convolution(seed: int) -> None:
    """In float64, to its rounding: the matrices, tiles past the edge, zeros around."""
    case = random_conv_case(seed, 2**18)
    inputs = case.inputs(torch.float64, seed)
    torch.testing.assert_close(
        eager_winograd(*inputs, case.relu), reference(*inputs, case.relu), rtol=1e-12, atol=1e-12
    )


@needs_native
@pytest.mark.parametrize("seed", range(200))
def test_random_shapes_are_within_budget(seed: int) -> None:
    """A largest error of one draw of few numbers may be luck: a case that fails is judged on 16 draws."""
    case = random_conv_case(seed)
    try:
        assert_right(case, seed=seed)
    except AssertionError:
        assert_right(case, draws=16, seed=seed)


@needs_native
@pytest.mark.parametrize(
    "case",
    [
        ConvCase(1, 112, 112, 256, 64),
        ConvCase(1, 56, 56, 128, 128),
        ConvCase(2, 28, 28, 1024, 256),  # outputs in two parts
        ConvCase(3, 14, 14, 2048, 512),
    ],
    ids=str,
)
def test_sizes_of_the_tokenizer(case: ConvCase) -> None:
    """Within twice the plain form, and within five times a direct convolution (README: 1.2 to 3.3 times)."""
    inputs = case.inputs(torch.float32)
    oracle = reference(*(x.double() for x in inputs), case.relu)
    got = ours(*inputs, case.relu)
    assert_within_budget(got, eager_winograd(*inputs, case.relu), oracle, "beside the plain form")
    direct = reference(*inputs, case.relu)
    error, allowed = ((y.double() - oracle).abs().mean() for y in (got, direct))
    assert error < 5 * allowed, f"mean error {error:.1e}, a direct convolution's {allowed:.1e}"


@needs_native
def test_same_bits_on_any_threads_and_in_any_batch(set_threads: Callable[[int], None]) -> None:
    x, weight, bias = ConvCase(5, 21, 18, 70, 40).inputs(torch.float32)
    set_threads(1)
    alone = ours(x, weight, bias)
    set_threads(2)
    assert torch.equal(ours(x, weight, bias), alone)
    for images in (slice(0, 1), slice(2, 5)):
        assert torch.equal(ours(x[images], weight, bias), alone[images])


@needs_native
def test_any_layout() -> None:
    x, weight, bias = ConvCase(2, 9, 11, 33, 20).inputs(torch.float32)
    expected = ours(x, weight, bias)
    assert expected.stride(1) == 1
    assert torch.equal(ours(x.contiguous(), weight, bias), expected)
    assert torch.equal(ours(x, outputs_adjacent(weight), bias), expected)
    assert torch.equal(ours(x, weight.contiguous(memory_format=torch.channels_last), bias), expected)
    strided = (x.repeat_interleave(2, 3)[..., ::2], weight.repeat_interleave(2, 1)[:, ::2], bias.expand(3, -1)[1])
    assert torch.equal(ours(*strided), expected)
    assert ours(x[:0], weight, bias).shape == (0, 20, 9, 11)


@needs_native
def test_what_is_not_a_number_stays_near() -> None:
    """In the tiles of 4x4 outputs whose inputs it is among."""
    x, weight, bias = ConvCase(1, 16, 16, 3, 5, relu=False).inputs(torch.float32)
    clean = ours(x, weight, bias)
    x[0, 1, 5, 5] = torch.nan
    got = ours(x, weight, bias)
    assert got[0, :, 4:7, 4:7].isnan().all()
    assert torch.equal(got[0, :, 8:], clean[0, :, 8:])
    assert torch.equal(got[0, :, :, 8:], clean[0, :, :, 8:])


@needs_native
@pytest.mark.parametrize("outputs", [16, 20], ids=["whole vectors", "padded"])
def test_opcheck(outputs: int) -> None:
    inputs = ConvCase(2, 5, 6, 3, outputs).inputs(torch.float32)
    torch.library.opcheck(torch.ops.bevt_kernels.conv3x3.default, (*inputs, True, "native"))


@needs_native
def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = ConvCase(2, 9, 11, 33, 20).inputs(torch.float32)
    assert torch.equal(compiled(*inputs), ours(*inputs))


@needs_native
def test_flop_counter_counts_the_direct_convolution() -> None:
    inputs = ConvCase(2, 9, 11, 33, 20).inputs(torch.float32)
    counts = []
    for function in (ours, reference):
        with FlopCounterMode(display=False) as counter:
            function(*inputs, False)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@needs_native
def test_no_gradient_is_lost_in_silence() -> None:
    """`auto` takes torch's own where there is one to be had; named, native refuses."""
    x, weight, bias = ConvCase(1, 5, 5, 3, 4).inputs(torch.float32)
    weight.requires_grad_()
    torch.autograd.grad(conv3x3(x, weight, bias).sum(), weight)
    with pytest.raises(NoImplementation, match="native: has no derivative"):
        ours(x, weight, bias)
    with torch.no_grad():
        ours(x, weight, bias)


@needs_native
def test_auto() -> None:
    assert resolve("conv3x3", "auto", Spec("cpu", torch.float32)) == "native"
    x, weight, bias = ConvCase(1, 5, 5, 3, 4).inputs(torch.float32)
    without = ours(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight, bias).dtype == torch.bfloat16
        assert torch.equal(ours(x, weight, bias), without)
    for spec in (Spec("cpu", torch.bfloat16), Spec("cuda", torch.float16), Spec("cpu", torch.float32, needs_grad=True)):
        assert resolve("conv3x3", "auto", spec) == "reference"


def test_reference_is_torchs() -> None:
    x, weight, bias = ConvCase(2, 5, 6, 3, 4).inputs(torch.float64)
    assert torch.equal(conv3x3(x, weight, bias, impl="reference"), F.conv2d(x, weight, bias, padding=1))
    assert torch.equal(conv3x3(x, weight, bias, relu=True), F.conv2d(x.relu(), weight, bias, padding=1))


@needs_native
@pytest.mark.parametrize("capability", LESSER)
def test_lesser_instruction_sets(capability: str) -> None:
    at_instruction_set(
        capability, "import test_conv3x3 as t; [t.assert_right(t.random_conv_case(s), 16, s) for s in range(8)]"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4, 5, 5)}, r"x must be \(M, C, H, W\) and weight \(N, C, 3, 3\), got \(2, 4, 5, 5\)"),
        ({0: torch.zeros(3, 5, 5)}, r"x must be \(M, C, H, W\)"),
        ({1: torch.zeros(4, 3, 5, 5)}, r"weight \(N, C, 3, 3\)"),
        ({1: [1.0]}, "weight must be a tensor, got list"),
        ({0: torch.zeros(2, 0, 5, 5), 1: torch.zeros(4, 0, 3, 3)}, "all axes but the batch must be above 0"),
        ({2: torch.zeros(3)}, r"bias must be \(4,\)"),
        ({1: torch.zeros(4, 3, 3, 3, dtype=torch.float64)}, "weight must be torch.float32, as x, got torch.float64"),
        ({2: torch.zeros(4, device="meta")}, "bias on meta"),
    ],
)
@needs_native
def test_bad_arguments(change: dict, message: str) -> None:
    inputs = dict(enumerate(ConvCase(2, 5, 5, 3, 4).inputs(torch.float32))) | change
    with pytest.raises(ValueError, match=message):
        conv3x3(*inputs.values())
