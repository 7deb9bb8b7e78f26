"""window_attention: every implementation against eager PyTorch, the registered op, and what surrounds it."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from bevt_kernels import window_attention
from bevt_kernels.testing import (
    WindowCase,
    assert_within_budget,
    eager_window_attention,
    random_window_case,
    relative_index,
)
from bevt_kernels.window_attention import autograd, boxes, reference
from targets import NATIVE, REFERENCE, TARGETS, TRITON, Target, each_dtype
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


@pytest.fixture(params=[t.param() for t in TARGETS])
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


def run(function, qkv, table, grad):
    """Output and gradients of `function(qkv, table)`, by name."""
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = function(qkv, table)
    grads = torch.autograd.grad(out, (qkv, table), grad.to(out.dtype))
    return dict(zip(("out", "grad qkv", "grad bias_table"), (out.detach(), *grads)))


def attention(case: WindowCase, target: Target):
    """The public function of (qkv, bias_table)."""
    return lambda qkv, table: window_attention(qkv, table, impl=target.impl, **case.keywords())


def arguments(case: WindowCase, impl: str) -> tuple:
    return case.heads, list(case.window), list(case.shift), list(case.table), case.scale, impl


def assert_case_within_budget(case: WindowCase, target: Target, dtype: torch.dtype, seed: int) -> None:
    """Of one draw, or else of eight together: a largest error is a matter of luck, eager's too (1 case in 100)."""
    try:
        assert_draws_within_budget(case, target, dtype, seed)
    except AssertionError:
        assert_draws_within_budget(case, target, dtype, *range(seed, seed + 8000, 1000))


def assert_draws_within_budget(case: WindowCase, target: Target, dtype: torch.dtype, *seeds: int) -> None:
    """Output, gradients and lse, all draws together. Eager has no lse: there the reference in float32 stands for it."""
    draws = []
    for seed in seeds:
        inputs = case.inputs(dtype, seed, target.device)
        qkv, table, _ = inputs
        found: dict[str, torch.Tensor] = {}

        def forward(qkv, table, found=found):
            out, found["lse"] = OPS.window_attention_forward(qkv, table, *arguments(case, target.impl))
            return out

        got = run(forward, *inputs) | found
        eager = run(lambda q, t: eager_window_attention(q, t, case), *inputs)
        oracle = run(lambda q, t: eager_window_attention(q, t, case), *(x.double() for x in inputs))
        eager["lse"] = OPS.window_attention_forward(qkv.float(), table, *arguments(case, "reference"))[1]
        oracle["lse"] = OPS.window_attention_forward(qkv.double(), table.double(), *arguments(case, "reference"))[1]
        draws.append((got, eager, oracle))
    for name in draws[0][0]:
        assert_within_budget(*(torch.stack([x[name] for x in each]) for each in zip(*draws)), f"{name} of {case}")


@each_dtype
def test_error_is_within_budget(case: WindowCase, target: Target, dtype: torch.dtype) -> None:
    assert_case_within_budget(case, target, dtype, 1)


@pytest.mark.parametrize(
    ("target", "dtype"), [t.param(dtype) for t in TARGETS if t != REFERENCE for dtype in t.dtypes[:2]]
)
@pytest.mark.parametrize("seed", range(60 if torch.cuda.is_available() else 300))  # a GPU's are compiled, 3 s a kernel
def test_error_is_within_budget_on_random_cases(seed: int, target: Target, dtype: torch.dtype) -> None:
    case = random_window_case(seed, windows=2 if target.interpreted else 64)
    assert_case_within_budget(case, target, dtype, seed)


def test_lse_is_the_logarithm_of_the_sum_of_exponentials(target: Target) -> None:
    case = WindowCase(2, (3, 4, 5), (3, 4, 5), table_window=(3, 5, 6), heads=2, head_dim=8)
    qkv, table, _ = case.inputs(target.dtypes[0], device=target.device)
    q, k, _ = qkv.double().view(2, 60, 3, 2, 8).permute(2, 0, 3, 1, 4)
    bias = table.double()[relative_index(case.window, case.table)].permute(2, 0, 1)
    oracle = (case.scale * q @ k.mT + bias).logsumexp(-1).div(torch.tensor(2.0).log()).view(2, 2, 3, 4, 5)
    got = OPS.window_attention_forward(qkv, table, *arguments(case, target.impl))[1]
    assert_within_budget(got, oracle.float(), oracle, "lse")


