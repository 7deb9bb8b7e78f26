"""`python -m benchmarks.plots`: pictures of the committed rows, benchmarks/plots/MACHINE-KIND.svg.

For each machine that has rows: speed beside others, memory, roofline, parts of a training step, scaling. Each shows the
newest run of a case (benchmarks/runs.py) and names commits in its footer; the same rows and code give the same bytes
with the same matplotlib. What has no rows is not drawn, and the command says so. --png writes PNGs too, to look at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks import runs
from benchmarks.rows import Row, Unreadable
from bevt.train.phases import PHASES

PLOTS = Path(__file__).parent / "plots"
DRAWN_BY = (Path(__file__), Path(runs.__file__))
"""The code that a picture is of."""
LOOK = {
    "svg.hashsalt": "bevt",  # ids of clip paths are random without
    "svg.fonttype": "path",  # looks the same where the font is missing
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "xtick.color": "0.2",
    "ytick.color": "0.2",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
BLUE, ORANGE, RED, GREEN, PINK, SKY, GREY = (
    *("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"),
    "#999999",
)
"""Okabe and Ito's palette: told apart by colour-blind readers, too. Blue is ours alone, but for phases."""
STYLES = {
    "reference": (GREY, "o"),
    "eager": (ORANGE, "o"),
    "eager compiled": (RED, "^"),
    "eager half": (ORANGE, "v"),
    "dense": (ORANGE, "s"),
    "dense compiled": (RED, "v"),
    "ours, recomputing": (PINK, "s"),
    "sdpa": (GREEN, "s"),
    "flex": (PINK, "^"),
    "xformers": (SKY, "v"),
    "torchvision": (GREEN, "P"),
    "onednn": (GREEN, "v"),
    "torch linear_cross_entropy": (GREEN, "X"),
    "liger": (SKY, "o"),
    "cut cross-entropy": (PINK, "v"),
    "cut cross-entropy exact": (PINK, "P"),
    "quack": (SKY, "s"),
}
"""Colour and marker by contestant."""
OTHER = ("0.2", "x")
PHASE_COLORS = dict(zip(PHASES, (GREY, SKY, BLUE, ORANGE, GREEN), strict=True))


class Kind(NamedTuple):
    """A kind of picture."""

    pick: Callable[[list[Row]], list[Row]]
    """Of one machine's newest rows those that it shows."""
    draw: Callable[[Figure, list[Row]], None]
    title: str
    needs: str
    """What there is none of where nothing is picked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("--png", action="store_true", help="PNGs too")
    args = parser.parse_args(arguments)
    try:
        rows = runs.newest(runs.read())
    except Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    if not rows:
        print(f"no rows in {runs.FOLDER}: nothing is drawn, and nothing removed", file=sys.stderr)
        return 2
    drawn = pictures(rows)
    for path in PLOTS.glob("*.svg"):
        if path.name not in drawn:
            path.unlink()
            print(f"{path.name}: removed, as no rows are left for it")
    for name, picked in drawn.items():
        write(PLOTS / name, picked, args.png)
        print(f"{name}: {len(picked)} rows")
    for there, of_machine in runs.grouped(rows, runs.machine).items():
        for name, kind in KINDS.items():
            if not kind.pick(of_machine):
                print(f"no {file_name(there, name)}: no {kind.needs}")
    return 0


def pictures(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of every picture that can be drawn of the newest rows, by file name."""
    found = {
        file_name(there, name): kind.pick(of_machine)
        for there, of_machine in runs.grouped(rows, runs.machine).items()
        for name, kind in KINDS.items()
    }
    return {name: picked for name, picked in found.items() if picked}


def file_name(machine: str, kind: str) -> str:
    """Of a picture: MACHINE-KIND.svg, of letters, digits and hyphens."""
    return f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}-{kind}.svg"


def fingerprint(rows: list[Row]) -> str:
    """What a picture's description says of its rows and of the code that draws, by which it is known to be stale."""
    drawn = json.dumps([rows, *(path.read_text() for path in DRAWN_BY)], sort_keys=True)
    return f"rows and code {hashlib.sha256(drawn.encode()).hexdigest()[:16]}"


