"""What NVIDIA's profiler says of a contestant's kernels: `python -m benchmarks.ncu OP --case CASE` (`make ncu`).

One step of the contestant, forward and backward on the registry's inputs, runs under Nsight Compute after two that are
not profiled, and prints a row a kernel, the slowest first. The report with every section that is collected goes to
build/ncu (for `ncu-ui`), with the numbers in CSV beside it.

Each kernel runs several times for its counters, with caches emptied before and clocks left alone, as benchmarks.timing
has them. Exit code 2: there is no profiler, no GPU, or no permission to read its counters.

Options, columns and pages are those of the Nsight Compute CLI manual (docs.nvidia.com/nsight-compute/NsightComputeCli,
2025); metrics those of its profiling guide, by their names, which a label on the details page may stand for.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import problems, tables, verify
from benchmarks.registry import OPS

FOLDER = verify.ROOT / "build" / "ncu"
WARM_UP = 2
"""Steps that are not profiled: they compile."""

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
"""In the report, beside the metrics of the table."""

FORBIDDEN = "ERR_NVGPUCTRPERM"
"""What the profiler's message begins with where the driver keeps its counters to administrators."""


def total(values: Sequence[float], _: Sequence[float]) -> float:
    """Of all launches of a kernel; the second argument has their durations."""
    return sum(values)


def largest(values: Sequence[float], _: Sequence[float]) -> float:
    """Of all launches."""
    return max(values)


def mean(values: Sequence[float], durations: Sequence[float]) -> float:
    """Of all launches, weighted with their durations."""
    return sum(x * t for x, t in zip(values, durations)) / max(sum(durations), 1e-9)


class Column(NamedTuple):
    """One number of a kernel."""

    title: str
    metrics: dict[str, str]
    """Metrics that are added up, each with its label on the details page, or "" where no section has it."""
    over: Callable[[Sequence[float], Sequence[float]], float]
    """Of a kernel's launches one number."""
    scale: float = 1.0
    """From the metric's base unit to the column's."""


