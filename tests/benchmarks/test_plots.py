"""Pictures of the committed rows: which rows are taken, what is drawn, and that what is committed is up to date."""

import json
from pathlib import Path

import pytest
from synthetic import CPU, GPU, WINDOW, everything, pair, row, steps

from benchmarks import plots, runs
from benchmarks.registry import OPS
from benchmarks.rows import Row

AGAIN = "run `make plots` and commit what it writes"


def names(rows: list[Row]) -> set[tuple[str, str]]:
    return {(row["contestant"], row["commit"]) for row in rows}


def test_the_last_run_is_taken_whole() -> None:
    """By date, then by place in the file; a contestant that only an older run had is left out."""
    old = [row("native", commit="a", date="2026-01-03"), row("sdpa", commit="a", date="2026-01-03")]
    first, last = (pair(commit=commit, date="2026-01-04") for commit in "bc")
    older = pair(commit="d", date="2026-01-02")
    assert names(runs.newest([*old, *first, *last, *older])) == {("native", "c"), ("eager", "c")}


def test_changes_not_committed_count_where_nothing_else_does() -> None:
    clean = pair(commit="a", date="2026-01-07")
    dirty = pair(commit="b", date="2026-01-08", dirty=True)
    unknown = pair(commit="c", date="2026-01-09", dirty=None)  # a tree without git, whose commit was given
    assert names(runs.newest([*clean, *dirty, *unknown])) == {("native", "a"), ("eager", "a")}
    assert names(runs.newest([*unknown, *dirty])) == {("native", "c"), ("eager", "c")}
    assert [runs.commit(rows[0]) for rows in (clean, dirty, unknown)] == ["a", "b+", "c?"]


def test_a_run_is_of_one_case_machine_and_dtype() -> None:
    others = [{"case": "other"}, {"dtype": "bfloat16"}, {"machine": GPU}, {"machine": CPU | {"isa": "AVX512"}}]
    others += [{"threads": 1}]
    rows = [one for fields in ({}, *others) for one in pair(**fields)]
    assert runs.newest(rows) == rows


def test_a_machine_is_named_as_far_as_times_depend_on_it() -> None:
    assert runs.machine(row()) == "Some CPU, 2 cores, AVX2"
    assert runs.machine(row(threads=1)) == "Some CPU, 2 cores, AVX2, 1 thread"
    assert runs.machine(row(machine=GPU, threads=16)) == "NVIDIA H200"
    assert plots.file_name("NVIDIA H200", "speed") == "nvidia-h200-speed.svg"


def test_ours_are_those_that_say_so_or_are_known() -> None:
    assert runs.ours(row("new one") | {"ours": True})
    assert not runs.ours(row("reference"))
    old = [{name: value for name, value in row(who).items() if name != "ours"} for who in ("native", "eager")]
    assert list(map(runs.ours, old)) == [True, False]