def write(path: Path, rows: list[Row], png: bool = False) -> None:
    """Draw one picture of the rows that its kind picks."""
    kind = KINDS[path.stem.rsplit("-", 1)[-1]]
    with style.context(["default", LOOK]):
        figure = Figure()
        kind.draw(figure, rows)
        dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
        title = f"{kind.title}\n{runs.machine(rows[0])}; {dtypes}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        foot = 0.22 / figure.get_figheight()
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, rect=(0, foot, 1, 1 - foot))
        figure.text(0.01, foot / 4, _footer(rows), fontsize=6.5, color="0.45")
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Creator": None, "Description": fingerprint(rows)}
        figure.savefig(path, format="svg", metadata=about)
        if png:
            figure.savefig(path.with_suffix(".png"), format="png", dpi=110)


def _footer(rows: list[Row]) -> str:
    """Commits and dates."""
    commits = sorted({(row["date"], runs.commit(row)) for row in rows}, reverse=True)
    listed = ", ".join(f"{commit} ({date})" for date, commit in commits)
    return f"benchmarks/results at {listed}" + "; +: with changes not committed" * ("+" in listed)


def _look(row: Row) -> dict[str, Any]:
    """Colour, marker and place above others of a contestant's points and lines."""
    if runs.ours(row):
        fill = {"mfc": "white"} if "," in row["contestant"] else {}  # a second one of ours: "fused, tokens kept"
        return {"color": BLUE, "marker": "D", "zorder": 4, **fill}
    color, marker = STYLES.get(row["contestant"], OTHER)
    return {"color": color, "marker": marker, "zorder": 3}


def _label(row: Row) -> str:
    return f"{row['contestant']} (ours)" if runs.ours(row) else row["contestant"]


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One for all axes, ours first, below them."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            found.setdefault(label, handle)
    labels = sorted(found, key=lambda label: "(ours)" not in label)
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower left", ncols=5, borderaxespad=2.2)  # above the footer


def _plain(ticks: Any, values: Iterable[float]) -> None:
    """Ticks of a logarithmic axis at these values, as plain numbers."""
    ticks.set_major_locator(FixedLocator(list(values)))
    ticks.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ticks.set_minor_locator(NullLocator())


def _between(low: float, high: float, steps: Sequence[float]) -> list[float]:
    """Those of `steps` times a power of ten that lie in a range."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10**ten for ten in tens for step in steps if low <= step * 10**ten <= high]


def _pick_speed(rows: list[Row]) -> list[Row]:
    """Whole work of every case that has one of ours and another."""
    timed = [row for row in runs.whole(rows) if row.get("p50_ms") and not runs.swept(row)]
    groups = runs.grouped(timed, runs.case).values()
    return [row for group in groups if len({runs.ours(row) for row in group}) == 2 for row in group]


def _draw_speed(figure: Figure, rows: list[Row]) -> None:
    """Medians over that of ours, with their 20th and 80th percentiles: a line a case."""
    ax = figure.subplots()
    y, names, low, high = 0.0, {}, 0.9, 1.1
    several = len({row["dtype"] for row in rows}) > 1
    for op, of_op in runs.grouped(rows, lambda row: row["op"]).items():
        y += 0.4
        ax.text(0, y, f"{op}, {of_op[0]['quantity']}", transform=ax.get_yaxis_transform(), weight="bold", va="center")
        for (_, case, dtype), of_case in runs.grouped(of_op, runs.case).items():
            y += 1
            names[y] = case + f", {dtype}" * several
            base = next(row for row in of_case if runs.ours(row))["p50_ms"]
            ax.axhline(y, color="0.93", lw=0.6, zorder=0)
            for row in of_case:
                p20, p50, p80 = (row[name] / base for name in ("p20_ms", "p50_ms", "p80_ms"))
                spread = [[p50 - p20], [p80 - p50]]
                ax.errorbar(
                    p50, y, xerr=spread, ms=6 if runs.ours(row) else 5, mew=0.9, lw=1.1, label=_label(row), **_look(row)
                )
                low, high = min(low, p20), max(high, p80)
            ax.text(1.01, y, runs.duration(base), transform=ax.get_yaxis_transform(), va="center", color=BLUE)
        y += 1
    ax.text(1.01, -0.4, "ours", transform=ax.get_yaxis_transform(), va="center", color=BLUE, weight="bold")
    ax.axvline(1, color=BLUE, lw=1, alpha=0.5, zorder=1)
    ax.set(xscale="log", xlim=(low / 1.05, high * 1.05), ylim=(y - 0.4, -0.7), yticks=list(names))
    ax.set_yticklabels(list(names.values()))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    _plain(ax.xaxis, _between(low / 1.05, high * 1.05, (1, 1.5, 2, 3, 4, 6, 8)))
    ax.set_xlabel("median time over ours, 20th to 80th percentile (log); right of 1: ours is faster")
    ax.spines["left"].set_visible(False)
    figure.set_size_inches(9, 1.9 + 0.21 * y)
    _legend(figure, [ax])


def _sweep(rows: list[Row], field: str, *follow: str) -> list[Row]:
    """The most cases that differ in one field of their problem, and in those that follow from it.

    At least two; of window attention's either all shifted or none.
    """

    def others(row: Row) -> tuple[Any, ...]:
        rest = {name: value for name, value in row["problem"].items() if name not in (field, *follow)}
        return row["op"], row["dtype"], any(row["problem"].get("shift", ())), json.dumps(rest, sort_keys=True)

    def values(group: list[Row]) -> int:
        return len({json.dumps(row["problem"][field]) for row in group})

    there = [row for row in rows if field in (row.get("problem") or {})]
    best = max(runs.grouped(there, others).values(), key=values, default=[])
    return best if best and values(best) > 1 else []


def _lines(ax: Axes, rows: list[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> None:
    """A line a contestant, on logarithmic axes."""
    for of_contestant in runs.grouped(rows, lambda row: row["contestant"]).values():
        points = sorted((x(row), y(row)) for row in of_contestant)
        mine = runs.ours(of_contestant[0])
        width, size = (2.2, 6) if mine else (1.2, 5)
        ax.plot(*zip(*points), lw=width, ms=size, label=_label(of_contestant[0]), **_look(of_contestant[0]))
    ax.set(xscale="log", yscale="log")
    low, high = min(map(y, rows)) / 1.3, max(map(y, rows)) * 1.3
    ax.set_ylim(low, high)
    _plain(ax.yaxis, _between(low, high, (1, 2, 5) if high / low < 1000 else (1,)))
    _plain(ax.xaxis, sorted(set(map(x, rows))))


def _times(size: Sequence[int]) -> str:
    return " × ".join(map(str, size))


def _memory_sweeps(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of window attention's series for memory, by the field that grows."""
    swept = [row for row in runs.whole(rows) if row["op"] == "window_attention" and runs.swept(row)]
    known = [row for row in swept if row.get("peak_mib")]
    sweeps = {"batch": _sweep(known, "batch"), "window": _sweep(known, "window", "table", "table_window", "shift")}
    return {field: found for field, found in sweeps.items() if found}


