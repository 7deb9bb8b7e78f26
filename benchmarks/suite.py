"""`make bench`, `make bench-gpu`: the ops' tests, then every benchmark of this device, in order of worth.

Works from the source tree without installing. Each part is a process of its own, so that a fault in one leaves the
others; its rows are in benchmarks/results, and in the folder $OUT where that is set, as soon as a case is done. It ends
after ten minutes, or what the longest part named with `--part` needs; begun again, it measures what has no rows of this
code, machine and versions yet, or with `--again` all. What rests on a test that is red is not measured. `--dry-run`
lists the parts and compiles every Triton kernel for every architecture.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from bevt_kernels.select import IMPLEMENTATIONS

from benchmarks import rows, verify
from benchmarks.arguments import obstacle, seconds
from benchmarks.interrupts import terminable
from benchmarks.problems import KINDS
from benchmarks.registry import DTYPES, OPS, PARTS, TEST_SECONDS, TESTS, TOKENIZER_TESTS, Part

SECONDS = {"cpu": 600.0, "cuda": 580.0}
"""For a run."""
ROUNDS = {"cpu": 3.0, "cuda": 1.0}
"""Seconds for the timed rounds of a case."""
IMPLEMENTATION = {"cpu": "native", "cuda": "triton"}
"""Of ours; the plain PyTorch rival of a kernel is "eager", our own reference is for tests."""
OVER = "out of time"
"""What is said of a part that was not begun, or did not end, for that."""
GRACE = 30.0
"""What a part may take beyond its limit before it is stopped: a limit is looked at between cases."""


class Command(NamedTuple):
    """A part that is no op: another command of this package."""

    about: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    """Modules that the ops do without."""
    device: str
    """On which it runs, whatever the run's."""
    tests: tuple[str, ...] = ()
    """As those of an op (`registry.Op`)."""


