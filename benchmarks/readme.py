"""`python -m benchmarks.readme`: the README's measured claims, made of committed rows; `make plots` calls it.

Replaces what is between the two marks in README.md. CLAIMS says which cases are shown; of each the newest run on a CPU
and on a GPU (benchmarks/runs.py), under the machine it was on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plots, runs
from benchmarks.registry import OPS, PARTS
from benchmarks.rows import Row, Unreadable

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
BOTH = "forward+backward"


class Claim(NamedTuple):
    """A line: cases of an op."""

    op: str
    quantity: str
    words: str
    group: str = ""
    """Of the op's cases; "": all."""
    case: str = ""
    """This one alone."""

    def shows(self, row: Row) -> bool:
        """Whether the row is one of the line's."""
        if (row["op"], row["quantity"]) != (self.op, self.quantity):
            return False
        return self.case == row["case"] if self.case else self.group in ("", OPS[self.op].cases[row["case"]].group)


WINDOWS = "window attention, forward + backward: "
CLAIMS = (
    Claim(
        "train_step", "step", "a training step of Swin-T, one clip and eight images, update included; DALL-E's tokens",
        case="swin-t, dalle",
    ),
    Claim("train_step", "step", "the same with this project's tokenizer", case="swin-t, vq"),
    Claim("train_step", "step", "a training step of Swin-B, eight clips and 64 images, update included", "swin-b"),
    Claim("video_swin_step", BOTH, "encoder of Swin-T, forward + backward", case="swin_t encoder step"),
    Claim("videomae_step", BOTH, "VideoMAE-B's pretraining, one clip, forward + backward"),
    Claim("timesformer_step", BOTH, "TimeSformer-B on one clip of 8 frames, forward + backward"),
    Claim("vivit_step", BOTH, "ViViT-B, model 1, on one clip of 32 frames, forward + backward"),
    Claim("window_attention", BOTH, WINDOWS + "16 windows of 392 tokens, 4 heads", case="cpu target"),
    Claim("window_attention", BOTH, WINDOWS + "the same, shifted", case="cpu target shifted"),
    Claim("window_attention", BOTH, WINDOWS + "Swin-T's stages, clips", "swin-t video"),
    Claim("window_attention", BOTH, WINDOWS + "Swin-T's stages, images", "swin-t image"),
    Claim("window_attention", BOTH, WINDOWS + "Swin-B's stages, clips", "swin-b video"),
    Claim(
        "masked_linear_cross_entropy", BOTH, "linear head and cross-entropy, 1176 masked rows, 1024 to 8192", "cpu",
        "cpu target",
    ),
    Claim("masked_linear_cross_entropy", BOTH, "the same, 512 classes", case="vq"),
    Claim("masked_linear_cross_entropy", BOTH, "linear head and cross-entropy, 8 clips", "swin-b"),
    Claim("masked_head", BOTH, "decoder and head at masked positions alone, forward + backward; dense: at all"),
    Claim("linear", BOTH, "Swin-T's linear layers, forward + backward"),
    Claim("linear_argmax", "forward", "DALL-E's codes: largest output of a linear layer, 2048 to 8192", "dalle"),
    Claim("conv3x3", "forward", "3x3 convolutions of DALL-E's tokenizer"),
)  # fmt: skip
EMBEDDED = ("speed", "step", "memory")
"""Kinds of plots that are shown; the others are linked."""
KERNELS = {
    "window_attention forward": "window attention's forward in Triton: instructions a score",
    "masked_linear_cross_entropy bf16": "loss and gradient in Triton, 8192 classes, bfloat16: instructions a logit",
    "linear_argmax bf16": "`linear_argmax` in Triton, bfloat16: instructions a logit behind the product",
}
"""Of aot.json."""

