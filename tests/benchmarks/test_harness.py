"""The benchmarks' own promises: nothing wrong is timed, rows are kept and complete, work is counted right."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bevt_kernels import baselines
from bevt_kernels.testing import ArgmaxCase, LossCase, WindowCase
from bevt_kernels.window_attention import reference

from benchmarks import gpu, memory, problems, registry, rows, run, timing, verify
from benchmarks.registry import OPS, Case, Entry, HeadCase, Op, PretrainCase, StepCase

SMALL = WindowCase(1, (2, 6, 6), (2, 3, 3), (0, 1, 1), heads=2, head_dim=16)
CASES: dict[str, Case] = {
    "window_attention": SMALL,
    "masked_linear_cross_entropy": LossCase(rows=40, channels=16, classes=61, slots=37, used=20),
    "linear_argmax": ArgmaxCase(rows=50, channels=16, classes=61),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops with one small case each, tests that are green, quick rivals, no memory processes."""
    for op, case in CASES.items():
        monkeypatch.setitem(OPS, op, Op({"small": Entry("cpu", case, {"cpu": 2})}, ("none",)))
    monkeypatch.setattr(verify, "green", lambda *_: "tests: green")
    monkeypatch.setattr(memory, "peaks", lambda *_: memory.Peaks(2**20, 2**21, 2**19))
    for rivals in (baselines.WINDOW_ATTENTION, baselines.MASKED_LINEAR_CROSS_ENTROPY, baselines.LINEAR_ARGMAX):
        monkeypatch.delitem(rivals, "eager compiled")  # takes 15 s of g++
    monkeypatch.setattr(run, "SECONDS", {"cpu": 0.0})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def command(out: Path, *more: str, op: str = "window_attention") -> int:
    return run.main([op, "--device", "cpu", "--impl", "reference", "--out", str(out), *more])