COMMANDS = {
    "tokenizer": Command(
        "what tokenizing only frames with a masked position saves; layouts, precisions",
        ("--seconds", "15", "--device", "cpu", "--threads", str(torch.get_num_threads())),
        ("safetensors",),
        "cpu",
        TOKENIZER_TESTS,
    ),
    "data": Command(
        "the loader: samples/s of every decoder on real clips and photographs; a manifest of 100,000 videos",
        ("--seconds", "1"),
        ("av", "PIL", "rich"),
        "cpu",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 1 where a test is red or a part failed, 2 where it cannot begin."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=PARTS)
    parser.add_argument("--part", action="append", default=[], help="a part, or all of an op; may be repeated")
    parser.add_argument("--again", action="store_true", help="what has rows already too")
    parser.add_argument("--dry-run", action="store_true", help="list the parts, compile the kernels, measure nothing")
    parser.add_argument("--time-limit", type=seconds, help=f"seconds; default: {SECONDS}, or what a named part needs")
    args = parser.parse_args(arguments)
    parts = [part for part in PARTS[args.device] if not args.part or {part.name, part.op}.intersection(args.part)]
    for wanted in args.part:
        if not any(wanted in (part.name, part.op) for part in parts):
            names = ", ".join(repr(part.name) for part in PARTS[args.device])
            print(f"no part {wanted!r} for {args.device}; there are: {names}", file=sys.stderr)
            return 2
    if args.dry_run:
        return dry_run(args.device, parts)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("needs a CUDA GPU: torch sees none (--dry-run needs none)", file=sys.stderr)
        return 2
    if why := obstacle(*(rows.path(part.op) for part in parts)):
        print(f"nothing is measured: {why}", file=sys.stderr)
        return 2
    outcomes: list[tuple[Part, str]] = []
    limit = args.time_limit or SECONDS[args.device]
    if args.part and not args.time_limit:  # as its row's command names it
        limit = max(limit, TESTS[args.device] + 2 * max(part.seconds for part in parts))
    start = time.monotonic()
    if out := os.environ.get("OUT"):
        os.environ["OUT"] = os.path.abspath(out)  # parts run in another folder
    try:
        with terminable():
            code = measure(args.device, parts, args.again, limit, outcomes)
    except KeyboardInterrupt:
        code = 130
    print(f"\n{'part':50}outcome")
    print("\n".join(f"{part.name:50}{outcome}" for part, outcome in outcomes))
    print(f"rows: benchmarks/results; {time.monotonic() - start:.0f} s in all")
    if code == 130 or any(OVER in outcome for _, outcome in outcomes):
        print("begun again, it goes on with what is left (--time-limit for more at a time)")
    return code


def measure(device: str, parts: Sequence[Part], again: bool, seconds: float, outcomes: list[tuple[Part, str]]) -> int:
    """Tests, then the parts, for at most `seconds`; how each went is added to `outcomes`. Returns the exit code."""
    start = time.monotonic()
    red = _red_tests(device, parts, seconds)
    limits = _limits(device) if any(part.op in OPS for part in parts) else []
    pace = 1.0  # of this machine: times as long as the registry says
    for i, part in enumerate(parts):
        begun = time.monotonic()
        left = start + seconds - begun
        print(f"\n== {part.name} ({i + 1} of {len(parts)}, {begun - start:.0f} s in)", flush=True)
        if red.intersection(_tests(part.op)):
            outcome = "not measured: its tests are red"
        elif part.seconds > seconds:
            outcome = f"not measured: it takes {part.seconds:.0f} s: name it with --part, or a longer --time-limit"
        elif left < pace * part.seconds:
            outcome = f"not measured: {OVER}"
        elif part.op in COMMANDS and not again and _has_rows(part.op):
            outcome = "has rows of this code and machine"
        elif missing := [name for name in _needs(part.op) if importlib.util.find_spec(name) is None]:
            outcome = f"not measured: needs {', '.join(missing)}"
            absent = {"op": part.op, "case": "all", "absent": outcome}
            rows.save(rows.path(part.op), [{**rows.environment(COMMANDS[part.op].device), **absent}])
        else:
            most = min(left, 4 * part.seconds)  # one that hangs must not cost the others' time
            try:
                outcome = _run(_command(part, device, again, most, limits), most + GRACE)
            except KeyboardInterrupt:
                outcomes.append((part, f"interrupted, {time.monotonic() - begun:.0f} s"))
                raise
            if outcome == OVER and most < left:
                outcome = f"ended by force: it took over {most + GRACE:.0f} s"
            pace = max(pace, (time.monotonic() - begun) / part.seconds)
        outcomes.append((part, f"{outcome}, {time.monotonic() - begun:.0f} s"))
    return int(bool(red) or any(outcome.startswith("ended") for _, outcome in outcomes))


def _red_tests(device: str, parts: Sequence[Part], seconds: float) -> set[str]:
    """Patterns of the parts' tests that are not green; each may take all the time but ten seconds for each after it."""
    end = time.monotonic() + min(TEST_SECONDS[device], seconds)
    patterns = list(dict.fromkeys(pattern for part in parts for pattern in _tests(part.op)))
    red = set()
    for i, pattern in enumerate(patterns):
        left = end - time.monotonic() - 10 * (len(patterns) - i - 1)
        try:
            print(verify.green([pattern], device, max(10.0, left)), flush=True)
        except verify.GateClosed as closed:
            print(closed, file=sys.stderr)
            red.add(pattern)
    return red


def _tests(op: str) -> tuple[str, ...]:
    return COMMANDS[op].tests if op in COMMANDS else OPS[op].tests


def _needs(op: str) -> tuple[str, ...]:
    return COMMANDS[op].needs if op in COMMANDS else ()


def _has_rows(op: str) -> bool:
    return rows.measured(rows.path(op), rows.environment(COMMANDS[op].device), op=op)


def _limits(device: str) -> list[str]:
    """What the machine can do at most, as arguments of `run`: once, so that all parts have the same."""
    command = [sys.executable, "-m", "benchmarks.limits", device, str(torch.get_num_threads())]
    done = subprocess.run(
        command, cwd=verify.ROOT, env=verify.environment_of_tree(), stdout=subprocess.PIPE, text=True, check=True
    )
    print(f"limits, FLOP/s and bytes/s: {done.stdout.strip()}", flush=True)
    return ["--limits", *done.stdout.split()]


def _command(part: Part, device: str, again: bool, left: float, limits: list[str]) -> list[str]:
    if part.op in COMMANDS:
        return [part.op, *COMMANDS[part.op].words]
    missing = [] if again else ["--missing"]
    timing = ["--seconds", str(ROUNDS[device]), "--time-limit", f"{left:.0f}"]
    ours = ["--impl", IMPLEMENTATION[device]]
    return ["run", part.op, "--group", part.group, "--device", device, *timing, *limits, *ours, *missing]


def _run(words: list[str], seconds: float) -> str:
    """How a command of this package ended."""
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]]
    try:
        done = subprocess.run(command, cwd=verify.ROOT, env=verify.environment_of_tree(), timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return OVER
    return "done" if done.returncode == 0 else f"ended with {done.returncode}"


def dry_run(device: str, parts: Sequence[Part]) -> int:
    """Each part, its inputs and its time; then all kernels' machine code. Returns the exit code."""
    tests = sorted({pattern for part in parts for pattern in _tests(part.op)})
    print(f"first the tests, about {TESTS[device]:.0f} s and at most {TEST_SECONDS[device]:.0f}: {' '.join(tests)}")
    for part in parts:
        print(f"\n{part.name}: about {part.seconds:.0f} s")
        if part.op in COMMANDS:
            print(f"  {COMMANDS[part.op].about}")
            continue
        names = KINDS[part.op].names
        if IMPLEMENTATION[device] in names:  # an op's, of which `_command` asks for one alone
            names = tuple(name for name in names if name not in IMPLEMENTATIONS or name == IMPLEMENTATION[device])
        print(f"  {DTYPES[device]}, contestants: {', '.join(names)}")
        for name, entry in OPS[part.op].cases.items():
            if entry.group == part.group and device in entry.batch:
                shape = ", ".join(f"{key} {value}" for key, value in asdict(entry.case).items())
                few = "" if device in entry.compiled else "; without what is compiled for each case"
                print(f"  {name}: {entry.batch[device]} times {shape}{few}")
    whole = sum(part.seconds for part in parts)
    print(f"\n{len(parts)} parts, about {whole:.0f} s, and {TESTS[device]:.0f} s for the tests")
    if device == "cpu":
        return 0
    if importlib.util.find_spec("triton") is None:
        print("\nthe kernels' machine code needs Triton: pip install triton", file=sys.stderr)
        return 2
    print("\nevery Triton kernel, ahead of time:", flush=True)
    return subprocess.run([sys.executable, "-m", "benchmarks.aot", "--all"], cwd=verify.ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
