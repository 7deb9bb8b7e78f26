"""The benchmarks' own promises: nothing wrong is timed, rows are kept and complete, work is counted right."""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bevt_kernels import baselines
from bevt_kernels.testing import WindowCase
from bevt_kernels.window_attention import reference

from benchmarks import gpu, memory, problems, registry, rows, run, timing, verify
from benchmarks.registry import OPS, Entry, Op, StepCase

SMALL = WindowCase(1, (2, 6, 6), (2, 3, 3), (0, 1, 1), heads=2, head_dim=16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op with one small case, tests that are green, quick rivals, no memory processes."""
    monkeypatch.setitem(OPS, "window_attention", Op({"small": Entry("cpu", SMALL, {"cpu": 2})}, "none"))
    monkeypatch.setattr(verify, "green", lambda *_: "tests: green")
    monkeypatch.setattr(memory, "peaks", lambda *_: (2**20, 2**21))
    monkeypatch.delitem(baselines.WINDOW_ATTENTION, "eager compiled")  # takes 15 s of g++
    monkeypatch.setattr(run, "SECONDS", {"cpu": 0.0})


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def command(out: Path, *more: str) -> int:
    return run.main(["window_attention", "--device", "cpu", "--impl", "reference", "--out", str(out), *more])


def test_a_run_writes_complete_rows(small: None, out: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(out) == 0
    text = capsys.readouterr().out
    assert "flex cannot run: FlexAttention has no backward on the CPU" in text
    assert "within the error rule: reference, eager, sdpa" in text
    got = [json.loads(line) for line in out.read_text().splitlines()]
    both = {row["contestant"]: row for row in got if row["quantity"] == "forward+backward"}
    assert set(both) == {"reference", "eager", "sdpa"}
    assert {row["quantity"] for row in got} == set(registry.QUANTITIES)
    row = both["reference"]
    assert set(row["speedup"]) == {"eager", "sdpa"}
    assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert (row["peak_mib"], row["rounds"], row["problem"]["batch"]) == (2, 5, 2)
    assert row["flop"] == 7 * 2 * (2 * 72) * 18 * 32  # seven products of 2 * tokens * N * C
    assert row["percent_of_limit"] is None  # nobody has named this CPU's limits
    assert both["eager"]["surcharge_over_frozen"] is None
    assert row["surcharge_over_frozen"] > -1
    for name in ("commit", "dirty", "tree", "date", "machine", "versions"):
        assert name in row
    assert not re.search(r'"/|' + re.escape(os.uname().nodename), out.read_text())


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

    def wrong_when_frozen(leaves: problems.Leaves) -> torch.Tensor:
        return ours.forward(leaves) * (1 if leaves["bias_table"].requires_grad else 1.01)

    problem.contestants["reference"] = replace(ours, forward=wrong_when_frozen)
    with pytest.raises(
        verify.GateClosed, match="reference is wrong, so nothing is timed: out, frozen table: mean error"
    ):
        verify.contestants(problem, ["reference"])


def test_a_wrong_or_broken_rival_is_not_timed(
    small: None, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(qkv: torch.Tensor, table: torch.Tensor, case: WindowCase) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    def wrong(qkv: torch.Tensor, table: torch.Tensor, case: WindowCase) -> torch.Tensor:
        return baselines.eager(qkv, table, replace(case, shift=(0, 0, 0)))

    for name, function in (("sdpa", broken), ("wrong", wrong)):
        monkeypatch.setitem(baselines.WINDOW_ATTENTION, name, baselines.Baseline(function, lambda spec: []))
    assert command(out) == 0
    text = capsys.readouterr().out
    assert "sdpa is not timed: RuntimeError: no kernel image" in text
    assert "wrong is not timed: AssertionError: out: mean error" in text
    assert {json.loads(line)["contestant"] for line in out.read_text().splitlines()} == {"reference", "eager"}


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
    pattern = "tests/kernels/test_t*.py"
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
    assert "(remembered)" not in verify.green("tests/kernels", "cpu", 60)
    assert "(remembered)" in verify.green("tests/kernels/test_t*.py", "cpu", 60)


def test_tests_that_are_missing_or_too_slow_close_the_gate(tree: Path) -> None:
    with pytest.raises(verify.GateClosed, match="no tests match tests/none"):
        verify.green("tests/none*.py", "cpu", 60)
    tree.write_text("import time\ndef test(): time.sleep(60)")
    with pytest.raises(verify.GateClosed, match="took over 2 s"):
        verify.green("tests/kernels/test_toy.py", "cpu", 2)


def test_new_rows_replace_those_of_the_same_measurement(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(**change: object) -> rows.Row:
        same = dict.fromkeys(rows.KEY, "same")
        return {**same, "p50_ms": 1.0, **change}

    copy = out.parent / "copy"
    copy.mkdir()
    monkeypatch.setenv("OUT", str(copy))
    rows.save(out, [row(), row(commit="older"), row(machine={"gpu": "other"})])
    rows.save(out, [row(p50_ms=2.0), row(quantity="forward")])
    got = [json.loads(line) for line in out.read_text().splitlines()]
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
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][-2:] == ["x", "b"]
    assert lines[1] == ["forward", "a", "-", "1.25", "-", "-", "-", "-", "-", "2"]
    assert lines[2][-1] == "-"
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


@pytest.fixture(params=[(op, case) for op in OPS for case in OPS[op].cases], ids=lambda pair: pair[1])
def entry(request: pytest.FixtureRequest) -> Iterator[Entry]:
    op, case = request.param
    return OPS[op].cases[case]


def test_registered_cases_are_whole_windows(entry: Entry) -> None:
    if isinstance(entry.case, StepCase):
        assert entry.case.side % 32 == 0
        return
    case = entry.case
    assert all(size % w == 0 for size, w in zip(case.grid, case.window))
    assert all(t >= w > s for t, w, s in zip(case.table, case.window, case.shift))
    # The model clips the shift where the map is no longer than the window.
    assert not any(s for size, w, s in zip(case.grid, case.window, case.shift) if size <= w)


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
    assert 2 * scores < peaks[0] < peaks[1] < 8 * scores


def test_a_machine_without_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert run.main(["window_attention", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("needs a CUDA GPU: torch sees none") == 2


def test_unknown_cases_are_named(out: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(out, "--case", "cpu tagret") == 2
    assert "no case 'cpu tagret'; there are: cpu target, " in capsys.readouterr().err