def test_reading(tmp_path: Path) -> None:
    """Cases that the registry has no more are left out, and rows of no op and of nobody's time."""
    lines = [row(), row(case="never was"), {"name": "demo"}, row("xformers", absent="cannot run: not installed")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (only,) = runs.read(tmp_path)
    assert only["case"] == "cpu target"


def test_whole_work() -> None:
    rows = [row(quantity=quantity) for quantity in ("forward", "backward", "forward+backward")]
    alone = row(case="other", quantity="forward")
    assert runs.whole([*rows, alone]) == [rows[2], alone]


LABELS = {
    "speed": ["native (ours)", "eager", "qkv", "10.0 ms", "linear, forward+backward"],
    "memory": ["native (ours)", "batch [clips] (log)", "tokens a window (log)", "peak memory [MiB] (log)"],
    "roofline": ["1  qkv: 12 % of arithmetic", "measured: 100 GFLOP/s, 10 GB/s", "FLOP a second (log)"],
    "step": ["swin-t, dalle", "3.60 s, 2.00 times as fast", "tokenizer", "time of a step, median [s]"],
    "scaling": ["frames a clip (log)", "side of a frame [pixels] (log)", "time a clip [ms] (log)", "native (ours)"],
}


@pytest.mark.parametrize("kind", plots.KINDS)
def test_a_picture_says_what_it_shows(kind: str, tmp_path: Path) -> None:
    """Matplotlib writes each text as a comment beside its outlines."""
    name = f"some-cpu-2-cores-avx2-{kind}.svg"
    rows = plots.pictures(everything())[name]
    plots.write(tmp_path / name, rows)
    drawn = (tmp_path / name).read_text()
    missing = [label for label in LABELS[kind] if f"<!-- {label} -->" not in drawn]
    assert not missing
    assert "Some CPU, 2 cores, AVX2; float32" in drawn
    assert "0123456 (2026-01-01)" in drawn
    assert plots.fingerprint(rows) in drawn


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = plots.pictures(everything())["some-cpu-2-cores-avx2-step.svg"]
    for folder in "ab":
        plots.write(tmp_path / folder / "x-step.svg", rows)
    assert (tmp_path / "a" / "x-step.svg").read_bytes() == (tmp_path / "b" / "x-step.svg").read_bytes()


def test_a_picture_is_stale_when_the_drawing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, code = everything(), plots.DRAWN_BY
    before = plots.fingerprint(rows)
    for i, path in enumerate(code):
        changed = tmp_path / path.name
        changed.write_text(path.read_text() + "\n")
        monkeypatch.setattr(plots, "DRAWN_BY", (*code[:i], changed, *code[i + 1 :]))
        assert plots.fingerprint(rows) != before


def test_rows_that_lack_fields_are_left_out() -> None:
    """A roofline needs bytes and limits, memory a peak, a step its phases; none of them without a time is compared."""
    bare = [{name: value for name, value in one.items() if name != "peak_mib"} for one in pair()]
    old = [{name: value for name, value in one.items() if name not in ("problem", "seconds")} for one in steps()]
    assert set(plots.pictures([*bare, *old])) == {"some-cpu-2-cores-avx2-speed.svg"}
    assert plots.pictures([row(p50_ms=None), row("eager")]) == {}
    assert plots.pictures(pair(flop=1, bytes=1, limits=None)).keys() == {"some-cpu-2-cores-avx2-speed.svg"}


def test_a_sweep_varies_one_field() -> None:
    """Cases of another map do not join it, nor do shifted ones, nor those of a model, which are in no series."""
    sizes = [WINDOW | {"batch": batch} for batch in (1, 2)]
    others = [WINDOW | {"batch": 4, "grid": [8, 28, 28]}, WINDOW | {"batch": 8, "shift": [0, 3, 3]}]
    series = [case for case, entry in OPS["window_attention"].cases.items() if entry.group == "memory"]
    cases = zip([*series[:4], "cpu target"], [*sizes, *others, WINDOW | {"batch": 16}])
    rows = [one for case, problem in cases for one in pair(case=case, problem=problem)]
    picked = plots.pictures(rows)["some-cpu-2-cores-avx2-memory.svg"]
    assert {one["problem"]["batch"] for one in picked} == {1, 2}


def test_committed_pictures_are_of_the_committed_rows_and_code() -> None:
    expected = plots.pictures(runs.newest(runs.read()))
    there = {path.name: path.read_text() for path in plots.PLOTS.glob("*.svg")}
    assert there.keys() == expected.keys(), AGAIN
    stale = [name for name, rows in expected.items() if plots.fingerprint(rows) not in there[name]]
    assert not stale, AGAIN


def test_committed_pictures_name_no_path() -> None:
    for path in plots.PLOTS.glob("*.svg"):
        assert str(runs.FOLDER.parents[1]) not in path.read_text()
        assert "file:" not in path.read_text()


def test_without_rows_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(plots.runs, "read", lambda: [])
    monkeypatch.setattr(plots, "PLOTS", tmp_path)
    (tmp_path / "a-speed.svg").write_text("")
    assert plots.main([]) == 2
    assert "nothing is drawn, and nothing removed" in capsys.readouterr().err
    assert (tmp_path / "a-speed.svg").exists()
