"""Results as JSON lines, one row a contestant and quantity, each with commit, machine and versions."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import verify
from benchmarks.registry import OPS, PARTS
from benchmarks.tables import aligned
from bevt.data.processes import cores

Row = dict[str, Any]

RESULTS = ("benchmarks/results", "benchmarks/plots", "README.md")
"""What is made of measurements, from the root: no change of what is measured."""

MEASURED = (
    *("bevt", "kernels", "benchmarks/problems"),
    *(f"benchmarks/{name}.py" for name in ("timing", "memory", "limits", "foreign", "registry", "verify", "run")),
    *("benchmarks/tokenizer.py", "benchmarks/data.py"),
)
"""What a row is of, from the root: with this as it was, a case need not be measured again."""

PEERS = (
    *("torchvision", "transformers", "xformers", "liger-kernel", "cut-cross-entropy", "quack-kernels"),
    *("av", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
)
"""Distributions whose versions rows have, where they are installed."""

CASE = ("commit", "dirty", "machine", "op", "case")
"""What every row says, times or not."""
KEY = (*CASE, "dtype", "contestant", "quantity", "threads")
"""A new row takes the place of one that agrees in these; all others stay."""


def path(op: str) -> Path:
    """The committed rows of an op."""
    return verify.ROOT / "benchmarks" / "results" / f"{op}.jsonl"


class Unreadable(Exception):
    """A line of a file of rows is none; the message is for the user."""


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file. Raises Unreadable, with file and line, where one is broken."""
    try:
        return parse(_text(path), str(path))
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path} is no text in UTF-8 ({error}): no file of rows") from error


def parse(text: str, name: str) -> list[Row]:
    """The rows of a file's text. Raises Unreadable as `read`."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = error
        if not isinstance(row, dict):
            raise Unreadable(f"{name}:{number} is no row of JSON: mend the line or remove it")
        found.append(row)
    return found


def check(path: Path) -> None:
    """Raise Unreadable or OSError unless rows can be merged into `path`, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file for the rows")
    tempfile.TemporaryFile(dir=path.parent).close()
    read(path)


def environment(device: str) -> Row:
    """What a row says about where it was measured; nothing in it names a host or a path.

    A tree without git history takes its commit from the environment variable BEVT_COMMIT; `tree` is the hash of
    MEASURED in any case. Date and time are UTC; `run` is when it was asked, which rows of one command have in common.
    """
    # Not of a repository around this tree.
    own = _output("git", "-C", str(verify.ROOT), "rev-parse", "--show-toplevel") == str(verify.ROOT.resolve())
    commit = _output("git", "-C", str(verify.ROOT), "rev-parse", "HEAD") if own else None
    named = commit or os.environ.get("BEVT_COMMIT")
    now = datetime.datetime.now(datetime.timezone.utc)
    if not named:
        print("no git history here: rows will not say their commit; set BEVT_COMMIT to it", file=sys.stderr)
    changes = _output(
        "git", "-C", str(verify.ROOT), "status", "--porcelain", "--", ".", *(f":!{path}" for path in RESULTS)
    )
    return {
        "commit": named or "unknown",
        "dirty": None if commit is None else bool(changes),
        "tree": verify.tree(*MEASURED),
        "date": now.strftime("%Y-%m-%d"),
        "run": now.strftime("%H:%M:%S"),
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
            **{peer: found for peer in PEERS if (found := version(peer))},
        },
        "clocks": _clocks(device),
    }


def _cpu() -> str:
    """Its name, and where there are such numbers family and model: a virtual machine's name may say no more than whose
    it is, and two generations with the same instructions may differ by a factor of two.
    """
    told = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE))
    if "model name" not in told:
        return platform.machine()
    numbers = f" (family {told['cpu family']}, model {told['model']})" if {"cpu family", "model"} <= told.keys() else ""
    return told["model name"].strip() + numbers


