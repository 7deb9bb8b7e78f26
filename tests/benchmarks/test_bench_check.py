"""The gate against another commit: what it lets pass, what it stops, what it cannot compare."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bevt_kernels import native
from bevt_kernels.testing import WindowCase
from bevt_kernels.window_attention import reference

from benchmarks import check, check_worker, problems, rows, trees
from benchmarks.registry import OPS, Entry, Op

SMALL = WindowCase(1, (2, 6, 6), (2, 3, 3), (0, 1, 1), heads=2, head_dim=16)
MACHINE = {"cpu": "toy", "cores": 2, "isa": "AVX2"}

REGISTRY = """
from types import SimpleNamespace
OPS = {{"toy": SimpleNamespace(cases={{case: SimpleNamespace(batch={{"cpu": 1}}) for case in {cases}}})}}
"""
PROBLEMS = """
import time
from dataclasses import dataclass
from types import SimpleNamespace
import torch

@dataclass
class Case:
    rows: int = {rows}

class Problem:
    case, device, dtype = Case(), "cpu", torch.float32
    contestants = {{
        "triton": SimpleNamespace(ours=True, reasons=["no GPU"]),
        "reference": SimpleNamespace(ours=True, reasons=[]),
        "eager": SimpleNamespace(ours=False, reasons=[]),
        "native": SimpleNamespace(ours=True, reasons=[]),
    }}

    def step(self, name, frozen, mark):
        assert name == "native"
        mark()
        time.sleep({ms} / 1e3)  # of a process that sleeps, load takes little

def build(op, case, device):
    print("what a library prints")
    return Problem()
"""
VERIFY = """
class GateClosed(Exception):
    pass

def contestants(problem, names):
    if {wrong}:
        raise GateClosed(f"{{names[0]}} is wrong, so nothing is timed: out: mean error")
