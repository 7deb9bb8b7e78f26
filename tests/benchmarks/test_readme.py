"""The README's measured claims are the committed rows'."""

import json
import re
import shutil
from pathlib import Path

import pytest
from synthetic import GPU, everything, pair, row

from benchmarks import readme, runs
from benchmarks.registry import OPS
from benchmarks.rows import Row


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of rows, with the committed ones that are no op's."""
    for name in ("demo.jsonl", "aot.json"):
        shutil.copy(runs.FOLDER / name, tmp_path)
    return tmp_path


def lines(results: Path, *rows: Row) -> list[list[str]]:
    """Cells of the table's lines about window attention."""
    (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = readme.measured(results)
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| window attention, ")]


def test_it_is_not_stale() -> None:
    text = readme.README.read_text()
    assert readme.updated(text, runs.FOLDER) == text, "the README is not of these rows: run `make plots` and commit"


def test_its_pictures_are_there_and_no_path_leaves_the_tree() -> None:
    text = readme.measured(runs.FOLDER)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert not [link for link in links if not (readme.ROOT / link).is_file() or link.startswith(("/", ".."))]
    assert str(readme.ROOT) not in text


def test_claims_name_cases_that_there_are() -> None:
    for claim in readme.CLAIMS:
        cases = OPS[claim.op].cases
        assert not claim.case or claim.case in cases
        assert not claim.group or claim.group in {entry.group for entry in cases.values()}


def test_several_cases_are_a_line(results: Path) -> None:
    """Of every commit that has some of them; of a rival it says how many cases it has figures of."""
    both: Row = {"op": "linear", "commit": "2222222", "date": "2026-01-02"}
    one = pair(**both, case="swin-t stage 1 qkv", peak_mib=1.0, dirty=None)
    two = pair(**both | {"commit": "1111111", "date": "2026-01-01"}, case="swin-t stage 1 fc1", peak_mib=2.0)
    two[0]["speedup"] = {"eager": 1.5, "onednn": 1.2}
    (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*one, *two]))
    line = next(line for line in readme.measured(results).splitlines() if line.startswith("| Swin-T's linear layers"))
    against = "1.50 to 3.00 × eager, 1.20 to 1.20 × onednn (1 of 2 cases)"
    memory = "peak at most, MiB: native 2; eager 2"
    assert f"(2 cases) | native 10.0 ms to 10.0 ms | {against} | {memory}" in line
    assert line.endswith("1111111, 2222222?, 2026-01-02 |")
    assert "`make bench ARGS='--again --part \"linear: swin-t\"'`" in line


def test_a_line(results: Path) -> None:
    sdpa = row("sdpa", lacks="bias", peak_mib=7.04)
    ours, eager = pair(speedup={"eager": 3.0, "sdpa": 2.346}, percent_of_limit=61.4, limit="memory")
    assert lines(results, ours, eager, sdpa) == [
        [
            "window attention, forward + backward: 16 windows of 392 tokens, 4 heads",
            "native 10.0 ms (9.00 to 12.0), 61 % of the memory limit",
            "3.00 × eager, 2.35 × sdpa (no bias)",
            "10 MiB; eager 50, sdpa 7.0",
            "`make bench ARGS='--again --part \"window_attention: cpu\"'`",
            "[window_attention.jsonl](benchmarks/results/window_attention.jsonl) 0123456, 2026-01-01",
        ]
    ]


def test_peaks_below_the_meters_rounding(results: Path) -> None:
    ours, eager = pair(peak_mib=-0.1)
    assert lines(results, ours, eager | {"peak_mib": 12.3})[0][3] == "0.0 MiB; eager 12"


def test_several_groups_are_an_op() -> None:
    rows = [row("native", op="linear_argmax", case=case) for case in ("vq", "dalle 16 frames")]
    assert readme._command(rows) == "make bench ARGS='--again --part \"linear_argmax\"'"


def test_the_last_machine_is_shown_and_a_gpu_beside_it(results: Path) -> None:
    old = pair(commit="1111111", date="2026-01-01")
    new = pair(commit="2222222", date="2026-01-02", machine={"cpu": "Other CPU", "cores": 2, "isa": "AVX2"}, dirty=True)
    case = {"case": "swin-b video stage 1", "machine": GPU, "dtype": "bfloat16"}
    gpu = [row("triton", 2e3, speedup={"eager": 2.0}, **case), row("eager", 4e3, **case)]
    first, second = lines(results, *new, *old, *gpu)
    assert first[5].endswith("2222222+, 2026-01-02")
    assert second[1] == "triton 2.00 s (1.80 to 2.40)"
    assert second[4] == "`make bench-gpu ARGS='--again --part \"window_attention: swin-b video\"'`"


def test_what_no_gpu_has_run_is_said_to_be_unmeasured(results: Path) -> None:
    assert lines(results, *pair(machine=GPU))
    missing = [line for line in readme.measured(results).splitlines() if "not measured" in line]
    assert any("`linear_argmax`" in line and "`make bench-gpu`" in line for line in missing)
    assert not any("`window_attention`" in line for line in missing)


def test_once_a_gpu_has_run_all_ops_none_is_unmeasured() -> None:
    """The loader is measured on a CPU, beside whatever GPU."""
    assert list(readme._unmeasured([row("triton", op=op, machine=GPU) for op in OPS])) == []


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("no <!-- measured: begin -->")):
        readme.updated("# bevt\n", runs.FOLDER)


def test_a_part_that_was_run_with_other_threads_takes_no_picture_away(results: Path) -> None:
    whole = everything()
    alone = pair(op="linear", case="swin-t stage 1 qkv", threads=1, date="2026-01-02")
    pictured = list(readme._pictures(runs.newest(whole)))
    assert pictured
    assert list(readme._pictures(runs.newest([*whole, *alone]))) == pictured


def test_a_busy_machines_rows_are_marked(results: Path) -> None:
    busy, eager = pair(others_cores=0.4)
    assert lines(results, busy, eager)[0][5].endswith(" 0123456!, 2026-01-01")