def _pick_memory(rows: list[Row]) -> list[Row]:
    return [row for found in _memory_sweeps(rows).values() for row in found]


def _draw_memory(figure: Figure, rows: list[Row]) -> None:
    """Peak above the inputs, against the batch and against the window."""
    sweeps = _memory_sweeps(rows)
    panels = figure.subplots(1, len(sweeps), squeeze=False)[0]
    for ax, (field, found) in zip(panels, sweeps.items()):
        p = found[0]["problem"]
        about = f"map {_times(p['grid'])}, {p['heads']} heads of {p['head_dim']}"
        if field == "batch":
            _lines(ax, found, lambda row: row["problem"]["batch"], lambda row: row["peak_mib"])
            ax.set_title(f"{about}, window {_times(p['window'])}")
            ax.set_xlabel("batch [clips] (log)")
        else:
            sizes = {math.prod(row["problem"]["window"]): _times(row["problem"]["window"]) for row in found}
            _lines(ax, found, lambda row: math.prod(row["problem"]["window"]), lambda row: row["peak_mib"])
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _, sizes=sizes: f"{x:g}\n{sizes.get(round(x), '')}"))
            ax.set_title(f"{about}, batch {p['batch']}")
            ax.set_xlabel("tokens a window (log)")
    panels[0].set_ylabel("peak memory [MiB] (log)")
    figure.set_size_inches(4.6 * len(sweeps) + 0.4, 4.4)
    _legend(figure, panels)


def _flop(row: Row) -> float:
    """Of pairs that no shift excludes, where that was counted."""
    return row.get("flop_unmasked") or row["flop"]


def _pick_roofline(rows: list[Row]) -> list[Row]:
    """Ours and eager where work and limits are known."""
    work = [row for row in runs.whole(rows) if row.get("flop") and row.get("bytes") and row.get("limits")]
    known = [row for row in work if not runs.swept(row)]
    groups = runs.grouped(known, runs.case).values()
    return [
        row
        for group in groups
        if any(map(runs.ours, group))
        for row in group
        if runs.ours(row) or row["contestant"] == "eager"
    ]