def lines(out: Path) -> list[rows.Row]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_run_writes_complete_rows(small: None, out: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(out) == 0
    text = capsys.readouterr().out
    assert "flex cannot run: FlexAttention has no backward on the CPU" in text
    assert "within the error rule: reference, eager, sdpa" in text
    got = lines(out)
    both = {row["contestant"]: row for row in got if row["quantity"] == "forward+backward"}
    assert set(both) == {"reference", "eager", "sdpa"}
    assert {row["quantity"] for row in got} == set(registry.QUANTITIES)
    row = both["reference"]
    assert set(row["speedup"]) == {"eager", "sdpa"}
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert (row["peak_mib"], row["scratch_mib"], row["rounds"], row["problem"]["batch"]) == (2, 1.5, 5, 2)
    assert row["flop"] == 7 * 2 * (2 * 72) * 18 * 32  # seven products of 2 * tokens * N * C
    assert row["percent_of_limit"] is None  # nobody has named this CPU's limits
    assert both["eager"]["surcharge_over_frozen"] is None
    assert row["surcharge_over_frozen"] > -1
    for name in ("commit", "dirty", "tree", "date", "machine", "versions"):
        assert name in row
    assert not re.search(r'"/|' + re.escape(os.uname().nodename), out.read_text())


def test_the_loss_has_rows_of_the_whole_step_and_of_what_rivals_lack(
    small: None, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command(out, op="masked_linear_cross_entropy") == 0
    text = capsys.readouterr().out
    assert "torch linear_cross_entropy gives no accuracy" in text
    assert "liger cannot run: liger_kernel is not installed: pip install liger-kernel" in text
    got = {row["contestant"]: row for row in lines(out)}
    assert {row["quantity"] for row in got.values()} == {"forward+backward"}
    assert (got["eager"]["lacks"], got["torch linear_cross_entropy"]["lacks"]) == (None, "accuracy")
    assert got["reference"]["flop"] == 3 * 2 * (2 * 20) * 16 * 61  # three products over the used slots of two clips
    assert set(got["reference"]["speedup"]) == {"recompute", "eager", "torch linear_cross_entropy"}


def test_an_op_without_gradients_has_rows_of_its_forward(small: None, out: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(out, op="linear_argmax") == 0
    assert "eager half cannot run: is eager itself in torch.float32" in capsys.readouterr().out
    got = {row["contestant"]: row for row in lines(out)}
    assert set(got) == {"reference", "eager"}
    row = got["reference"]
    assert (row["quantity"], row["flop"]) == ("forward", 2 * (2 * 50) * 16 * 61)
    assert (row["peak_mib"], row["scratch_mib"]) == (1, 0.5)


def test_a_wrong_implementation_stops_the_run(
    small: None, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = reference.table_gradient
    monkeypatch.setattr(reference, "table_gradient", lambda *args: right(*args) * 1.001)
    assert command(out) == 1
    printed = capsys.readouterr()
    assert "reference is wrong, so nothing is timed: grad bias_table: mean error" in printed.err
    assert "ms" not in printed.out
    assert not out.exists()


def test_the_frozen_step_is_verified_too() -> None:
    problem = problems.WindowAttention(SMALL, "cpu")
    ours = problem.contestants["reference"]

    def wrong_when_frozen(leaves: problems.Leaves) -> problems.Leaves:
        return {"out": ours.forward(leaves)["out"] * (1 if leaves["bias_table"].requires_grad else 1.01)}

    problem.contestants["reference"] = replace(ours, forward=wrong_when_frozen)
    with pytest.raises(
        verify.GateClosed, match="reference is wrong, so nothing is timed: out, frozen table: mean error"
    ):
        verify.contestants(problem, ["reference"])


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("masked_linear_cross_entropy", {"accuracy": lambda x: x + 1 / 20}, r"accuracy: \d+ of 20 slots, expected"),
        ("masked_linear_cross_entropy", {"loss": lambda x: x * 1.001}, "loss: mean error"),
        ("linear_argmax", {"codes": lambda x: (x + 1) % 61}, r"codes: 50 of rows 0\.\.49 are not the largest logit"),
    ],
)
def test_counts_are_judged_exactly(op: str, change: dict, message: str) -> None:
    problem = problems.KINDS[op](CASES[op], "cpu")
    ours = problem.contestants["reference"]

    def wrong(leaves: problems.Leaves) -> problems.Leaves:
        outputs = ours.forward(leaves)
        return outputs | {name: function(outputs[name]) for name, function in change.items()}

    problem.contestants["reference"] = replace(ours, forward=wrong)
    with pytest.raises(verify.GateClosed, match=f"reference is wrong, so nothing is timed: {message}"):
        verify.contestants(problem, ["reference"])


def test_a_wrong_or_broken_rival_is_not_timed(
    small: None, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(qkv: torch.Tensor, table: torch.Tensor, case: WindowCase) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    def wrong(qkv: torch.Tensor, table: torch.Tensor, case: WindowCase) -> torch.Tensor:
        return baselines.WINDOW_ATTENTION["eager"].function(qkv, table, replace(case, shift=(0, 0, 0)))

    for name, function in (("sdpa", broken), ("wrong", wrong)):
        monkeypatch.setitem(baselines.WINDOW_ATTENTION, name, baselines.Baseline(function, lambda spec: []))
    assert command(out) == 0
    text = capsys.readouterr().out
    assert "sdpa is not timed: RuntimeError: no kernel image" in text
    assert "wrong is not timed: AssertionError: out: mean error" in text
    assert {row["contestant"] for row in lines(out)} == {"reference", "eager"}


def test_red_tests_stop_the_run(
    small: None, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def red(*_: object) -> str:
        raise verify.GateClosed("tests/kernels/test_window_attention.py is not green, so nothing is timed")

    monkeypatch.setattr(verify, "green", red)
    assert command(out) == 1
    assert "is not green" in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one test, `tests/kernels/test_toy.py`."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "tests/kernels").mkdir(parents=True)
    (tmp_path / "tests/conftest.py").write_text("")
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    monkeypatch.setattr(verify, "STAMPS", tmp_path / "build")
    return tmp_path / "tests/kernels/test_toy.py"


def test_green_tests_are_remembered_until_something_changes(tree: Path) -> None:
    pattern = ["tests/kernels/test_t*.py"]
    tree.write_text("def test(): pass")
    assert re.search(r"green on cpu \(\d+ s\)", verify.green(pattern, "cpu", 60))
    assert "(remembered)" in verify.green(pattern, "cpu", 60)
    tree.write_text("def test(): assert 1 == 2")
    with pytest.raises(
        verify.GateClosed, match=r"test_toy.py is not green, so nothing is timed:\n[\s\S]*assert 1 == 2"
    ):
        verify.green(pattern, "cpu", 60)


def test_a_green_folder_holds_green_files(tree: Path) -> None:
    tree.write_text("def test(): pass")
    assert "(remembered)" not in verify.green(["tests/kernels"], "cpu", 60)
    assert "(remembered)" in verify.green(["tests/kernels/test_t*.py"], "cpu", 60)


def test_of_several_files_only_those_run_that_are_not_known_to_be_green(tree: Path) -> None:
    tree.write_text("def test(): pass")
    other = tree.with_name("test_other.py")
    other.write_text("def test(): pass")
    both = ["tests/kernels/test_toy.py", "tests/kernels/test_other.py"]
    verify.green(both[:1], "cpu", 60)
    assert verify.green(both, "cpu", 60).startswith("tests: tests/kernels/test_other.py green")
    assert "(remembered)" in verify.green(both, "cpu", 60)


def test_tests_that_are_missing_or_too_slow_close_the_gate(tree: Path) -> None:
    with pytest.raises(verify.GateClosed, match="no tests match tests/none"):
        verify.green(["tests/none*.py"], "cpu", 60)
    tree.write_text("import time\ndef test(): time.sleep(60)")
    with pytest.raises(verify.GateClosed, match="took over 2 s"):
        verify.green(["tests/kernels/test_toy.py"], "cpu", 2)


def test_new_rows_replace_those_of_the_same_measurement(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(**change: object) -> rows.Row:
        same = dict.fromkeys(rows.KEY, "same")
        return {**same, "p50_ms": 1.0, **change}

    copy = out.parent / "copy"
    copy.mkdir()
    monkeypatch.setenv("OUT", str(copy))
    rows.save(out, [row(), row(commit="older"), row(machine={"gpu": "other"})])
    rows.save(out, [row(p50_ms=2.0), row(quantity="forward")])
    got = lines(out)
    assert [r["commit"] for r in got] == ["older", "same", "same", "same"]
    assert [r["p50_ms"] for r in got] == [1.0, 1.0, 2.0, 1.0]
    assert (copy / out.name).read_text() == out.read_text()


def test_the_table_leaves_out_what_was_not_measured() -> None:
    empty = dict.fromkeys(rows.COLUMNS)
    text = rows.table(
        [
            {**empty, "quantity": "forward", "contestant": "a", "p50_ms": 1.25, "speedup": {"b": 2.0}}
            | {"surcharge_over_frozen": 0.05},
            {**empty, "quantity": "forward", "contestant": "b", "p50_ms": 2.5, "speedup": {}}
            | {"surcharge_over_frozen": None},
        ]
    )
    cells = [line.split() for line in text.splitlines()]
    assert cells[0][-2:] == ["x", "b"]
    assert cells[1] == ["forward", "a", "-", "1.25", "-", "-", "-", "-", "-", "-", "2"]
    assert cells[2][-1] == "-"
    assert text.endswith("a: the bias table's gradient adds 5.0 %")


def test_steps_take_turns() -> None:
    calls = []

    def step(name: str) -> timing.Step:
        def call(mark: timing.Mark) -> None:
            calls.append(name)
            mark()

        return call

    times = timing.interleaved({name: step(name) for name in "abc"}, "cpu", seconds=0.0, least=3, warm=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(0 <= forward <= total for series in times.values() for forward, total in series)


@pytest.fixture(params=[(op, case) for op in OPS for case in OPS[op].cases], ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    op, name = request.param
    return OPS[op].cases[name].case


def test_registered_cases_are_possible(case: Case) -> None:
    if isinstance(case, StepCase | PretrainCase):
        assert case.side % 32 == 0
    elif isinstance(case, LossCase):
        assert case.used <= case.slots <= case.rows
    elif isinstance(case, WindowCase):
        assert all(size % w == 0 for size, w in zip(case.grid, case.window))
        assert all(t >= w > s for t, w, s in zip(case.table, case.window, case.shift))
        # The model clips the shift where the map is no longer than the window.
        assert not any(s for size, w, s in zip(case.grid, case.window, case.shift) if size <= w)


def test_the_case_of_a_clip_grows_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LossCase(rows=12, channels=4, classes=5, slots=9, used=7)
    monkeypatch.setitem(OPS, "linear_argmax", Op({"a": Entry("a", ArgmaxCase(12, 4, 5), {"cpu": 3})}, ()))
    monkeypatch.setitem(OPS, "masked_linear_cross_entropy", Op({"a": Entry("a", case, {"cpu": 3})}, ()))
    assert problems.build("linear_argmax", "a", "cpu").case == ArgmaxCase(36, 4, 5)
    assert problems.build("masked_linear_cross_entropy", "a", "cpu").case == LossCase(36, 4, 5, 27, 21)


def test_every_gpu_case_is_in_the_gpu_run() -> None:
    wanted = {(op, entry.group) for op in OPS for entry in OPS[op].cases.values() if "cuda" in entry.batch}
    assert set(registry.GPU_ORDER) == wanted


def test_counted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.DTYPES, "cpu", torch.bfloat16)
    stage_1 = problems.WindowAttention(WindowCase(1, (8, 56, 56), (8, 7, 7), (0, 3, 3), heads=4, head_dim=32), "cpu")
    work = stage_1.work()
    assert work["forward"].flop == 4 * 64 * 4 * 392**2 * 32  # two products of 64 windows, 4 heads
    assert work["backward"].flop == work["forward"].flop * 5 // 2
    kept = (reference.border_bias((8, 56, 56), (8, 7, 7), (0, 3, 3), torch.empty(0)) == 0).double().mean()
    assert math.isclose(work["forward"].flop_unmasked, work["forward"].flop * float(kept), rel_tol=1e-6)
    tokens, table = 8 * 56 * 56, 4 * 15 * 13 * 13 * 4
    assert work["forward"].bytes == tokens * (4 * 128 * 2 + 4 * 4) + table
    assert work["backward"].bytes == tokens * (8 * 128 * 2 + 4 * 4) + 2 * table


def test_work_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.DTYPES, "cpu", torch.bfloat16)
    work = problems.MaskedLinearCrossEntropy(LossCase(50, 16, 61, 37, 20), "cpu").work()["forward+backward"]
    assert work.flop == work.flop_unmasked == 6 * 20 * 16 * 61
    read, written = (20 + 61) * 16 + 61, (50 + 61) * 16 + 61  # of hidden the used rows are read, all gradients written
    assert work.bytes == 2 * (read + written) + 37 * 2 * 8


@pytest.mark.parametrize(
    ("op", "case"),
    [*CASES.items(), ("masked_head", HeadCase(1, "tiny", 30)), ("video_swin_step", StepCase(1, "tiny", 4, 64))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contestants_are_those_whose_names_the_class_gives(op: str, case: Case) -> None:
    problem = problems.KINDS[op](case, "cpu")
    assert set(problem.names) == set(problem.contestants)


def test_masked_head_equals_the_dense_form() -> None:
    problem = problems.MaskedHead(HeadCase(1, "tiny", 30), "cpu")
    good, wrong = verify.contestants(problem, ["reference", "dense"])
    assert (good, wrong) == (["reference", "dense"], {})
    results = problem.step("reference")
    assert {"loss", "accuracy", "grad x3", "grad x4", "grad head.bias", "grad norm.weight"} <= set(results)
    masked, channels = int(problem.mask.sum()), 768
    per_frame = channels * (channels + 30)  # the step to two frames, and the head
    products = masked * (channels * (channels + 3 * channels // 2) + 2 * per_frame)
    assert problem.work()["forward+backward"].flop == 6 * products


def test_micro_batch_is_the_same_before_and_after() -> None:
    problem = problems.PretrainStep(PretrainCase(1, "tiny", 1, frames=2, side=96, tokenizer_width=8), "cpu")
    assert set(problem.names) == set(problem.contestants)
    oracle, eager = (problem.judged(results) for results in problem.truth())
    for name in problem.names:
        problem.check(problem.judged(problem.answer(name)), oracle, eager, f" {name}", 2)
    assert problem.work()["forward+backward"].flop > 0
    right = problem.tokenizer.encode
    problem.tokenizer.encode = lambda pixels: (right(pixels) + 1) % 8192  # type: ignore[method-assign]
    codes = {"logits of the codes": problem._logits_of(problem._inputs())}
    with pytest.raises(AssertionError, match="logits of the codes: mean error"):
        problem.check(codes, oracle, eager, "", 2)


def test_encoder_step_is_the_same_by_eager_attention() -> None:
    problem = problems.VideoSwinStep(StepCase(1, "tiny", frames=4, side=64), "cpu")
    good, wrong = verify.contestants(problem, ["reference", "eager"])
    assert (good, wrong) == (["reference", "eager"], {})
    assert {"out", "attn.relative_position_bias_table", "qkv.weight"} <= set(problem.judged(problem.step("eager")))
    assert problem.work()["forward"].flop > 0


@pytest.mark.skipif(not memory.RESET.exists(), reason="peak memory on a CPU is read from Linux' /proc")
def test_peak_memory_sees_the_scores_of_the_eager_form() -> None:
    problem = problems.build("window_attention", "cpu target", "cpu")
    peaks = memory.peaks(problem, "window_attention", "cpu target", "eager", 1)
    assert peaks is not None
    scores = 16 * 4 * 392**2 * 4
    assert 2 * scores < peaks.forward < peaks.both < 8 * scores
    qkv, table = (x.nbytes for x in problem.leaves.values())
    assert peaks.results == qkv + qkv // 3 + table


def test_a_gpu_machine_needs_few_packages() -> None:
    """`make bench-gpu` says which are enough; the micro-batch alone needs safetensors too."""
    others = ["safetensors", "tyro", "rich", "PIL", "av", "matplotlib", "tensorboard"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import benchmarks.gpu, benchmarks.run"
    path = os.pathsep.join([str(verify.ROOT), str(verify.ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert run.main(["window_attention", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("needs a CUDA GPU: torch sees none") == 2


def test_what_rests_on_a_red_test_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def green(patterns: list[str], *_: object) -> str:
        if patterns == [registry.LOSS_TESTS]:
            raise verify.GateClosed("the loss is red")
        return "tests: green"

    parts = []

    def run_part(part: list[str], **_: object) -> subprocess.CompletedProcess:
        parts.append(part[3])
        return subprocess.CompletedProcess(part, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verify, "green", green)
    monkeypatch.setattr(subprocess, "run", run_part)
    assert gpu.main() == 1
    assert set(parts) == {"window_attention", "video_swin_step", "linear_argmax"}
    printed = capsys.readouterr()
    assert "the loss is red" in printed.err
    assert "tests are red, not measured: masked_linear_cross_entropy, swin-b" in printed.out


def test_unknown_cases_are_named(out: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(out, "--case", "cpu tagret") == 2
    assert "no case 'cpu tagret'; there are: 'cpu target', " in capsys.readouterr().err