def machine(device: str) -> Row:
    """Of this machine what times depend on."""
    found: Row = {
        "cpu": _cpu(),
        "cores": cores(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.splitlines()[0] if driver else None
    return found


def _clocks(device: str) -> Row | None:
    """MHz as the system tells them when the run begins, where it does; not part of `machine`, as they wander."""
    if device == "cuda":
        names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
        told = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits")
        values = [float(x) for x in re.findall(r"[\d.]+", told.splitlines()[0])] if told else []
        return dict(zip(names, values)) if len(values) == len(names) else None
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return {"cpu": max(map(float, found))} if found else None


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def version(package: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(path: Path, rows: list[Row]) -> None:
    """Merge `rows` into the file at `path`, at once and whole, and add them to $OUT/rows.jsonl where that is set.

    What says that a whole command could not run gives way to rows of it. Processes that save at the same time wait for
    each other. Raises Unreadable where the file is broken.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {_key(row) for row in rows}
    if not all("absent" in row for row in rows):
        new |= {_key({**{name: row.get(name) for name in CASE}, "case": "all"}) for row in rows}
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        kept = [row for row in read(path) if _key(row) not in new]
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in (*kept, *rows)))
        temporary.replace(path)
    finally:
        os.close(folder)
    if folder_out := os.environ.get("OUT"):
        try:
            with (Path(folder_out) / "rows.jsonl").open("a") as out:
                out.writelines(f"{json.dumps(row)}\n" for row in rows)
        except OSError as error:  # the rows are in `path`
            print(f"no copy of these rows in $OUT: {error}", file=sys.stderr)


def measured(path: Path, environment: Row, **wanted: Any) -> bool:
    """Whether `path` has rows of this very code, machine and versions that have the `wanted` values, with times."""
    wanted = json.loads(json.dumps(wanted | {name: environment[name] for name in ("tree", "machine", "versions")}))
    found = (row for row in read(path) if "absent" not in row)
    return any(all(row.get(name) == value for name, value in wanted.items()) for row in found)


def _key(row: Row) -> str:
    return json.dumps([row.get(name) for name in KEY], sort_keys=True)


COLUMNS = {
    "p20_ms": "p20 ms",
    "p50_ms": "p50 ms",
    "p80_ms": "p80 ms",
    "tflops": "TFLOP/s",
    "gbps": "GB/s",
    "percent_of_limit": "% limit",
    "peak_mib": "peak MiB",
}


def table(rows: list[Row]) -> str:
    """A plain table of one case's rows; "x NAME" is that rival's time over the row's, the median over rounds."""
    rows = [row for row in rows if row["p50_ms"] is not None]
    rivals = sorted({name for row in rows for name in row["speedup"]})
    head = ["quantity", "contestant", *COLUMNS.values(), *(f"x {name}" for name in rivals)]
    body = [
        [row["quantity"], row["contestant"]]
        + [_cell(row[column]) for column in COLUMNS]
        + [_cell(row["speedup"].get(name)) for name in rivals]
        for row in rows
    ]
    surcharges = [
        f"{row['contestant']}: the bias table's gradient adds {100 * row['surcharge_over_frozen']:.1f} %"
        for row in rows
        if row["surcharge_over_frozen"] is not None
    ]
    return "\n".join([aligned([head, *body], (0, 1)), *surcharges])


def summary(rows: list[Row]) -> str:
    """Medians in milliseconds: a line a case and quantity, a column a contestant."""
    rows = [row for row in rows if row["p50_ms"] is not None]
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        lines.setdefault((row["case"], row["quantity"]), {})[row["contestant"]] = _cell(row["p50_ms"])
    body = [[*line, *(cells.get(name, "-") for name in names)] for line, cells in lines.items()]
    return aligned([["case", "median ms", *names], *body], (0, 1))


def main() -> int:
    """`python -m benchmarks.rows FILE...`: merge rows that came back from another machine into benchmarks/results."""
    files = [Path(name) for name in sys.argv[1:]]
    if not files or not all(file.is_file() for file in files):
        print("usage: python -m benchmarks.rows FILE..., each the rows.jsonl that a run left in $OUT", file=sys.stderr)
        return 2
    by_op: dict[str, list[Row]] = {}
    ops = {part.op for parts in PARTS.values() for part in parts}
    try:
        came = [row for file in files for row in read(file)]
        for row in came:
            needed = (*KEY, "date", "device", "p50_ms") if row.get("op") in OPS and "absent" not in row else CASE
            lacks = [key for key in needed if key not in row]
            if row.get("op") not in ops or lacks:
                what = f"has no {', '.join(lacks)}" if lacks and row.get("op") in ops else "is of no op that is known"
                raise Unreadable(f"a row {what}: {str(row)[:200]}")
    except Unreadable as error:
        print(f"nothing is merged: {error}", file=sys.stderr)
        return 2
    for row in came:
        by_op.setdefault(row["op"], []).append(row)
    for op, found in by_op.items():
        save(path(op), list({_key(row): row for row in found}.values()))
        print(f"{path(op).name}: {len(found)} rows")
    return 0


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
