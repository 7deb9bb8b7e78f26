"""The benchmarks' own promises: nothing wrong is timed, rows are kept and complete, work is counted right."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import synthetic
import torch
from bevt_kernels import baselines
from bevt_kernels.testing import ArgmaxCase, ConvCase, LinearCase, LossCase, WindowCase
from bevt_kernels.window_attention import reference

from benchmarks import limits, memory, problems, registry, rows, run, suite, timing, verify
from benchmarks.limits import Limits
from benchmarks.problems import Work, models
from benchmarks.registry import OPS, PARTS, Case, Entry, HeadCase, Op, Part, StepCase, TrainCase, VideoMAECase
from bevt import budget
from bevt.config import SIZES, DataConfig, ModelConfig, resized
from bevt.recipes.pretrain import joint_stage
from bevt.train import optim

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
    monkeypatch.setattr(memory, "peaks", lambda *args: dict.fromkeys(args[3], memory.Peaks(2**20, 2**21)))
    monkeypatch.setattr(limits, "measure", lambda *_: Limits(1e12, 1e11))
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
    got = [row for row in lines(out) if "absent" not in row]
    both = {row["contestant"]: row for row in got if row["quantity"] == "forward+backward"}
    assert set(both) == {"reference", "eager", "sdpa"}
    assert {row["quantity"] for row in got} == set(registry.QUANTITIES[:4])
    row = both["reference"]
    assert set(row["speedup"]) == {"eager", "sdpa"}
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert (row["peak_mib"], row["rounds"], row["problem"]["batch"]) == (2, 5, 2)
    assert row["flop"] == 6 * 2 * (2 * 72) * 18 * 32  # six products of 2 * tokens * N * C
    assert row["limits"] == {"flops": 1e12, "bandwidth": 1e11}
    least = max(row["flop_unmasked"] / 1e12, row["bytes"] / 1e11)
    assert row["percent_of_limit"] == pytest.approx(100 * 1e3 * least / row["p50_ms"], rel=1e-3)
    assert row["limit"] == ("memory" if row["bytes"] / 1e11 == least else "arithmetic")
    assert both["eager"]["surcharge_over_frozen"] is None
    assert row["surcharge_over_frozen"] > -1
    assert (row["ours"], both["eager"]["ours"]) == (True, False)
    for name in ("commit", "dirty", "tree", "date", "run", "machine", "versions", "clocks"):
        assert name in row
    absent = {row["contestant"]: row for row in lines(out) if "absent" in row}
    assert set(absent) == {"flex", "xformers"}
    assert "FlexAttention has no backward on the CPU" in absent["flex"]["absent"]
    assert absent["flex"]["p50_ms"] is None
    assert not re.search(r'"/|' + re.escape(os.uname().nodename), out.read_text())


def test_the_loss_has_rows_of_the_whole_step_and_of_what_rivals_lack(
    small: None, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command(out, op="masked_linear_cross_entropy") == 0
    text = capsys.readouterr().out
    assert "torch linear_cross_entropy gives no accuracy" in text
    assert "liger cannot run: liger_kernel is not installed: pip install liger-kernel" in text
    got = {row["contestant"]: row for row in lines(out) if "absent" not in row}
    assert {row["quantity"] for row in got.values()} == {"forward+backward"}
    assert (got["eager"]["lacks"], got["torch linear_cross_entropy"]["lacks"]) == (None, "accuracy")
    assert got["reference"]["flop"] == 3 * 2 * (2 * 20) * 16 * 61  # three products over the used slots of two clips
    assert set(got["reference"]["speedup"]) == {"ours, recomputing", "eager", "torch linear_cross_entropy"}


def test_an_op_without_gradients_has_rows_of_its_forward(small: None, out: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(out, op="linear_argmax") == 0
    assert "eager half cannot run: is eager itself in torch.float32" in capsys.readouterr().out
    got = {row["contestant"]: row for row in lines(out) if "absent" not in row}
    assert set(got) == {"reference", "eager"}
    row = got["reference"]
    assert (row["quantity"], row["flop"]) == ("forward", 2 * (2 * 50) * 16 * 61)
    assert row["peak_mib"] == 1


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
    assert {row["contestant"] for row in lines(out) if "absent" not in row} == {"reference", "eager"}


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
    assert len((copy / "rows.jsonl").read_text().splitlines()) == 5


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
    assert cells[1] == ["forward", "a", "-", "1.25", "-", "-", "-", "-", "-", "2"]
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
    if isinstance(case, StepCase | TrainCase | VideoMAECase):
        assert case.side % 32 == 0
    elif isinstance(case, LossCase):
        assert case.used <= case.slots <= case.rows
    elif isinstance(case, ArgmaxCase | LinearCase | ConvCase | HeadCase):
        assert all(value > 0 for value in asdict(case).values() if isinstance(value, int))
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


@pytest.mark.parametrize("where", PARTS)
def test_every_case_is_in_a_part(where: str) -> None:
    """Of the whole run of its device."""
    wanted = {(op, entry.group) for op in OPS for entry in OPS[op].cases.values() if where in entry.batch}
    assert {(part.op, part.group) for part in PARTS[where] if part.op in OPS} == wanted
    assert {part.op for part in PARTS[where]} - set(OPS) <= set(suite.COMMANDS)


def test_a_gpu_run_is_planned_for_ten_minutes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """By its own estimates every part begins, whatever a part may take beyond."""
    now = [0.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    by_name = {part.name: part.seconds for part in PARTS["cuda"]}
    monkeypatch.setattr(suite.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(suite, "_red_tests", lambda *_: pass_by(registry.TESTS["cuda"]) or set())
    monkeypatch.setattr(suite, "_limits", lambda _: [])
    monkeypatch.setattr(suite, "_needs", lambda _: ())
    monkeypatch.setattr(suite, "_command", lambda part, *_: [part.name])
    monkeypatch.setattr(suite, "_run", lambda words, _: pass_by(by_name[words[0]]) or "done")
    outcomes: list[tuple[Part, str]] = []
    assert suite.measure("cuda", PARTS["cuda"], True, suite.SECONDS["cuda"], outcomes) == 0
    assert len(outcomes) == len(PARTS["cuda"])
    assert not [outcome for _, outcome in outcomes if "not measured" in outcome]
    assert now[0] <= suite.SECONDS["cuda"] == 580


def test_counted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.DTYPES, "cpu", torch.bfloat16)
    stage_1 = problems.WindowAttention(WindowCase(1, (8, 56, 56), (8, 7, 7), (0, 3, 3), heads=4, head_dim=32), "cpu")
    work = stage_1.work()
    assert work["forward"].flop == 4 * 64 * 4 * 392**2 * 32  # two products of 64 windows, 4 heads
    assert work["backward"].flop == work["forward"].flop * 2
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


@pytest.mark.parametrize("kind", ["dalle", "vq"])
def test_training_step_is_the_same_on_both_paths(kind: str) -> None:
    problem = problems.TrainingStep(TrainCase(1, "tiny", 1, kind, frames=2, side=96), "cpu")  # type: ignore[arg-type]
    assert verify.contestants(problem, list(problem.names)) == (list(problem.names), {})
    for name in problem.names:
        problem.step(name)
        assert problem.notes(name, 1)["seconds"]["encoder"] > 0
        weights = sum(p.nbytes for p in problem.steps[name].model.parameters())
        assert 3 * weights < problem.kept(name)  # and two moments
    assert problem.work()["step"].flop > problem.spared("fused, tokens kept") > problem.spared("fused") == 0
    assert len(problem.codes.unique()) > len(problem.codes) // 8
    answer = problem.judged(problem.answer("fused"))
    oracle, eager = map(problem.judged, problem.truth())
    shuffled = answer["codes"][torch.randperm(len(answer["codes"]))]
    with pytest.raises(AssertionError, match=r"codes: \d+\.\d\d % are not float32's, at most 0\.50 % may be others"):
        problem.check({**answer, "codes": shuffled}, oracle, eager, "", 2)
    for what in ("grad", "update", "moment"):
        wrong = 1.001 * answer[f"{what} qkv.weight"]
        with pytest.raises(AssertionError, match=rf"{what} qkv\.weight: mean error"):
            problem.check({**answer, f"{what} qkv.weight": wrong}, oracle, eager, "", 2)
    moments = torch.cat([x for name, x in oracle.items() if name.startswith("moment ")])
    clip = problem.steps["fused"].config.optim.clip_grad
    assert moments.norm().item() == pytest.approx(0.1 * clip)  # what is judged was clipped


@pytest.mark.parametrize("part", ["update", "clipping"])
def test_a_training_step_that_does_not_update_is_wrong(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.TrainingStep(TrainCase(1, "tiny", 1, "vq", frames=2, side=96), "cpu")
    oracle = problem.truth()
    monkeypatch.setattr(problem, "truth", lambda: oracle)
    if part == "update":
        monkeypatch.setattr(optim, "update", lambda *_: None)
    else:
        monkeypatch.setattr(torch, "_foreach_mul_", lambda *_: None)
    with pytest.raises(verify.GateClosed, match=r"fused is wrong, so nothing is timed: (update|moment|'exp_avg')"):
        verify.contestants(problem, ["fused"])


@pytest.mark.parametrize(("frames", "side"), [(16, 224), (8, 160)])
def test_work_of_the_models_is_by_one_rule(frames: int, side: int) -> None:
    """Attention as the op's own cases have it; the encoder alone and in a training step, whose budget is another's."""
    encoder = problems.VideoSwinStep(StepCase(1, "tiny", frames, side), "cpu")
    attention, excluded = models.attention_flop(encoder.config, 1, (frames // 2, side // 4, side // 4))
    size = resized(ModelConfig(), "tiny")
    config = replace(joint_stage(), model=size, data=replace(DataConfig(), frames=frames, crop=side))
    rows_of = {row.name.strip(): 2e9 * row.clip_gmac for row in budget.counted(config)}
    assert attention == pytest.approx(rows_of["attention"], rel=1e-9)
    assert (excluded > 0) == (side > 28)
    work = encoder.work()
    assert work["forward"].flop == pytest.approx(rows_of["encoder"] + rows_of["patch embedding"], rel=1e-9)
    both = 3 * rows_of["encoder"] + 2 * rows_of["patch embedding"]
    assert work["forward+backward"].flop == pytest.approx(both, rel=1e-9)
    assert work["forward+backward"].flop_unmasked == pytest.approx(both - 3 * excluded, rel=1e-9)


def test_pairs_that_shifts_exclude() -> None:
    """Of all stages of Swin-T on clips: the op's own count."""
    cases = [OPS["window_attention"].cases[f"swin-t video stage {i} shifted"].case for i in (1, 2, 3)]
    blocks = (1, 1, 3)  # of those that are shifted
    works = [problems.WindowAttention(case, "cpu").work()["forward"] for case in cases]  # type: ignore[arg-type]
    excluded = sum(n * (work.flop - work.flop_unmasked) for n, work in zip(blocks, works))
    assert models.attention_flop(SIZES["tiny"], 1, (8, 56, 56))[1] == pytest.approx(excluded, rel=1e-9)