def _draw_roofline(figure: Figure, rows: list[Row]) -> None:
    """Each case's rate over its FLOP a byte, under the highest limits that its runs measured; eager hollow.

    Points that would hide each other are set side by side.
    """
    ax, side = figure.subplots(1, 2, width_ratios=(1.9, 1))
    side.axis("off")
    colors = dict(zip(dict.fromkeys(row["op"] for row in rows), (BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY) * 2))
    xs, ys = [_flop(row) / row["bytes"] for row in rows], [_rate(row) for row in rows]
    flops, bandwidth = (max(row["limits"][name] for row in rows) for name in ("flops", "bandwidth"))
    ridge = flops / bandwidth
    left, right = min(*xs, ridge) / 2, max(*xs, ridge) * 2
    low, high = min(ys) / 1.5, max(*ys, flops) * 1.5
    groups = runs.grouped(rows, lambda row: row["op"])
    line, step, number = 1.0, 1 / (1.3 * len(groups) + sum(map(runs.ours, rows))), 0
    wide, tall = math.log(right / left) / 36, math.log(high / low) / 24  # of a point, on axes of six inches by four
    taken: list[tuple[float, float]] = []
    for op, of_op in groups.items():
        color = colors[op]
        side.text(0, line, f"{op}, {of_op[0]['quantity']}", weight="bold", fontsize=8, va="top", color=color)
        line -= step
        for of_case in runs.grouped(of_op, runs.case).values():
            row, *eager = sorted(of_case, key=runs.ours, reverse=True)
            x, rate, number = math.log(_flop(row) / row["bytes"]), _rate(row), number + 1
            y = math.log(rate)
            steps = (wide * sign * i for i in range(len(rows)) for sign in (1, -1))
            x += next(d for d in steps if not any(abs(x + d - u) < wide and abs(y - v) < tall for u, v in taken))
            taken.append((x, y))
            for other in map(_rate, eager):
                ax.plot([math.exp(x)] * 2, [rate, other], color=color, lw=0.8, zorder=2)
                ax.plot(math.exp(x), other, "o", ms=6, mfc="white", color=color, zorder=3)
            ax.plot(math.exp(x), rate, "o", ms=11, color=color, mec="white", mew=0.5, zorder=4)
            inside: dict[str, Any] = {"color": "white", "fontsize": 6.5, "weight": "bold", "zorder": 5}
            ax.text(math.exp(x), rate, str(number), ha="center", va="center_baseline", **inside)
            percent = row.get("percent_of_limit")
            share = f": {percent:.0f} % of {row['limit']}" if percent else ""
            side.text(0.02, line, f"{number}  {row['case']}{share}", fontsize=7.5, va="top")
            line -= step
        line -= 0.3 * step
    ax.plot([], [], "o", ms=9, color="0.4", label="ours")
    ax.plot([], [], "o", ms=6, mfc="white", color="0.4", label="eager")
    roof = f"measured: {_prefixed(flops)}FLOP/s, {_prefixed(bandwidth)}B/s"
    ax.plot([left, ridge, right], [left * bandwidth, flops, flops], color="0.25", lw=1.4, zorder=2, label=roof)
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    for axis, ticks in ((ax.xaxis, _between(left, right, (1, 2, 5))), (ax.yaxis, _between(low, high, (1, 2, 5)))):
        _plain(axis, ticks)
        axis.set_major_formatter(FuncFormatter(lambda x, _: _prefixed(x).strip()))
    above = "; above the roof: counted as direct convolutions" if any(row["op"] == "conv3x3" for row in rows) else ""
    ax.set_xlabel(f"FLOP a byte, each byte moved once (log){above}")
    ax.set_ylabel("FLOP a second (log)")
    figure.set_size_inches(10, max(5.2, 0.17 / step + 1.4))
    _legend(figure, [ax])


def _rate(row: Row) -> float:
    """FLOP a second."""
    return 1e3 * _flop(row) / row["p50_ms"]