"""
SETUP = """
from pathlib import Path
Path("kernels/bevt_kernels/_native.so").write_text(Path("kernels/csrc/a.cpp").read_text())
"""


class Toy:
    """A repository whose one op sleeps; its first commit is the base."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write({".gitignore": "*.so\n/build/\n", "benchmarks/__init__.py": "", "setup.py": SETUP})
        self.write({"kernels/csrc/a.cpp": "1", "CMakeLists.txt": "", "kernels/bevt_kernels/README.md": ""})
        self.tree()
        self.write({trees.LIBRARY: "1"})
        self.git("init", "--quiet")
        self.base = self.commit()

    def write(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)

    def tree(self, ms: float = 10, rows: int = 1, wrong: bool = False, cases: tuple[str, ...] = ("small",)) -> None:
        """What the working tree does."""
        files = {"registry": REGISTRY.format(cases=cases), "problems": PROBLEMS.format(ms=ms, rows=rows)}
        files["verify"] = VERIFY.format(wrong=wrong)
        self.write({f"benchmarks/{name}.py": text for name, text in files.items()})

    def git(self, *words: str, date: str = "") -> str:
        command = ["git", "-C", str(self.root), "-c", "user.name=toy", "-c", "user.email=toy", *words]
        environment = {**os.environ, "GIT_COMMITTER_DATE": date}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, date: str = "2026-01-01T00:00:00Z") -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "toy", date=date)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The gate of a toy repository."""
    monkeypatch.setattr(trees, "ROOT", tmp_path)
    entry = Entry("cpu", SMALL, {"cpu": 1})
    monkeypatch.setattr(check, "OPS", {"toy": Op({"small": entry, "other": entry}, ())})
    monkeypatch.setattr(native, "loaded", lambda: True)
    toy = Toy(tmp_path)
    environment = {"commit": toy.base, "dirty": False, "machine": MACHINE}
    monkeypatch.setattr(rows, "environment", lambda device: environment)
    clean: list[rows.Row] = [{"commit": toy.base, "machine": MACHINE}]
    monkeypatch.setattr(check, "committed_rows", lambda dirty=False: clean if dirty is False else [])
    return toy


def command(*more: str) -> int:
    return check.main(["--device", "cpu", "--threads", "1", "--sessions", "1", "--seconds", "0.1", *more])


def test_a_tree_against_itself(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    assert command() == 0
    out = capsys.readouterr().out
    assert f"base: {toy.base[:10]} (2" in out
    assert "the working tree is the base: what differs is noise" in out
    assert out.index("within the error rule: toy, small, native") < out.index("base ms")
    assert f"no case is shown to be slower than {toy.base[:10]}" in out


def test_a_slow_down_is_caught(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    toy.tree(ms=20)
    assert command() == 1
    out = capsys.readouterr().out
    assert "looks slower; once more, twice as long, in fresh processes: toy, small" in out
    assert f"SLOWER than {toy.base[:10]} by more than 5 %: toy, small" in out
    assert out.count("base ms") == 2


def test_a_gain_is_said(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    toy.tree(ms=4)
    assert command() == 0
    assert "faster: toy, small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratios", "code"), [((1.2, 1.0), 0), ((1.2, 1.2), 1), ((1.04, 1.2), 0)], ids=["gone", "back", "never seen"]
)
def test_the_second_measurement_decides(
    toy: Toy, ratios: tuple[float, ...], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    series = [check.Series(("native", "native"), [[1.0] * 9], [[ratio] * 9]) for ratio in ratios]
    monkeypatch.setattr(check, "verified", lambda *_: None)
    monkeypatch.setattr(check, "measure", lambda *_: ({("toy", "small"): series.pop(0)}, []))
    assert command() == code
    out = capsys.readouterr().out
    assert ("once more" in out) == (ratios[0] > check.LIMIT)
    assert ("SLOWER" in out) == bool(code)


def test_a_wrong_result_stops_it_before_any_time(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    toy.tree(ms=20, wrong=True)
    assert command() == 1
    printed = capsys.readouterr()
    assert "toy, small: native is wrong, so nothing is timed: out: mean error" in printed.err
    assert "ms" not in printed.out
    assert "session" not in printed.out


def test_the_worker_judges_by_the_error_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    side = check_worker.Side()
    side.problem, side.name = problems.WindowAttention(SMALL, "cpu"), "reference"
    assert side.verify() == {"wrong": ""}
    right = reference.table_gradient
    monkeypatch.setattr(reference, "table_gradient", lambda *args: right(*args) * 1.001)
    assert side.verify()["wrong"].startswith("reference is wrong, so nothing is timed: grad bias_table")


@pytest.mark.parametrize("change", [{"cases": ("small", "other")}, {"rows": 2}], ids=["unknown", "another problem"])
def test_what_the_base_does_not_know_is_not_compared(
    toy: Toy, change: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    toy.tree(ms=20, **change)
    case = "other" if "cases" in change else "small"
    assert command("--case", case) == 0
    out = capsys.readouterr().out
    assert "new: nothing to compare with" in out
    assert f"not compared, as the base knows no such problem: toy, {case}" in out
    assert "nothing was compared" in out


def test_a_base_that_fails_is_an_error(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    toy.write({"benchmarks/problems.py": "import no_such_module"})
    broken = toy.commit()
    toy.tree()
    assert command("--base", broken) == 2
    expected = f"the base, {broken[:10]}, cannot be measured: ModuleNotFoundError: No module named 'no_such_module'"
    assert expected in capsys.readouterr().err


def test_a_process_that_dies_is_an_error(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    toy.write(
        {"benchmarks/problems.py": "import os, sys; print('last words', file=sys.stderr, flush=True); os._exit(3)"}
    )
    assert command() == 2
    error = capsys.readouterr().err
    assert "the working tree cannot be measured: its process ended with code 3\nlast words" in error


def test_an_unknown_base(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    assert command("--base", "no-such-branch") == 2
    assert "'no-such-branch' is no commit of this repository" in capsys.readouterr().err


def test_no_rows_of_this_machine_class(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    other: rows.Row = {"commit": toy.base, "machine": {**MACHINE, "isa": "AVX512", "gpu": "big"}}
    there: dict[bool | None, list[rows.Row]] = {False: [other, {"commit": toy.base, "machine": "prose"}], None: []}
    monkeypatch.setattr(check, "committed_rows", lambda dirty=False: there[dirty])
    assert command() == 2
    error = capsys.readouterr().err
    assert "(cpu toy, cores 2, isa AVX2); there are rows of\n  cpu toy, cores 2, isa AVX512, gpu big\nname a" in error
    assert "name a base: --base REV" in error
    there[None] = [{"commit": toy.base, "machine": MACHINE}]
    assert command() == 2
    assert "\nrows of this class are of trees without git: name a base: --base REV" in capsys.readouterr().err


def test_the_newest_commit_with_rows_is_the_base(toy: Toy) -> None:
    newer, older = (toy.commit(f"{year}-06-01T00:00:00Z") for year in (2026, 2025))
    commits = (toy.base, newer, older, "0" * 40)  # the last is of another repository
    found: list[rows.Row] = [{"commit": rev, "machine": MACHINE} for rev in commits]
    assert check.base_commit(found, {**MACHINE, "gpu": None}) == newer


def test_rows_count_once_they_are_committed(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(trees, "ROOT", toy.root)
    name = "benchmarks/results/toy.jsonl"
    found = [{"commit": commit, "dirty": dirty} for commit, dirty in (("a", False), ("b", True), ("d", None))]
    toy.write({name: "".join(f"{json.dumps(row)}\n" for row in [*found, {"commit": "e"}])})
    toy.commit()
    toy.write({name: '{"commit": "c", "dirty": false}\n'})
    assert [row["commit"] for row in check.committed_rows()] == ["a"]
    assert [row["commit"] for row in check.committed_rows(None)] == ["d"]


def test_other_sources_are_built_once(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    toy.write({"kernels/csrc/a.cpp": "2"})
    new = toy.commit()
    tree = trees.checkout(new, True)
    assert (tree / trees.LIBRARY).read_text() == "1"  # the working tree's, as the sources are the same
    old = trees.checkout(toy.base, True)
    assert "building the native library" in capsys.readouterr().out
    (old / trees.LIBRARY).write_text("kept")
    assert (trees.checkout(toy.base, True) / trees.LIBRARY).read_text() == "kept"
    assert {path.name for path in old.parent.iterdir()} == {old.name, tree.name}


def test_a_base_whose_library_does_not_build(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    toy.write({"setup.py": "raise SystemExit('no compiler')"})
    broken = toy.commit()
    toy.write({"setup.py": SETUP, trees.LIBRARY: "1"})
    assert command("--base", broken) == 2
    assert f"the native library of {broken[:10]} does not build:\nno compiler" in capsys.readouterr().err
    assert not list((toy.root / "build" / "bases").iterdir())


def test_a_library_older_than_its_sources_is_refused(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    os.utime(toy.root / trees.LIBRARY, (1, 1))
    assert command() == 2
    assert f"{trees.LIBRARY} is older than" in capsys.readouterr().err
    (toy.root / trees.LIBRARY).unlink()
    assert command() == 2
    assert f"the working tree has no {trees.LIBRARY}; build it: " in capsys.readouterr().err


def test_unknown_cases_are_named(toy: Toy, capsys: pytest.CaptureFixture) -> None:
    assert command("--op", "toy", "--case", "smal") == 2
    assert "no case 'smal' on cpu of toy; there are: 'small', 'other'" in capsys.readouterr().err


@pytest.fixture
def sessions() -> Callable[..., list[list[float]]]:
    """Ratios about a mean, as load scatters them, in sessions that memory biases."""
    draw = np.random.default_rng(1)

    def made(mean: float, scatter: float = 0.03, bias: tuple[float, ...] = (0.97, 1.0, 1.03)) -> list[list[float]]:
        return [list(mean * each * np.exp(draw.normal(0, scatter, 15))) for each in bias]

    return made


@pytest.mark.parametrize(
    ("mean", "scatter", "word"),
    [(1.2, 0.03, "slower"), (1.2, 0.3, "unclear"), (1.0, 0.03, "same"), (1.0, 0.3, "unclear"), (0.8, 0.03, "faster")],
)
def test_verdicts(sessions: Callable[..., list[list[float]]], mean: float, scatter: float, word: str) -> None:
    verdict = check.judge(sessions(mean, scatter, (0.99, 1.0, 1.01)))
    assert verdict.word() == word
    assert verdict.low < verdict.ratio < verdict.high


def test_one_pair_of_processes_is_not_enough(sessions: Callable[..., list[list[float]]]) -> None:
    """Memory that lies badly in two sessions of three is no slow-down; the code is in all of them."""
    assert check.judge(sessions(1.0, bias=(1.08, 1.1, 1.0))).word() == "unclear"
    assert check.judge(sessions(1.2, bias=(0.95, 1.0, 1.05))).word() == "slower"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_of_a_device_is_checked(device: str) -> None:
    keys = check.chosen(device, [], [])
    assert all(device in OPS[op].cases[case].batch for op, case in keys)
    there = {op for op in OPS if any(device in entry.batch for entry in OPS[op].cases.values())}
    left_out = {op for op, cases in check.CHOSEN[device].items() if not cases}
    assert {op for op, _ in keys} == there - left_out
    assert left_out <= {"videomae_step", "vivit_step", "timesformer_step"}, "long, and their layers are checked"


def of(isa: str) -> rows.Row:
    """A machine."""
    return {**MACHINE, "isa": isa}


def row(isa: str, speedup: float, **change: Any) -> rows.Row:
    same = {"op": "window_attention", "case": "small", "device": "cpu", "contestant": "native"}
    return {**same, "quantity": "forward+backward", "machine": of(isa), "speedup": {"eager": speedup}, **change}


def test_floors() -> None:
    """Of the same class of machines, else of any; the smallest."""
    found = [row("AVX2", 2.0), row("AVX512", 4.0), row("AVX512", 3.0), row("AVX512", 0.1, quantity="forward")]
    arguments = (("window_attention", "small"), "native", "forward+backward")
    share = check.FRACTIONS["window_attention"]
    assert check.floor(found, *arguments, of("AVX512")) == (share * 3.0, "cpu toy, cores 2, isa AVX512")
    assert check.floor(found, *arguments, of("NEON")) == (share * 2.0, "cpu toy, cores 2, isa AVX2")
    with pytest.raises(check.Unusable, match="no committed row says how much faster than eager native is"):
        check.floor(found[3:], *arguments, of("AVX512"))


@pytest.mark.parametrize("key", check.RATIOS, ids=lambda key: key[0])
def test_every_floor_has_rows(key: check.Key) -> None:
    """Where no machine of the class has been measured, too: not far below plain PyTorch."""
    quantity = "forward" if key[0] in ("conv3x3", "linear_argmax") else "forward+backward"
    assert check.floor(check.committed_rows(), key, "native", quantity, of("any"))[0] > 0.7


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`--ratios` on one small case of the reference implementation."""
    monkeypatch.setitem(OPS, "window_attention", Op({"small": Entry("cpu", SMALL, {"cpu": 2})}, ()))
    monkeypatch.setattr(check_worker, "ours", lambda problem: "reference")
    monkeypatch.setattr(native, "loaded", lambda: True)
    return ["--ratios", "--device", "cpu", "--op", "window_attention", "--seconds", "0.01", "--threads", "1"]