def test_torchvision_computes_the_same_encoder(torchvision_video: ModuleType) -> None:
    problem = problems.VideoSwinStep(StepCase(1, "tiny", frames=2, side=224), "cpu")
    assert verify.contestants(problem, ["torchvision"]) == (["torchvision"], {})


def test_encoder_step_is_the_same_by_eager_attention() -> None:
    problem = problems.VideoSwinStep(StepCase(1, "tiny", frames=4, side=64), "cpu")
    good, wrong = verify.contestants(problem, ["reference", "eager"])
    assert (good, wrong) == (["reference", "eager"], {})
    kinds = set(problem.judged(problem.step("eager")))
    assert {"out", "grad attn.relative_position_bias_table", "grad qkv.weight"} <= kinds
    assert problem.work()["forward"].flop > 0


@pytest.mark.skipif(not memory.RESET.exists(), reason="peak memory on a CPU is read from Linux' /proc")
def test_peak_memory_sees_the_scores_of_the_eager_form() -> None:
    problem = problems.build("window_attention", "cpu target", "cpu")
    found = memory.peaks(problem, "window_attention", "cpu target", ["reference", "eager"], 1)
    assert set(found) == {"reference", "eager"}
    peaks = found["eager"]
    scores = 16 * 4 * 392**2 * 4
    assert 2 * scores < peaks.forward < peaks.both < 8 * scores