HEAD = """\
Medians, with the 20th and 80th percentile, of contestants that took turns after a check of their results. "2.00 ×
eager": eager takes twice the time of ours, by the median over rounds. Memory is the peak above the inputs, outputs and
gradients included. The limit is the fastest large product, or copy, of the same run; a convolution counts as a direct
one, of which ours multiplies a quarter. Decoding has no contestants: a mean over samples, the faster of two passes; a
manifest's time is the median of five loads. `make plots` writes this part, of each case from the newest run in
`benchmarks/results/`; a commit with a + had changes that were not committed, one with a ? is of a tree without git,
which cannot tell, one with a ! was measured beside other work.
"""
COLUMNS = ("what", "ours", "against", "memory", "command", "row")


class Line(NamedTuple):
    """One line of the table, cell by cell, and where it was measured."""

    machine: str
    date: str
    cells: tuple[str, str, str, str, str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.splitlines()[0]).parse_args(
        arguments
    )
    try:
        before = README.read_text()
        after = updated(before, runs.FOLDER)
    except (ValueError, OSError, Unreadable) as error:
        print(error, file=sys.stderr)
        return 2
    README.write_text(after)
    print(f"README.md: {'as it was' if after == before else 'written anew'}")
    return 0


def updated(text: str, results: Path) -> str:
    """The README's text with the part between the marks as the rows say.

    Raises ValueError where a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no {BEGIN.strip()} or no {END.strip()}: put both where the part belongs")
    return before + begin + measured(results) + end + after


def measured(results: Path) -> str:
    """The generated part: plots, then a table for each machine, the last measured first."""
    rows = runs.newest(runs.read(results))
    lines = [
        *(line for claim in CLAIMS for line in _claimed(claim, rows)),
        *_tokenizer(_last_cpu(rows, "tokenizer")),
        *_data(_last_cpu(rows, "data")),
        *_manifest(_last_cpu(rows, "data")),
        *_demo(results / "demo.jsonl"),
    ]
    groups = runs.grouped(lines, lambda line: line.machine).values()
    newest_first = sorted(groups, key=lambda group: max(line.date for line in group), reverse=True)
    tables = [_table(group[0].machine, [line.cells for line in group]) for group in newest_first]
    tables.append(_table("Machine code, counted without a GPU", list(_compiled(results / "aot.json"))))
    missing = list(_unmeasured(rows))
    if missing:
        tables.append(_table("GPUs", missing))
    return "\n".join([*_pictures(rows), HEAD, *tables])


def _pictures(rows: list[Row]) -> Iterator[str]:
    """The plots of the CPU and of the GPU that has most kinds of them, of several the last one measured."""
    there = plots.pictures(rows)
    for gpu in (False, True):
        here = [row for row in rows if bool(row["machine"].get("gpu")) == gpu]
        last_first = map(runs.machine, sorted(here, key=lambda row: row["date"])[::-1])
        drawn = {
            machine: {kind: name for kind in plots.KINDS if (name := plots.file_name(machine, kind)) in there}
            for machine in dict.fromkeys(last_first)
        }
        machine, names = max(drawn.items(), key=lambda item: len(item[1]), default=("", {}))
        for kind in EMBEDDED:
            if kind in names:
                yield f"![{plots.KINDS[kind].title}; {machine}](benchmarks/plots/{names[kind]})\n"
        others = [f"[{kind}](benchmarks/plots/{name})" for kind, name in names.items() if kind not in EMBEDDED]
        if others:
            yield f"{machine}, too: {', '.join(others)}.\n"


def _last(rows: list[Row]) -> str | None:
    """The machine of the newest row."""
    return runs.machine(sorted(rows, key=lambda row: row["date"])[-1]) if rows else None


def _last_cpu(rows: list[Row], op: str) -> list[Row]:
    """Rows of a command that is no op, of the machine that ran it last."""
    there = [row for row in rows if row["op"] == op and not row["machine"].get("gpu")]
    return [row for row in there if runs.machine(row) == _last(there)]


def _table(title: str, lines: list[tuple[str, ...]]) -> str:
    body = [COLUMNS, ("---",) * len(COLUMNS), *lines]
    return f"**{title}**\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in body)


def _claimed(claim: Claim, rows: list[Row]) -> Iterator[Line]:
    """At most a line for the last CPU and one for the last GPU that have rows of it."""
    for gpu in (False, True):
        here = [row for row in rows if claim.shows(row) and bool(row["machine"].get("gpu")) == gpu]
        shown = [row for row in here if runs.machine(row) == _last(here)]
        mine = [row for row in shown if runs.ours(row)] or shown[:1]
        if len({row["case"] for row in mine}) > 1:
            yield _range(claim, mine, shown)
        else:
            yield from (_line(claim, row, {each["contestant"]: each for each in shown}) for row in mine)


def _range(claim: Claim, mine: list[Row], rows: list[Row]) -> Line:
    """Several cases in one line, from the least to the most."""
    times = sorted(row["p50_ms"] for row in mine)
    names = dict.fromkeys(name for row in mine for name in row["speedup"])
    ratios = {name: sorted(row["speedup"][name] for row in mine if name in row["speedup"]) for name in names}
    against = ", ".join(
        f"{found[0]:.2f} to {found[-1]:.2f} × {name}"
        + (f" ({len(found)} of {len(mine)} cases)" if len(found) < len(mine) else "")
        for name, found in ratios.items()
    )
    most = {
        name: max(
            (row["peak_mib"] for row in rows if row["contestant"] == name and row.get("peak_mib") is not None),
            default=None,
        )
        for name in (mine[0]["contestant"], *names)
    }
    memory = "; ".join(f"{name} {max(0, mib):.0f}" for name, mib in most.items() if mib is not None)
    ours = f"{mine[0]['contestant']} {runs.duration(times[0])} to {runs.duration(times[-1])}"
    about = f"{claim.words} ({len(mine)} cases)"
    return _of(mine, about, ours, against, f"peak at most, MiB: {memory}", _command(mine))


def _line(claim: Claim, row: Row, contestants: dict[str, Row]) -> Line:
    low, high = (runs.digits(row[name] / (1e3 if row["p50_ms"] >= 999.5 else 1)) for name in ("p20_ms", "p80_ms"))
    ours = "" if runs.ours(row) else "none; "
    ours += f"{row['contestant']} {runs.duration(row['p50_ms'])} ({low} to {high})"
    if row.get("percent_of_limit"):
        ours += f", {row['percent_of_limit']:.0f} % of the {row['limit']} limit"
    rivals = {name: contestants.get(name, {}) for name in row["speedup"]}
    against = ", ".join(
        f"{row['speedup'][name]:.2f} × {name}" + (f" (no {rival['lacks']})" if rival.get("lacks") else "")
        for name, rival in rivals.items()
    )
    return _of([row], claim.words, ours, against, _memory(row, rivals), _command([row]))


def _memory(row: Row, rivals: dict[str, Row]) -> str:
    """Peaks: ours, then the others'."""
    if row.get("peak_mib") is None:
        return ""

    def mib(of: Row) -> str:
        peak = max(0, of["peak_mib"])  # below 0 is the meter's rounding
        return f"{peak:.{1 if peak < 9.95 else 0}f}"

    theirs = [f"{name} {mib(rival)}" for name, rival in rivals.items() if rival.get("peak_mib") is not None]
    return "; ".join([f"{mib(row)} MiB", *([", ".join(theirs)] if theirs else [])])