DURATION = "gpu__time_duration.sum"
COLUMNS = (
    Column("us", {DURATION: "Duration"}, total, 1e-3),
    Column("% SM", {"sm__throughput.avg.pct_of_peak_sustained_elapsed": "Compute (SM) Throughput"}, mean),
    Column("% tensor", {"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ""}, mean),
    Column("% issue", {"smsp__issue_active.avg.pct_of_peak_sustained_active": "Issue Slots Busy"}, mean),
    Column("% DRAM", {"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "DRAM Throughput"}, mean),
    Column("% L2 hit", {"lts__t_sector_hit_rate.pct": "L2 Hit Rate"}, mean),
    Column("% occupancy", {"sm__warps_active.avg.pct_of_peak_sustained_active": "Achieved Occupancy"}, mean),
    Column("registers", {"launch__registers_per_thread": "Registers Per Thread"}, largest),
    Column(
        "shared KiB",
        {
            "launch__shared_mem_per_block_dynamic": "Dynamic Shared Memory Per Block",
            "launch__shared_mem_per_block_static": "Static Shared Memory Per Block",
        },
        largest,
        2**-10,
    ),
    Column(
        "spilled MiB",  # that local memory was read and written for
        {f"l1tex__t_bytes_pipe_lsu_mem_local_op_{what}.sum": "" for what in ("ld", "st")},
        total,
        2**-20,
    ),
)
"""Percentages are of the peak: of the kernel's time, but tensor, issue and occupancy of the time in which an SM works.
Registers are a thread's, shared memory a program's."""

Launch = dict[str, float]
"""Metrics by name."""


class ProfilerError(Exception):
    """The profiler cannot be used here; the message says why and what to do."""


def command(ncu: str, report: Path, kernel: str | None, program: Sequence[str]) -> list[str]:
    """The profiler's, for `program`, which marks what is profiled by cudaProfilerStart and -Stop.

    `report` is without suffix; `kernel` is a regular expression for the names of kernels.
    """
    sections = [argument for section in SECTIONS for argument in ("--section", section)]
    metrics = [metric for column in COLUMNS for metric in column.metrics]
    return [
        *(ncu, "--profile-from-start", "off", "--target-processes", "all"),
        *(["--kernel-name", f"regex:{kernel}"] if kernel else []),
        *(*sections, "--metrics", ",".join(metrics), "--apply-rules", "no"),
        *("--cache-control", "all", "--clock-control", "none"),
        # Of a run that exports a report, nothing is printed unless a page is named.
        *("--csv", "--page", "details", "--print-units", "base", "--log-file", f"{report}.csv"),
        *("--export", str(report), "--force-overwrite"),
        *program,
    ]


def profile(report: Path, kernel: str | None, program: Sequence[str]) -> str:
    """Run `program` under the profiler; what that writes. Raises ProfilerError."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ProfilerError(
            "ncu is not on PATH: it is NVIDIA's Nsight Compute, which comes with the CUDA toolkit "
            "(as /usr/local/cuda/bin/ncu) and from developer.nvidia.com/nsight-compute"
        )
    report.parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{report}.csv")
    log.unlink(missing_ok=True)
    environment = {**verify.environment_of_tree(), "LC_ALL": "C"}  # a locale may write 2508800 as 2.508.800
    done = subprocess.run(
        command(ncu, report, kernel, program),
        cwd=verify.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    text = log.read_text() if log.exists() else ""
    if FORBIDDEN in done.stdout + text:
        raise ProfilerError(
            "the driver keeps this GPU's counters for administrators: run as root (a container needs "
            "--cap-add=SYS_ADMIN too), or have one load the driver with NVreg_RestrictProfilingToAdminUsers=0 "
            f"(developer.nvidia.com/{FORBIDDEN})"
        )
    if done.returncode:
        raise RuntimeError(
            f"the profiled process failed (exit code {done.returncode}):\n{(done.stdout + text)[-4000:]}"
        )
    return text


def launches(text: str) -> dict[str, list[Launch]]:
    """By kernel, from the details page in CSV: a row a launch and metric, after lines of the profiler's own.

    A metric that this GPU does not have is "n/a" or the like, and left out. Raises ValueError where no kernel is found,
    or where units are not what was asked for.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    labels = {label: metric for column in COLUMNS for metric, label in column.metrics.items() if label}
    found: dict[str, dict[tuple[str, str], Launch]] = {}
    for row in csv.DictReader(line for line in lines[start:] if not line.startswith("==")):
        name, value = row["Metric Name"], row["Metric Value"].replace(",", "")
        if not re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", value):
            continue
        if labels.get(name, name) == DURATION and row["Metric Unit"] not in ("ns", "nsecond"):
            raise ValueError(f"{name} of {row['Kernel Name']} is in {row['Metric Unit']!r}, asked for in nanoseconds")
        launch = found.setdefault(row["Kernel Name"], {}).setdefault((row["Process ID"], row["ID"]), {})
        if name in labels:
            launch.setdefault(labels[name], float(value))
        else:  # in full it is the metric that was asked for, whatever a section puts under its label
            launch[name] = float(value)
    if not found:
        raise ValueError(f"no kernel was profiled:\n{text[-2000:]}")
    return {kernel: list(each.values()) for kernel, each in found.items()}


def cells(of: list[Launch]) -> list[float | None]:
    """A kernel's number in each column; None where the GPU does not tell."""
    durations = [launch.get(DURATION, 0.0) for launch in of]
    found: list[float | None] = []
    for column in COLUMNS:
        if all(metric in launch for launch in of for metric in column.metrics):
            values = [sum(launch[metric] for metric in column.metrics) for launch in of]
            found.append(column.over(values, durations) * column.scale)
        else:
            found.append(None)
    return found


def table(kernels: dict[str, list[Launch]]) -> str:
    """A row a kernel, the one with the longest time first."""
    rows = sorted(((name, len(of), cells(of)) for name, of in kernels.items()), key=lambda row: -(row[2][0] or 0))
    lines = [["kernel", "launches", *(column.title for column in COLUMNS)]]
    for name, number, values in rows:
        shown = re.sub(r"^void |at::native::|\(anonymous namespace\)::", "", name)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."  # torch's have hundreds of characters of templates
        lines.append([shown, str(number), *("-" if value is None else f"{value:.4g}" for value in values)])
    return tables.aligned(lines)


def step(op: str, case: str, name: str) -> None:
    """In the profiled process: one step of contestant `name` between the profiler's marks, after a warm-up."""
    problem = problems.build(op, case, "cuda")
    if reasons := problem.contestants[name].reasons:
        sys.exit(f"{name} cannot run: {'; '.join(reasons)}")
    for _ in range(WARM_UP):
        problem.step(name)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    problem.step(name)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _default(names: Iterable[str]) -> str:
    """Of an op's contestants: our kernels on a GPU."""
    names = list(names)
    return "triton" if "triton" in names else names[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ncu", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--case", required=True, help="a case of benchmarks/registry.py for a GPU")
    parser.add_argument("--impl", help="whose step: an implementation or a rival (default: triton)")
    parser.add_argument("--kernel", metavar="REGEX", help="only kernels with such a name")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)  # what runs under the profiler
    args = parser.parse_args(arguments)
    cases = [name for name, entry in OPS[args.op].cases.items() if "cuda" in entry.batch]
    names = problems.KINDS[args.op].names
    impl = args.impl or _default(names)
    for what, given, there in (("case", args.case, cases), ("contestant", impl, names)):
        if given not in there:
            print(f"no {what} {given!r} for a GPU; there are: {', '.join(map(repr, there))}", file=sys.stderr)
            return 2
    if not torch.cuda.is_available():
        print("needs a CUDA GPU: torch sees none", file=sys.stderr)
        return 2
    if args.step:
        step(args.op, args.case, impl)
        return 0
    report = FOLDER / re.sub(r"[^\w.-]+", "-", f"{args.op} {args.case} {impl}")
    program = [sys.executable, "-m", "benchmarks.ncu", args.op, "--case", args.case, "--impl", impl, "--step"]
    try:
        found = launches(profile(report, args.kernel, program))
    except ProfilerError as error:
        print(error, file=sys.stderr)
        return 2
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.op}, {args.case}, {impl}, {torch.cuda.get_device_name()}:")
    print(table(found))
    print(
        f"report: {os.path.relpath(report)}.ncu-rep, to be opened with ncu-ui; numbers: {os.path.relpath(report)}.csv"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