@pytest.mark.skipif(not memory.RESET.exists(), reason="peak memory on a CPU is read from Linux' /proc")
def test_a_step_that_ends_the_process_costs_its_own_figure_alone(capfd: pytest.CaptureFixture) -> None:
    problem = problems.build("window_attention", "cpu target", "cpu")
    assert set(memory.peaks(problem, "window_attention", "cpu target", ["nobody", "eager"], 1)) == {"eager"}
    assert "peak memory of nobody is not known: its process ended with 1" in capfd.readouterr().err


def test_a_gpu_machine_needs_few_packages() -> None:
    """`make bench-gpu` says which are enough; steps, tokenizer and loader need more, and rows say what."""
    others = ["safetensors", "tyro", "rich", "PIL", "av", "matplotlib", "tensorboard"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import benchmarks.suite, benchmarks.run"
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
    assert suite.main(["cuda"]) == 2
    assert run.main(["window_attention", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("needs a CUDA GPU: torch sees none") == 2


def test_a_dry_run_names_every_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    compiled = []
    monkeypatch.setattr(suite.subprocess, "run", lambda words, **_: compiled.append(words) or Ended(0))
    assert suite.main(["cuda", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert compiled[0][1:] == ["-m", "benchmarks.aot", "--all"]
    assert "window_attention: swin-b video: about " in text
    assert "stage 1 shifted: 8 times batch 1, grid (8, 56, 56), window (8, 7, 7), shift (0, 3, 3)" in text
    for op in OPS:
        for name, entry in OPS[op].cases.items():
            assert (f"  {name}: " in text) or "cuda" not in entry.batch


def test_an_unknown_part_is_answered_with_those_there_are(capsys: pytest.CaptureFixture) -> None:
    assert suite.main(["cpu", "--part", "window_attentoin"]) == 2
    assert "no part 'window_attentoin' for cpu; there are: 'train_step: swin-t'" in capsys.readouterr().err


class Ended(NamedTuple):
    """A process."""

    returncode: int


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A suite of two ops and a command whose processes only note their words, here."""
    begun: list[list[str]] = []

    def process(words: list[str], **_: object) -> Ended:
        begun.append(words[2:])
        return Ended(int("linear" in words))

    monkeypatch.setitem(PARTS, "cpu", (Part("linear", "swin-t", 1), Part("conv3x3", "dalle", 1), Part("data", "", 1)))
    monkeypatch.setattr(
        suite, "_run", lambda words, _: "done" if process(["", "", *words]).returncode == 0 else "ended with 1"
    )
    monkeypatch.setattr(verify, "green", lambda patterns, *_: f"tests: {patterns}")
    monkeypatch.setattr(suite, "_limits", lambda _: ["--limits", "1e12", "1e11"])
    monkeypatch.setattr(rows, "path", lambda op: tmp_path / f"{op}.jsonl")
    return begun


@pytest.mark.parametrize("part", PARTS["cpu"], ids=lambda part: part.name)
def test_a_part_that_is_named_has_the_time_it_needs(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the commands of the README's rows; in a whole run a long one is named."""
    given: list[float] = []
    monkeypatch.setattr(suite, "measure", lambda *words: given.append(words[3]) or 0)
    suite.main(["cpu", "--again", "--part", part.name])
    suite.main(["cpu", "--again", "--part", part.name, "--time-limit", "5"])
    assert given[0] >= max(suite.SECONDS["cpu"], registry.TESTS["cpu"] + part.seconds)
    assert given[1] == 5


def test_a_part_longer_than_a_run_is_named(
    parts: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(PARTS, "cpu", (Part("conv3x3", "dalle", 601),))
    assert suite.main(["cpu"]) == 0
    assert parts == []
    said = capsys.readouterr().out
    assert "not measured: it takes 601 s: name it with --part" in said
    assert "begun again" not in said


def test_a_failing_part_leaves_the_others(parts: list[list[str]], capsys: pytest.CaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert suite.main(["cpu"]) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert [words[:2] for words in parts] == [["run", "linear"], ["run", "conv3x3"], ["data", "--seconds"]]
    assert "--missing" in parts[0]
    assert "linear: swin-t                                    ended with 1" in capsys.readouterr().out


def test_what_rests_on_red_tests_is_not_measured(
    parts: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def red(patterns: list[str], *_: object) -> str:
        if "conv3x3" in patterns[0]:
            raise verify.GateClosed("conv3x3 is not green")
        return "green"

    monkeypatch.setattr(verify, "green", red)
    monkeypatch.setitem(PARTS, "cpu", (*PARTS["cpu"], Part("tokenizer", "", 1)))
    assert suite.main(["cpu", "--part", "conv3x3", "--part", "data", "--part", "tokenizer", "--again"]) == 1
    assert [words[0] for words in parts] == ["data"]
    assert "not measured: its tests are red" in capsys.readouterr().out


def test_what_has_rows_is_not_measured_again(
    parts: list[list[str]], small: None, out: Path, capsys: pytest.CaptureFixture
) -> None:
    environment = rows.environment("cpu")
    rows.save(rows.path("data"), [{**environment, "op": "data", "case": "any"}])
    assert suite.main(["cpu", "--part", "data"]) == 0
    assert suite.main(["cpu", "--part", "data", "--again"]) == 0
    assert [words[0] for words in parts] == ["data"]
    assert command(out, op="linear_argmax") == 0
    assert command(out, "--missing", op="linear_argmax") == 0
    text = capsys.readouterr().out
    assert text.count("linear_argmax, small, torch.float32") == 1
    assert "has rows of this code and machine: small" in text


def test_a_missing_package_has_a_row_that_says_so(
    parts: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else found(name))
    assert suite.main(["cpu", "--part", "data"]) == 0
    assert not parts
    assert json.loads(rows.path("data").read_text())["absent"] == "not measured: needs av"


def test_rows_from_another_machine_are_merged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(rows, "path", lambda op: tmp_path / f"{op}.jsonl")
    back = tmp_path / "rows.jsonl"
    came = [synthetic.row(ms=ms, op=op) for op, ms in (("linear", 1), ("conv3x3", 2), ("linear", 3))]
    back.write_text("".join(json.dumps(row) + "\n" for row in came))
    monkeypatch.setattr(sys, "argv", ["rows", str(back)])
    assert rows.main() == 0
    assert [row["p50_ms"] for row in lines(tmp_path / "linear.jsonl")] == [3], "the last of the same measurement"
    assert lines(tmp_path / "conv3x3.jsonl")[0]["p50_ms"] == 2
    monkeypatch.setattr(sys, "argv", ["rows", str(tmp_path / "none")])
    assert rows.main() == 2


def test_a_part_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "sleep")
    monkeypatch.setattr(suite.subprocess, "run", lambda words, run=subprocess.run, **k: run(["sleep", "60"], **k))
    assert suite._run(["run"], 0.2) == "out of time"


@pytest.mark.parametrize(
    ("text", "message"), [("{", ":2 is no row of JSON: mend the line or remove it"), ("[1]", ":2 is no row of JSON")]
)
def test_a_broken_file_of_rows_is_seen_before_any_work(
    small: None, out: Path, text: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    out.write_text(f'{{"op": "x"}}\n{text}\n')
    assert command(out) == 2
    assert f"nothing is measured: {out}{message}" in capsys.readouterr().err
    assert out.read_text().endswith(f"{text}\n")


def test_rows_go_to_files(small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(tmp_path) == 2
    assert f"{tmp_path} is a folder: name a file for the rows" in capsys.readouterr().err


def test_a_folder_for_copies_is_made_or_refused(
    small: None, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OUT", str(out.parent / "copies"))
    assert command(out, op="linear_argmax") == 0
    assert lines(out.parent / "copies" / "rows.jsonl") == lines(out)
    monkeypatch.setenv("OUT", str(out))
    assert command(out, op="linear_argmax") == 2
    assert "nothing is measured: " in capsys.readouterr().err


def test_processes_that_save_at_once_lose_nothing(out: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks import rows\n"
        "for i in range(30): rows.save(Path(sys.argv[1]), [{'op': sys.argv[2], 'case': str(i)}])"
    )
    path = os.pathsep.join([str(verify.ROOT), str(verify.ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path}
    words = [sys.executable, "-c", code, str(out)]
    both = [subprocess.Popen([*words, name], env=environment) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert len(lines(out)) == 60


def test_an_interpreter_is_not_timed(
    small: None, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    able = problems.KINDS["linear_argmax"](CASES["linear_argmax"], "cpu").contestants["triton"]
    assert command(out, "--impl", "triton", op="linear_argmax") == 0
    assert "triton" not in {row["contestant"] for row in lines(out) if "absent" not in row}
    assert able.reasons or "triton is interpreted on a CPU, and not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [("--seconds", "nan"), ("--seconds", "0"), ("--threads", "9999"), ("--time-limit", "-1")]
)
def test_numbers_that_make_no_sense_are_refused(
    words: tuple[str, ...], out: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(out, *words)
    assert ended.value.code == 2
    assert f"argument {words[0]}: must be " in capsys.readouterr().err


def test_an_interrupted_run_says_what_it_has(
    small: None, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object, **__: object) -> list[rows.Row]:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    assert command(out) == 130
    assert f"interrupted: rows of 0 cases are in {out}" in capsys.readouterr().err


def test_others_are_seen() -> None:
    others = timing.Others()
    busy = subprocess.run([sys.executable, "-c", "i = 0\nwhile i < 30_000_000: i += 1"], check=True)
    assert busy.returncode == 0
    cores = others.cores()
    assert cores is None or cores > 0.2


def test_limits_are_reached_by_something() -> None:
    """The best product and copy: of the order of what any CPU does."""
    found = limits.measure("cpu")
    assert 1e9 < found.flops < 1e13
    assert 1e8 < found.bandwidth < 1e12


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf", "x"])
def test_limits_must_be_numbers_above_zero(wrong: str, out: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command(out, "--limits", wrong, "1")
    assert f"must be a number above 0, got '{wrong}'" in capsys.readouterr().err


def test_no_share_of_a_limit_that_was_exceeded() -> None:
    work = Work(10**9, 10**9, None)
    assert run._rates(work, 1.0, Limits(2e9, 1e9), False)["percent_of_limit"] == 50
    assert run._rates(work, 1.0, Limits(0.5e9, 1e9), False)["percent_of_limit"] is None


def test_sigterm_ends_what_a_command_waits_for(tmp_path: Path) -> None:
    """As Ctrl-C: its processes are not left at work."""
    mark = tmp_path / "pid"
    code = f"""
import subprocess, sys
from benchmarks.interrupts import terminable
try:
    with terminable():
        subprocess.run(["sh", "-c", "echo $$ > {mark}; exec sleep 60"])
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = subprocess.Popen([sys.executable, "-c", code], env=verify.environment_of_tree())
    try:
        deadline = time.monotonic() + 60
        while not (mark.exists() and mark.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        status = Path(f"/proc/{mark.read_text().strip()}/status")
        assert not status.exists() or "(zombie)" in status.read_text()  # of an init that reaps nobody
    finally:
        process.kill()


def test_an_interrupted_part_is_in_the_summary(
    parts: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "_run", interrupted)
    assert suite.main(["cpu", "--part", "linear"]) == 130
    assert re.search(r"linear: swin-t +interrupted, 0 s", capsys.readouterr().out)


def test_a_part_that_hangs_has_failed(
    parts: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(suite, "_run", lambda *_: suite.OVER)
    assert suite.main(["cpu", "--part", "linear"]) == 1
    assert "ended by force: it took over 34 s" in capsys.readouterr().out


def test_on_a_slow_machine_no_part_is_begun_in_vain(parts: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first took twice as long as the registry says, so the second will not fit."""
    now = [0.0]
    monkeypatch.setattr(suite.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(suite, "_run", lambda *_: now.__setitem__(0, now[0] + 20) or "done")
    outcomes: list[tuple[Part, str]] = []
    suite.measure("cpu", [Part("linear", "swin-t", 10), Part("conv3x3", "dalle", 10)], True, 35, outcomes)
    assert [outcome for _, outcome in outcomes] == ["done, 20 s", "not measured: out of time, 0 s"]


def test_rows_go_to_one_out_whatever_folder_a_part_runs_in(
    parts: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUT", "mine")
    suite.main(["cpu", "--part", "linear"])
    assert os.environ["OUT"] == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"op": "nonsense"}', "is of no op that is known"),
        ('{"op": null, "machine": {}}', "is of no op that is known"),
        ('{"case": "x"}', "is of no op that is known"),
        ('{"op": "../linear", "machine": {}}', "is of no op that is known"),
        ('{"op": "linear", "machine": {}, "case": "x"}', "has no commit, dirty, dtype"),
        ("\xff", "is no row of JSON"),
    ],
)
def test_what_is_no_row_is_not_merged(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "came.jsonl").write_text(line + "\n")
    monkeypatch.setattr(sys, "argv", ["rows", str(tmp_path / "came.jsonl")])
    monkeypatch.setattr(rows, "save", lambda *_: pytest.fail("saved"))
    assert rows.main() == 2
    assert message in capsys.readouterr().err