def test_backward_equals_autograd_of_the_specification(case: WindowCase) -> None:
    inputs = case.inputs(torch.float64, seed=2)
    got = run(attention(case, REFERENCE), *inputs)
    expected = run(lambda q, t: reference.window_attention(q, t, *arguments(case, "")[:-1]), *inputs)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [SMALL, WindowCase(1, (1, 3, 3), (1, 3, 3), heads=1, head_dim=2)])
def test_gradcheck(case: WindowCase) -> None:
    qkv, table, _ = case.inputs(torch.float64, seed=3)
    assert torch.autograd.gradcheck(attention(case, REFERENCE), (qkv.requires_grad_(), table.requires_grad_()))


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(target: Target, batch: int) -> None:
    case = WindowCase(batch, (1, 3, 4), (1, 3, 2), (0, 0, 1), heads=2, head_dim=16)
    qkv, table, grad = case.inputs(target.dtype, device=target.device)
    inputs = (qkv.requires_grad_(), table.requires_grad_(), *arguments(case, target.impl))
    torch.library.opcheck(OPS.window_attention_forward.default, inputs)
    with torch.no_grad():
        out, lse = OPS.window_attention_forward(*inputs)
    *static, impl = arguments(case, target.impl)
    for train_table in (True, False):
        tensors = (grad, qkv.detach(), table.detach(), out, lse)
        torch.library.opcheck(OPS.window_attention_backward.default, (*tensors, *static, train_table, impl))


@pytest.mark.parametrize("side", [3, 9])  # native takes boxes of up to 64 tokens another way
def test_a_frozen_table_gets_no_gradient_and_changes_no_other(target: Target, side: int) -> None:
    case = WindowCase(1, (1, side, 2 * side), (1, side, side), (0, 1, 0), heads=2, head_dim=16)
    qkv, table, grad = case.inputs(target.dtype, device=target.device)
    expected = run(attention(case, target), qkv, table, grad)["grad qkv"]
    out = attention(case, target)(qkv.requires_grad_(), table)
    with mock.patch.object(autograd.ops, "backward", wraps=autograd.ops.backward) as backward:
        out.backward(grad)
    assert backward.call_args.args[-2] is False
    assert torch.equal(qkv.grad, expected)
    assert table.grad is None


def test_bias_rows_follow_true_offsets() -> None:
    window, table = (2, 3, 4), (3, 3, 5)
    rows = torch.arange(5 * 5 * 9, dtype=torch.float64)[:, None]
    assert torch.equal(reference.dense_bias(rows, window, table)[0].long(), relative_index(window, table))


def test_equals_sdpa_without_bias_and_shift(target: Target) -> None:
    case = WindowCase(2, (4, 6, 6), (2, 3, 3), heads=2, head_dim=16)
    qkv, table, _ = case.inputs(target.dtype, device=target.device)
    got = attention(case, target)(qkv, table.zero_())
    for d, h, w in itertools.product(range(0, 4, 2), range(0, 6, 3), range(0, 6, 3)):
        part = (slice(None), slice(d, d + 2), slice(h, h + 3), slice(w, w + 3))
        q, k, v = qkv[part].reshape(2, 18, 3, 2, 16).permute(2, 0, 3, 1, 4)
        expected, oracle = (
            F.scaled_dot_product_attention(*x).transpose(1, 2).reshape(2, 2, 3, 3, 32)
            for x in ((q, k, v), (q.double(), k.double(), v.double()))
        )
        assert_within_budget(got[part], expected, oracle, f"window at {d, h, w}")