def _command(rows: Sequence[Row]) -> str:
    """What measures them again, as they were: parts of a whole run."""
    op = rows[0]["op"]
    groups = {OPS[op].cases[row["case"]].group for row in rows} if op in OPS else {""}
    part = f"{op}: {groups.pop()}" if groups != {""} and len(groups) == 1 else op
    return f"make bench{'-gpu' * bool(rows[0]['machine'].get('gpu'))} ARGS='--again --part \"{part}\"'"


def _of(rows: list[Row], what: str, ours: str, against: str, memory: str, command: str) -> Line:
    """With the rows' file, their commits from the oldest to the newest, and the newest one's date."""
    *_, last = ordered = sorted(rows, key=lambda row: row["date"])
    commits = ", ".join(dict.fromkeys(map(runs.commit, ordered)))
    link = f"[{last['op']}.jsonl](benchmarks/results/{last['op']}.jsonl) {commits}, {last['date']}"
    return Line(runs.machine(last), last["date"], (what, ours, against, memory, f"`{command}`", link))


def _tokenizer(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        if "saving" in row:
            yield _of(
                [row],
                f"tokenizing only frames that hold a masked position: {row['case']}",
                runs.duration(row["p50_ms"]),
                f"{100 * row['saving']:.0f} % less time than all frames, for "
                f"{100 - 100 * row['share_of_frames']:.0f} % fewer frames, with the same tokens",
                "",
                _command([row]),
            )


def _data(rows: list[Row]) -> Iterator[Line]:
    """PyAV's backend on real files, beside bare loops without it."""
    for of_case in runs.grouped(rows, lambda row: row["case"]).values():
        by = {
            row["contestant"].split(",")[0]: row for row in reversed(of_case)
        }  # of two loops the one to the last frame
        bare = by.get("bare PyAV", by.get("bare Pillow"))
        if bare is None or "embedded" in bare["case"]:
            continue
        row, loop = by["pyav"], bare["contestant"].split(",")[0]
        whole = row["decode_ms"] + row["augment_ms"]
        yield _of(
            [row],
            f"decoding on one core: {row['case']}, {row['quantity']}",
            f"pyav {runs.duration(row['decode_ms'])}; with resize and crop {runs.duration(whole)}",
            f"{100 * bare['decode_ms'] / row['decode_ms']:.0f} % of the rate of {loop} "
            f"({runs.duration(bare['decode_ms'])}); with resize and crop {100 * bare['decode_ms'] / whole:.0f} %",
            "",
            _command([row]),
        )


def _manifest(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        if "load_mib" in row:
            loaded = runs.duration(1e3 * row["load_seconds"])
            what = f"loading a manifest of {row['quantity']}"
            yield _of([row], what, loaded, "", f"{row['load_mib']:.0f} MiB a process", _command([row]))


def _demo(path: Path) -> Iterator[Line]:
    """The last run; its rows are of another form than those of ops."""
    for row in runs.rows_of.read(path)[-1:]:
        machine = f"{row['cpu']}, {row['machine'].split(', ')[-1]}"
        below = (
            f"{100 - 100 * row[f'val_loss_{stream}'] / row[f'entropy_{stream}']:.1f} % ({stream})"
            for stream in ("clips", "images")
        )
        cells = (
            "both stages learn",
            f"in {sum(row['seconds'].values()) / 60:.1f} minutes, data and tokenizer included",
            f"held-out masked cross-entropy below the entropy of the token frequencies: {', '.join(below)}",
            "",
            "`make demo`",
            f"[demo.jsonl](benchmarks/results/demo.jsonl) {runs.commit(row)}, {row['date']}",
        )
        yield Line(machine, row["date"], cells)


def _compiled(path: Path) -> Iterator[tuple[str, ...]]:
    counted: dict[str, Any] = json.loads(path.read_text())
    link = f"[aot.json](benchmarks/results/aot.json), Triton {counted.pop('triton')}"
    for kernel, words in KERNELS.items():
        of = {architecture: kernels[kernel] for architecture, kernels in counted.items()}
        count = ", ".join(f"{entry['instructions']:.1f} ({name})" for name, entry in of.items())
        spills = max(entry["spills"] for entry in of.values())
        yield (
            words,
            count,
            "",
            f"at most {spills:g} spills each" if spills else "no spills",
            "`python -m benchmarks.aot`",
            link,
        )


def _unmeasured(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Ops that no GPU has a row of."""
    measured = {row["op"] for row in rows if row["machine"].get("gpu")}
    left = [op for op in dict.fromkeys(part.op for part in PARTS["cuda"]) if op in OPS and op not in measured]
    if left:
        yield ", ".join(f"`{op}`" for op in left), "not measured", "", "", "`make bench-gpu`", ""


if __name__ == "__main__":
    sys.exit(main())
