"""window_attention: the specification, the registered op, and what surrounds them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from bevt_kernels import window_attention
from bevt_kernels.testing import WindowCase, assert_within_budget, eager_window_attention, relative_index
from bevt_kernels.window_attention import reference
from torch.utils.flop_counter import FlopCounterMode

OPS = torch.ops.bevt_kernels

CASES = {
    "8x7x7": WindowCase(1, (8, 14, 14), (8, 7, 7), heads=2, head_dim=32),
    "8x7x7 shifted": WindowCase(2, (8, 14, 14), (8, 7, 7), (0, 3, 3), heads=2, head_dim=16),
    "16x7x7": WindowCase(1, (16, 7, 7), (16, 7, 7), heads=1, head_dim=8),
    "1x7x7 on the 8x7x7 table": WindowCase(2, (1, 14, 14), (1, 7, 7), (0, 3, 3), (8, 7, 7), heads=3, head_dim=32),
    "2x7x7": WindowCase(1, (4, 7, 14), (2, 7, 7), (1, 0, 3), heads=1, head_dim=64),
    "4x4x4": WindowCase(2, (8, 8, 4), (4, 4, 4), (2, 2, 0), heads=2, head_dim=16),
    "3x5x2 every axis shifted": WindowCase(1, (6, 10, 6), (3, 5, 2), (1, 2, 1), heads=2, head_dim=8),
    "one window, every axis shifted": WindowCase(2, (3, 5, 4), (3, 5, 4), (1, 4, 2), heads=2, head_dim=8),
    "smaller than the table on every axis": WindowCase(
        1, (2, 6, 4), (2, 3, 4), (1, 1, 2), (4, 5, 6), heads=2, head_dim=8
    ),
    "one token": WindowCase(3, (2, 3, 2), (1, 1, 1), heads=2, head_dim=8),
    "wide heads": WindowCase(1, (2, 4, 4), (2, 4, 2), (0, 1, 0), heads=1, head_dim=128),
}
SMALL = WindowCase(1, (2, 6, 2), (2, 3, 2), (1, 1, 1), (2, 4, 2), heads=2, head_dim=2)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> WindowCase:
    return request.param


def run(function, qkv, table, grad):
    """Output and gradients of `function(qkv, table)`, by name."""
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = function(qkv, table)
    grads = torch.autograd.grad(out, (qkv, table), grad.to(out.dtype))
    return dict(zip(("out", "grad qkv", "grad bias_table"), (out.detach(), *grads)))


def arguments(case: WindowCase, impl: str = "reference") -> tuple:
    return case.heads, list(case.window), list(case.shift), list(case.table), case.scale, impl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_within_budget(case: WindowCase, dtype: torch.dtype) -> None:
    qkv, table, grad = case.inputs(dtype, seed=1)
    got = run(lambda q, t: window_attention(q, t, impl="reference", **case.keywords()), qkv, table, grad)
    eager = run(lambda q, t: eager_window_attention(q, t, case), qkv, table, grad)
    oracle = run(lambda q, t: eager_window_attention(q, t, case), qkv.double(), table.double(), grad.double())
    for name in got:
        assert_within_budget(got[name], eager[name], oracle[name], name)


def test_backward_equals_autograd_of_the_specification(case: WindowCase) -> None:
    inputs = case.inputs(torch.float64, seed=2)
    got = run(lambda q, t: window_attention(q, t, **case.keywords()), *inputs)
    expected = run(lambda q, t: reference.window_attention(q, t, *arguments(case)[:-1]), *inputs)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [SMALL, WindowCase(1, (1, 3, 3), (1, 3, 3), heads=1, head_dim=2)])
def test_gradcheck(case: WindowCase) -> None:
    qkv, table, _ = case.inputs(torch.float64, seed=3)
    function = lambda q, t: window_attention(q, t, **case.keywords())  # noqa: E731
    assert torch.autograd.gradcheck(function, (qkv.requires_grad_(), table.requires_grad_()))


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch: int) -> None:
    case = WindowCase(batch, (2, 6, 4), (2, 3, 2), (1, 1, 1), heads=2, head_dim=4)
    qkv, table, grad = case.inputs(torch.float32)
    inputs = (qkv.requires_grad_(), table.requires_grad_(), *arguments(case))
    torch.library.opcheck(OPS.window_attention_forward.default, inputs)
    with torch.no_grad():
        out, lse = OPS.window_attention_forward(*inputs)
    tensors = (grad, qkv.detach(), table.detach(), out, lse)
    torch.library.opcheck(OPS.window_attention_backward.default, (*tensors, *arguments(case)))


def test_bias_rows_follow_true_offsets() -> None:
    window, table = (2, 3, 4), (3, 3, 5)
    rows = torch.arange(5 * 5 * 9, dtype=torch.float64)[:, None]
    assert torch.equal(reference.dense_bias(rows, window, table)[0].long(), relative_index(window, table))


def test_equals_sdpa_without_bias_and_shift() -> None:
    case = WindowCase(2, (4, 6, 6), (2, 3, 3), heads=2, head_dim=16)
    qkv, table, _ = case.inputs(torch.float64)
    got = window_attention(qkv, table.zero_(), **case.keywords())
    for d, h, w in itertools.product(range(0, 4, 2), range(0, 6, 3), range(0, 6, 3)):
        part = (slice(None), slice(d, d + 2), slice(h, h + 3), slice(w, w + 3))
        q, k, v = qkv[part].reshape(2, 18, 3, 2, 16).permute(2, 0, 3, 1, 4)
        expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 2, 3, 3, 32)
        torch.testing.assert_close(got[part], expected, msg=lambda m, at=(d, h, w): f"window at {at}: {m}")


def test_rolling_by_a_window_rolls_the_output() -> None:
    case = WindowCase(1, (4, 9, 6), (2, 3, 3), heads=2, head_dim=8)
    qkv, table, _ = case.inputs(torch.float64)
    by, axes = (2, 3, 3), (1, 2, 3)
    rolled = window_attention(qkv.roll(by, axes), table, **case.keywords())
    assert torch.equal(rolled, window_attention(qkv, table, **case.keywords()).roll(by, axes))


def test_border_excludes_rather_than_discourages() -> None:
    case = WindowCase(1, (1, 1, 8), (1, 1, 4), (0, 0, 2), heads=1, head_dim=2)
    qkv, table, _ = case.inputs(torch.float64)
    before = window_attention(qkv, table, **case.keywords())
    qkv[..., :2, 2:4] = 1e4  # keys of the two first tokens, which share a rolled window with the two last
    after = window_attention(qkv, table, **case.keywords())
    assert torch.equal(before[..., 2:, :], after[..., 2:, :])


def test_unused_table_rows_get_zero_gradient() -> None:
    case = CASES["1x7x7 on the 8x7x7 table"]
    grad = run(lambda q, t: window_attention(q, t, **case.keywords()), *case.inputs(torch.float32))["grad bias_table"]
    used = torch.zeros(len(grad), dtype=torch.bool)
    used[relative_index(case.window, case.table).flatten()] = True
    assert used.nonzero()[[0, -1], 0].tolist() == [7 * 169, 8 * 169 - 1]  # the zero-distance rows of 15 * 169
    assert not grad[~used].any()
    assert grad[used].all()


def test_backward_is_deterministic() -> None:
    case = CASES["8x7x7 shifted"]
    inputs = case.inputs(torch.float32)
    first, second = (run(lambda q, t: window_attention(q, t, **case.keywords()), *inputs) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_strided_input_equals_contiguous() -> None:
    case = CASES["4x4x4"]
    qkv, table, grad = case.inputs(torch.float32)
    strided = qkv.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)
    assert not strided.is_contiguous()
    function = lambda q, t: window_attention(q, t, **case.keywords())  # noqa: E731
    expected, got = (
        run(function, qkv, table, grad),
        run(function, strided, table, grad.transpose(1, 2).contiguous().transpose(1, 2)),
    )
    for name in got:
        assert torch.equal(got[name], expected[name]), name


def test_empty_batch() -> None:
    case = WindowCase(0, (2, 4, 4), (2, 2, 2), (0, 1, 1))
    got = run(lambda q, t: window_attention(q, t, **case.keywords()), *case.inputs(torch.float32))
    assert got["out"].shape == (0, 2, 4, 4, 16)
    assert not got["grad bias_table"].any()


def test_scale_is_applied_to_the_scores() -> None:
    case = WindowCase(1, (2, 4, 4), (2, 2, 2))
    qkv, table, _ = case.inputs(torch.float64)
    scaled = qkv.clone()
    scaled[..., :16] *= 3 / case.scale
    got = window_attention(qkv, table, scale=3.0, **case.keywords())
    torch.testing.assert_close(got, window_attention(scaled, table, **case.keywords()))


def test_autocast_does_not_reach_inside() -> None:
    case = WindowCase(1, (2, 4, 4), (2, 2, 2), (0, 1, 1))
    inputs = case.inputs(torch.float32)
    function = lambda q, t: window_attention(q, t, **case.keywords())  # noqa: E731
    plain = run(function, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(function, *inputs)
    for name in plain:
        assert torch.equal(plain[name], inside[name]), name


def test_second_derivative_is_refused() -> None:
    case = WindowCase(1, (2, 2, 2), (2, 2, 2))
    qkv, table, grad = case.inputs(torch.float64)
    out = window_attention(qkv.requires_grad_(), table, **case.keywords())
    with pytest.raises(NotImplementedError, match="window_attention has no second derivative"):
        torch.autograd.grad(out, qkv, grad, create_graph=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_and_batches_do_not_recompile(backend: str) -> None:
    case = WindowCase(2, (2, 4, 4), (2, 2, 2), (0, 1, 1))
    torch._dynamo.reset()
    compiles = 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    function = lambda q, t: window_attention(q, t, **case.keywords()) * 2  # noqa: E731
    compiled = torch.compile(function, backend=count, fullgraph=True)
    for batch in (2, 3, 5, 64) if backend == "aot_eager" else (2, 3):
        qkv, table, grad = WindowCase(batch, case.grid, case.window, case.shift).inputs(torch.float32, seed=batch)
        torch._dynamo.mark_dynamic(qkv, 0)
        leaf, leaf_table = qkv.requires_grad_(), table.requires_grad_()
        out = compiled(leaf, leaf_table)
        got = (out.detach(), *torch.autograd.grad(out, (leaf, leaf_table), grad))
        expected = run(function, qkv, table, grad)
        for value, (name, wanted) in zip(got, expected.items()):
            assert torch.equal(value, wanted), f"batch {batch}: {name}"
    assert compiles == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flop_counter(device: str) -> None:
    case = WindowCase(2, (2, 4, 4), (2, 2, 4), heads=2, head_dim=8)
    qkv, table, grad = case.inputs(torch.float32, device=device)
    product = 2 * (2 * 2 * 4 * 4) * (2 * 2 * 4) * 16  # 2 * tokens * N * C
    with FlopCounterMode(display=False) as counter:
        out = window_attention(qkv.requires_grad_(), table.requires_grad_(), impl="reference", **case.keywords())
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.backward(grad)
    assert counter.get_total_flops() == 5 * product


GOOD = {"num_heads": 2, "window_size": (2, 2, 2), "shift": (0, 1, 0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 4, 4, 48)}, r"qkv must be \(B, D, H, W, 3\*C\)"),
        ({"qkv": torch.zeros(1, 2, 4, 4, 50)}, "multiple of 3"),
        ({"qkv": torch.zeros(1, 2, 5, 4, 48)}, "H = 5 is no multiple of the window's 2"),
        ({"num_heads": 0}, "num_heads must be above 0"),
        ({"window_size": (2, 2)}, "window_size must be three numbers"),
        ({"window_size": (2, 0, 2)}, "window_size must be above 0"),
        ({"shift": (0, 2, 0)}, r"shift must lie in 0..window - 1"),
        ({"shift": (0, -1, 0)}, r"shift must lie in 0..window - 1"),
        ({"table_window": (1, 2, 2)}, "table_window must be at least the window"),
        ({"bias_table": torch.zeros(26, 2)}, r"bias_table must be \(27, 2\)"),
        ({"bias_table": torch.zeros(27, 2, dtype=torch.float16)}, "bias_table must be torch.float32"),
        ({"bias_table": torch.zeros(27, 2, device="meta")}, "qkv on cpu, bias_table on meta"),
        ({"qkv": torch.zeros(1, 2, 4, 4, 48, dtype=torch.int64)}, "takes float32, bfloat16, float16 and float64"),
        ({"impl": "fast"}, "impl must be auto, triton, native, reference; got 'fast'"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"qkv": torch.zeros(1, 2, 4, 4, 48), "bias_table": torch.zeros(27, 2), **GOOD, **change}
    with pytest.raises(ValueError, match=message):
        window_attention(arguments.pop("qkv"), arguments.pop("bias_table"), **arguments)