def test_rolling_by_a_window_rolls_the_output(target: Target) -> None:
    case = WindowCase(1, (4, 9, 6), (2, 3, 3), heads=2, head_dim=16)
    qkv, table, _ = case.inputs(target.dtype, device=target.device)
    by, axes, function = (2, 3, 3), (1, 2, 3), attention(case, target)
    assert torch.equal(function(qkv.roll(by, axes), table), function(qkv, table).roll(by, axes))


def test_border_excludes_rather_than_discourages(target: Target) -> None:
    case = WindowCase(1, (1, 1, 8), (1, 1, 4), (0, 0, 2), heads=1, head_dim=16)
    qkv, table, _ = case.inputs(target.dtype, device=target.device)
    function = attention(case, target)
    before = function(qkv, table)
    qkv[..., :2, 16:32] = 1e4  # keys of the two first tokens, which share a rolled window with the two last
    after = function(qkv, table)
    assert torch.equal(before[..., 2:, :], after[..., 2:, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scores_far_above_a_querys_own_do_not_overflow(target: Target, dtype: torch.dtype) -> None:
    case = WindowCase(1, (2, 6, 3), (2, 3, 3), (0, 1, 0), heads=2, head_dim=16)
    qkv, table, _ = case.inputs(dtype, 5, target.device)
    qkv[..., :64] *= 12 if dtype == torch.float32 else 8
    q, k = qkv.double()[..., :64].view(36, 2, 2, 16).permute(1, 2, 0, 3)
    scores = case.scale * q @ k.mT
    assert (scores - scores.diagonal(dim1=-2, dim2=-1)[..., None]).max() > 96 * math.log(2)
    eager, oracle = (eager_window_attention(q, t, case) for q, t in ((qkv, table), (qkv.double(), table.double())))
    assert_within_budget(attention(case, target)(qkv, table), eager, oracle, "out")


@pytest.mark.parametrize("what", ["far apart", "a token masked from itself"])
def test_extreme_scores_stay_finite(target: Target, what: str) -> None:
    case = WindowCase(1, (2, 6, 3), (2, 3, 3), (0, 1, 0), heads=2, head_dim=16)
    qkv, table, _ = case.inputs(torch.float32, device=target.device)
    if what == "far apart":
        table *= 1e10
    else:
        table[len(table) // 2] = -math.inf
    eager, oracle = (eager_window_attention(q, t, case) for q, t in ((qkv, table), (qkv.double(), table.double())))
    has_partner = oracle.isfinite()  # the shift leaves some tokens alone with themselves
    assert has_partner.any()
    got = attention(case, target)(qkv, table)
    assert_within_budget(got[has_partner], eager[has_partner], oracle[has_partner], "out")


@pytest.mark.parametrize("target", [REFERENCE.param(), NATIVE.param()])
def test_the_gradient_of_v_survives_far_off_scores(target: Target) -> None:
    case = WindowCase(8, (2, 6, 3), (2, 3, 3), (0, 1, 0), heads=2, head_dim=16)
    qkv, table, grad = case.inputs(torch.float32, device=target.device)
    qkv[..., :64] *= 12  # lse is rounded by 2e-5 of every p, unless p is divided by its sum
    got = run(attention(case, target), qkv, table, grad)["grad qkv"]
    eager, oracle = (
        run(lambda q, t: eager_window_attention(q, t, case), *inputs)["grad qkv"]
        for inputs in ((qkv, table, grad), (qkv.double(), table.double(), grad.double()))
    )
    assert_within_budget(got[..., 64:], eager[..., 64:], oracle[..., 64:], "grad v")


def test_unused_table_rows_get_zero_gradient(target: Target) -> None:
    case = CASES["1x7x7 on the 8x7x7 table"]
    grad = run(attention(case, target), *case.inputs(target.dtype, device=target.device))["grad bias_table"]
    used = torch.zeros(len(grad), dtype=torch.bool, device=target.device)
    used[relative_index(case.window, case.table).flatten()] = True
    assert used.nonzero()[[0, -1], 0].tolist() == [7 * 169, 8 * 169 - 1]  # the zero-distance rows of 15 * 169
    assert not grad[~used].any()
    assert grad[used].all()


def test_backward_is_deterministic(target: Target) -> None:
    case = CASES["3x5x2 every axis shifted" if target.interpreted else "8x7x7 shifted"]
    inputs = case.inputs(target.dtype, device=target.device)
    first = run(attention(case, target), *inputs)
    for _ in range(1 if target.interpreted else 100 if target.device == "cuda" else 4):
        again = run(attention(case, target), *inputs)
        for name in first:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("target", [NATIVE.param()])
def test_bits_do_not_depend_on_threads(target: Target, set_threads: Callable[[int], None]) -> None:
    case = WindowCase(3, (4, 28, 28), (2, 4, 4), (1, 2, 2), heads=4, head_dim=8)  # 1152 boxes: several to a table sum
    inputs, results = case.inputs(torch.float32), []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(run(attention(case, target), *inputs))
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@pytest.mark.parametrize("target", [NATIVE.param()])
@pytest.mark.parametrize("level", ["DEFAULT", "AVX2", "AVX512"])
def test_error_is_within_budget_on_lesser_instruction_sets(target: Target, level: str) -> None:
    levels = ["NO AVX", "DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in levels or levels.index(level) > levels.index(here):
        pytest.skip(f"{level} needs a processor that has it; this one has {here}")
    test = [__file__, "-k", "test_error_is_within_budget and native and not random and not instruction"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *test],
        env=os.environ | {"ATEN_CPU_CAPABILITY": level.lower()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{len(CASES) * len(target.dtypes)} passed" in done.stdout


def test_strided_input_equals_contiguous(target: Target) -> None:
    case = CASES["4x4x4"]
    qkv, table, grad = case.inputs(target.dtype, device=target.device)
    strided, strided_table = qkv.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0), table.t().contiguous().t()
    assert not strided.is_contiguous()
    assert not strided_table.is_contiguous()
    function = attention(case, target)
    expected, got = (
        run(function, qkv, table, grad),
        run(function, strided, strided_table, grad.transpose(1, 2).contiguous().transpose(1, 2)),
    )
    for name in got:
        assert torch.equal(got[name], expected[name]), name


def test_empty_batch(target: Target) -> None:
    case = WindowCase(0, (2, 4, 4), (2, 2, 2), (0, 1, 1))
    got = run(attention(case, target), *case.inputs(target.dtype, device=target.device))
    assert got["out"].shape == (0, 2, 4, 4, 16)
    assert not got["grad bias_table"].any()


def test_scale_is_applied_to_the_scores(target: Target) -> None:
    case = WindowCase(1, (2, 4, 4), (2, 2, 2), head_dim=16)
    qkv, table, _ = case.inputs(target.dtype, device=target.device)
    scaled = qkv.clone()
    scaled[..., :32] *= 2  # a power of two: the same bits
    got = window_attention(qkv, table, scale=2 * case.scale, impl=target.impl, **case.keywords())
    assert torch.equal(got, attention(case, target)(scaled, table))


def test_autocast_does_not_reach_inside(target: Target) -> None:
    case = WindowCase(1, (2, 4, 4), (2, 2, 2), (0, 1, 1), head_dim=16)
    inputs = case.inputs(target.dtype, device=target.device)
    plain = run(attention(case, target), *inputs)
    with torch.autocast(target.device, torch.bfloat16):
        inside = run(attention(case, target), *inputs)
    for name in plain:
        assert torch.equal(plain[name], inside[name]), name


def test_second_derivative_is_refused(target: Target) -> None:
    case = WindowCase(1, (2, 2, 2), (2, 2, 2), head_dim=16)
    qkv, table, grad = case.inputs(target.dtype, device=target.device)
    out = attention(case, target)(qkv.requires_grad_(), table)
    with pytest.raises(NotImplementedError, match="window_attention has no second derivative"):
        torch.autograd.grad(out, qkv, grad, create_graph=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_and_batches_do_not_recompile(target: Target, backend: str) -> None:
    case = WindowCase(2, (1, 2, 4), (1, 2, 2), (0, 0, 1), head_dim=16)
    torch._dynamo.reset()
    compiles = 0

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    function = lambda q, t: attention(case, target)(q, t) * 2  # noqa: E731
    compiled = torch.compile(function, backend=count, fullgraph=True)
    for batch in (2, 3, 5, 64) if backend == "aot_eager" and not target.interpreted else (2, 3):
        other = WindowCase(batch, case.grid, case.window, case.shift, head_dim=case.head_dim)
        qkv, table, grad = other.inputs(target.dtype, batch, target.device)
        torch._dynamo.mark_dynamic(qkv, 0)
        leaf, leaf_table = qkv.requires_grad_(), table.requires_grad_()
        out = compiled(leaf, leaf_table)
        got = (out.detach(), *torch.autograd.grad(out, (leaf, leaf_table), grad))
        expected = run(function, qkv, table, grad)
        for value, (name, wanted) in zip(got, expected.items()):
            assert torch.equal(value, wanted), f"batch {batch}: {name}"
    assert compiles == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [TRITON.param()])
def test_cuda_graph_replay_equals_eager(target: Target, dtype: torch.dtype) -> None:
    case = CASES["8x7x7 shifted"]
    inputs = case.inputs(dtype, 1, target.device)
    qkv, table, grad = inputs

    def step() -> tuple[torch.Tensor, ...]:
        leaves = qkv.detach().requires_grad_(), table.detach().requires_grad_()
        out = attention(case, target)(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, and makes the index arrays
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (2, 3):
        for tensor, value in zip(inputs, case.inputs(dtype, seed, target.device)):
            tensor.copy_(value)
        graph.replay()
        for value, (name, wanted) in zip(captured, run(attention(case, target), *inputs).items()):
            assert torch.equal(value, wanted), f"seed {seed}: {name}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
@pytest.mark.parametrize("target", [TRITON.param()])
def test_compiled_into_cuda_graphs_equals_eager(target: Target) -> None:
    case = CASES["8x7x7 shifted"]
    torch._dynamo.reset()
    for made in (boxes.cut, boxes.groups, boxes.bias_sums):
        made.cache_clear()  # so that the index arrays are made inside
    function = lambda q, t: attention(case, target)(q, t) * 2  # noqa: E731
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # the second call captures, the third replays
        inputs = case.inputs(torch.bfloat16, seed, target.device)
        torch.compiler.cudagraph_mark_step_begin()
        got, expected = run(compiled, *inputs), run(function, *inputs)
        for name in got:
            assert torch.equal(got[name], expected[name]), f"seed {seed}: {name}"


@pytest.mark.parametrize("target", [t.param() for t in (*TARGETS, Target("reference", device="meta"))])
def test_flop_counter(target: Target) -> None:
    case = WindowCase(2, (2, 4, 4), (2, 2, 4), heads=2, head_dim=16)
    qkv, table, grad = case.inputs(target.dtype, device=target.device)
    product = 2 * (2 * 2 * 4 * 4) * (2 * 2 * 4) * 32  # 2 * tokens * N * C
    with FlopCounterMode(display=False) as counter:
        out = attention(case, target)(qkv.requires_grad_(), table.requires_grad_())
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
        ({"qkv": [1.0]}, "qkv must be a tensor, got list"),
        ({"qkv": torch.zeros(1, 2, 4, 4, 48).to_sparse()}, "qkv must be dense, got layout torch.sparse_coo"),
        ({"num_heads": 2.0}, "num_heads must be a whole number, got 2.0"),
        ({"window_size": 2}, "window_size must be three numbers"),
        ({"window_size": (2, 2.5, 2)}, "window_size must be a whole number, got 2.5"),
        ({"scale": math.nan}, "scale must be a finite number, got nan"),
        ({"scale": torch.ones(())}, "scale must be a finite number, got tensor"),
        ({"impl": "fast"}, "impl must be auto, triton, native, reference; got 'fast'"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"qkv": torch.zeros(1, 2, 4, 4, 48), "bias_table": torch.zeros(27, 2), **GOOD, **change}
    with pytest.raises(ValueError, match=message):
        window_attention(arguments.pop("qkv"), arguments.pop("bias_table"), **arguments)