def _prefixed(x: float) -> str:
    """1.2e12 -> "1.2 T"."""
    power = max(0, int(math.log10(x) // 3))
    return f"{x / 1000**power:.3g} {' kMGTP'[power].strip()}"


def _pick_step(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["op"] == "train_step" and row.get("seconds") and row.get("p50_ms")]


def _draw_step(figure: Figure, rows: list[Row]) -> None:
    """Seconds of each phase, a bar a path; rivals first."""
    ax = figure.subplots()
    unit, scale = ("s", 1.0) if max(row["p50_ms"] for row in rows) > 2e3 else ("ms", 1e3)
    longest = scale * max(sum(row["seconds"].values()) for row in rows)
    least = longest / 1000
    shown = [name for name in PHASE_COLORS if any(scale * row["seconds"].get(name, 0) > least for row in rows)]
    y, names = 0.0, {}
    for (_, case, _), of_case in runs.grouped(rows, runs.case).items():
        ax.text(0, y, case, transform=ax.get_yaxis_transform(), weight="bold", va="center")
        for row in sorted(of_case, key=runs.ours):
            y += 0.8
            names[y] = row["contestant"]
            left = 0.0
            for part in shown:
                width = scale * row["seconds"].get(part, 0)
                ax.barh(y, width, 0.62, left, color=PHASE_COLORS[part], label=part, edgecolor="white", linewidth=0.6)
                if width > longest / 18:
                    shade = "white" if part == "encoder" else "black"
                    ax.text(
                        left + width / 2, y, runs.digits(width), ha="center", va="center", fontsize=7.5, color=shade
                    )
                left += width
            faster = [f"{ratio:.2f} times as fast" for ratio in row.get("speedup", {}).values() if runs.ours(row)]
            ink: dict[str, Any] = {"color": BLUE, "weight": "bold"} if faster else {}
            ax.text(left + longest / 100, y, ", ".join([runs.duration(row["p50_ms"]), *faster]), va="center", **ink)
        y += 1.2
    ax.set(
        xlim=(0, 1.12 * longest), ylim=(y - 0.7, -0.5), yticks=list(names), xlabel=f"time of a step, median [{unit}]"
    )
    ax.set_yticklabels(list(names.values()))
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    figure.set_size_inches(9, 1.6 + 0.34 * y)
    _legend(figure, [ax])


def _scaling_sweeps(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of the encoder by the field that grows."""
    known = [row for row in runs.whole(rows) if row["op"] == "video_swin_step" and row.get("p50_ms")]
    sweeps = {"frames": _sweep(known, "frames"), "side": _sweep(known, "side")}
    return {field: found for field, found in sweeps.items() if found}


def _pick_scaling(rows: list[Row]) -> list[Row]:
    return list({id(row): row for found in _scaling_sweeps(rows).values() for row in found}.values())


def _draw_scaling(figure: Figure, rows: list[Row]) -> None:
    """Time a clip above, peak memory below, against frames and against the side."""
    sweeps = _scaling_sweeps(rows)
    panels = figure.subplots(2, len(sweeps), squeeze=False, sharex="col")
    for (above, below), (field, found) in zip(panels.T, sweeps.items()):
        p = found[0]["problem"]
        fixed = f"{p['side']} × {p['side']} pixels" if field == "frames" else f"{p['frames']} frames"
        batch = f"{p['batch']} clip{'s' * (p['batch'] > 1)}"
        above.set_title(f"Swin {p['size']}, {batch} of {fixed}")

        def at(row: Row, field: str = field) -> float:
            return row["problem"][field]

        _lines(above, found, at, lambda row: row["p50_ms"] / row["problem"]["batch"])
        peaks = [row for row in found if row.get("peak_mib")]
        if peaks:
            _lines(below, peaks, at, lambda row: row["peak_mib"])
        below.set_xlabel("frames a clip (log)" if field == "frames" else "side of a frame [pixels] (log)")
    panels[0, 0].set_ylabel("time a clip [ms] (log)")
    panels[1, 0].set_ylabel("peak memory [MiB] (log)")
    figure.set_size_inches(4.4 * len(sweeps) + 0.4, 6.4)
    _legend(figure, panels.flat)


KINDS = {
    "speed": Kind(
        _pick_speed, _draw_speed, "Time of ours and of others on the same inputs", "case with ours and a rival"
    ),
    "memory": Kind(
        _pick_memory,
        _draw_memory,
        "Peak memory of window attention above its inputs, forward + backward",
        "window_attention cases of several batches or windows, else alike",
    ),
    "roofline": Kind(_pick_roofline, _draw_roofline, "Rates under the measured limits", "rows with limits"),
    "step": Kind(_pick_step, _draw_step, "Where a training step's time goes", "train_step"),
    "scaling": Kind(
        _pick_scaling,
        _draw_scaling,
        "Video Swin, forward + backward",
        "video_swin_step cases of several frames or sides, else alike",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