@pytest.mark.parametrize(("committed", "code", "word"), [(1e-3, 0, "good"), (1e3, 1, "BELOW")])
def test_ratios(
    small: list[str],
    committed: float,
    code: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(check, "committed_rows", lambda: [row("AVX2", committed, contestant="reference")])
    assert check.main(small) == code
    assert capsys.readouterr().out.splitlines()[-1 - code].endswith(word)


def test_ratios_of_a_wrong_result(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(check, "committed_rows", lambda: [row("AVX2", 1.0, contestant="reference")])
    build = problems.build

    def wrong(*words: str) -> problems.Problem:
        problem = build(*words)
        ours = problem.contestants["reference"]
        wrong = replace(ours, forward=lambda x: {"out": ours.forward(x)["out"] * 1.01})
        problem.contestants["reference"] = wrong
        return problem

    monkeypatch.setattr(problems, "build", wrong)
    assert check.main(small) == 1
    printed = capsys.readouterr()
    assert "reference is wrong, so nothing is timed: out: mean error" in printed.err
    assert "ms" not in printed.out


def test_ratios_have_no_base(capsys: pytest.CaptureFixture) -> None:
    assert check.main(["--ratios", "--base", "HEAD"]) == 2
    assert "--ratios is for the CPU, and has no base" in capsys.readouterr().err
