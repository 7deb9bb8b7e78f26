"""`python -m benchmarks.run OP`: verify, time in turns, write rows, print a table.

First the op's tests (remembered while kernels and tests do not change) and what the machine can do at most, then each
case: who cannot run and why; whether every contestant's output and gradients keep the error rule on the inputs that are
timed; times; peak memory. Rows are written case by case, so what was measured survives whatever ends the run. Exit code
1: one of our implementations is wrong or a test is red.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bevt_kernels.select import IMPLEMENTATIONS

from benchmarks import limits, memory, problems, rows, timing, verify
from benchmarks.arguments import above_zero, obstacle, seconds, threads
from benchmarks.interrupts import terminable
from benchmarks.problems import Work
from benchmarks.registry import OPS, QUANTITIES, TEST_SECONDS, grown
from benchmarks.tables import short

FORWARD, BACKWARD, BOTH, FROZEN, STEP = QUANTITIES
SECONDS = {"cpu": 25.0, "cuda": 1.5}
"""For the timed rounds of one case."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    with terminable():
        return _main(_parser().parse_args(arguments))


def _main(args: argparse.Namespace) -> int:
    start = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA GPU: torch sees none", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    entries = OPS[args.op].cases
    unknown = [case for case in args.case if case not in entries]
    if unknown:
        print(f"no case {unknown[0]!r}; there are: {', '.join(map(repr, entries))}", file=sys.stderr)
        return 2
    cases = [
        name
        for name, entry in entries.items()
        if args.device in entry.batch and (name in args.case or not args.case) and args.group in (None, entry.group)
    ]
    if not cases:
        there = [(name, entry.group) for name, entry in entries.items() if args.device in entry.batch]
        listed = ", ".join(f"{name!r} of group {group!r}" for name, group in there)
        print(f"no case for {args.device} is left by --case and --group; there are: {listed}", file=sys.stderr)
        return 2
    out = args.out or rows.path(args.op)
    if why := obstacle(out):
        print(f"nothing is measured: {why}", file=sys.stderr)
        return 2
    done: list[rows.Row] = []
    code = 0
    try:
        environment = rows.environment(args.device)
        print(verify.green(OPS[args.op].tests, args.device, TEST_SECONDS[args.device]), flush=True)
        if args.missing:
            known = {"op": args.op, "device": args.device, "threads": torch.get_num_threads()}
            there_already = [
                case
                for case in cases
                if rows.measured(
                    out, environment, **known, case=case, problem=asdict(grown(args.op, case, args.device))
                )
            ]
            print("".join(f"has rows of this code and machine: {case}\n" for case in there_already), end="")
            cases = [case for case in cases if case not in there_already]
        most = limits.Limits(*args.limits) if args.limits else limits.measure(args.device) if cases else None
        for i, case in enumerate(cases):
            if time.monotonic() - start > args.time_limit:
                print(f"out of time, not measured: {', '.join(cases[i:])}")
                break
            seconds = args.seconds or SECONDS[args.device]
            measured = [{**environment, **row} for row in measure(args.op, case, args.device, args.impl, seconds, most)]
            print(rows.table(measured), flush=True)
            rows.save(out, measured)
            done += measured
    except verify.GateClosed as closed:
        print(closed, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: rows of {len({row['case'] for row in done})} cases are in {out}", file=sys.stderr)
        code = 130
    if done:
        print(f"\n{rows.summary(done)}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument(
        "--case", action="append", default=[], help="a case of benchmarks/registry.py; several are fine"
    )
    parser.add_argument("--group", help="a group of cases")
    parser.add_argument(
        "--impl", action="append", default=[], choices=IMPLEMENTATIONS, help="of our implementations, only these"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=threads, help="CPU threads of torch")
    parser.add_argument("--seconds", type=seconds, help=f"for the timed rounds of a case; default: {SECONDS}")
    parser.add_argument(
        "--limits", type=above_zero, nargs=2, metavar=("FLOPS", "BANDWIDTH"), help="of this machine; default: measured"
    )
    parser.add_argument("--missing", action="store_true", help="only cases without rows of this code and machine")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/OP.jsonl")
    parser.add_argument(
        "--time-limit", type=seconds, default=3600.0, help="seconds after which no further case is begun"
    )
    return parser


def measure(
    op: str,
    case: str,
    device: str,
    impls: Sequence[str] = (),
    seconds: float = 0.0,
    most: limits.Limits | None = None,
) -> list[rows.Row]:
    """Rows of one case, rounds for about `seconds`. Raises GateClosed where one of our implementations is wrong.

    Who cannot run or is wrong has a row that says why, without times.
    """
    torch._dynamo.reset()  # a compiler's limit of recompilations is by function, not by case
    problem = problems.build(op, case, device)
    print(f"\n{op}, {case}, {problem.dtype}, {torch.get_num_threads()} CPU threads:", flush=True)
    names, absent = [], {}
    for name, contestant in problem.contestants.items():
        if impls and contestant.ours and name in IMPLEMENTATIONS and name not in impls:
            continue
        if contestant.compiles and device not in OPS[op].cases[case].compiled:
            absent[name] = "is compiled for each case, and left out of this one"
        elif (name, device) == ("triton", "cpu") and not contestant.reasons:
            absent[name] = "is interpreted on a CPU, and not timed"
        elif contestant.reasons:
            absent[name] = f"cannot run: {'; '.join(contestant.reasons)}"
        else:
            names.append(name)
            if contestant.lacks:
                print(f"  {name} gives no {contestant.lacks}")
    good: list[str] = []
    if names:
        good, wrong = verify.contestants(problem, names)
        absent |= {name: f"is not timed: {why}" for name, why in wrong.items()}
    for name in list(good):
        try:
            problem.step(name)  # what is timed may be larger than what is judged
        except Exception as error:  # as in `verify.contestants`
            if problem.contestants[name].ours:
                raise verify.GateClosed(f"{name} fails, so nothing is timed: {verify.brief(error)}") from error
            absent[name] = f"is not timed: {verify.brief(error)}"
            good.remove(name)
    print("".join(f"  {name} {why}\n" for name, why in absent.items()), end="")
    print(f"  within the error rule: {', '.join(good) or 'nobody'}", flush=True)
    steps: dict[str, timing.Step] = {name: lambda mark, n=name: problem.step(n, False, mark) for name in good}
    frozen = [name for name in good if problem.contestants[name].ours] if problem.frozen else []
    steps |= {f"{name}, frozen": lambda mark, n=name: problem.step(n, True, mark) for name in frozen}
    others = timing.Others()
    times = timing.interleaved(steps, device, seconds, least=problem.least, warm=problem.warm)
    busy = others.cores()
    if busy is not None and busy > timing.BUSY:
        print(f"  other processes took {busy:.1f} cores meanwhile: these are no times of an idle machine", flush=True)
    notes = {name: problem.notes(name, len(times[name])) for name in good}
    peak = memory.peaks(problem, op, case, good, torch.get_num_threads()) if good else {}
    by_quantity: dict[str, dict[str, np.ndarray]] = {quantity: {} for quantity in problem.quantities}
    for name in good:
        forward, total = np.array(times[name]).T
        measured = {FORWARD: forward, BACKWARD: total - forward, BOTH: total, STEP: total}
        if problem.frozen and name in frozen:
            measured[FROZEN] = np.array(times[f"{name}, frozen"])[:, 1]
        for quantity in by_quantity.keys() & measured.keys():
            by_quantity[quantity][name] = measured[quantity]
    work = problem.work() if good else {}

    def row(quantity: str, name: str) -> rows.Row:
        contestant = problem.contestants[name]
        return {
            "op": op,
            "case": case,
            "problem": asdict(problem.case),
            "device": device,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "quantity": quantity,
            "contestant": name,
            "ours": contestant.ours,
            # The project may be run from its source tree, where the commit says more.
            "version": rows.version(contestant.package) or ("source tree" if contestant.package == "bevt" else None),
            "lacks": contestant.lacks or None,
        }

    unknown: rows.Row = {"p20_ms": None, "p50_ms": None, "p80_ms": None, "speedup": {}, "surcharge_over_frozen": None}
    last = [quantity for quantity in problem.quantities if quantity != FROZEN][-1]
    found = [{**row(last, name), "absent": why, **unknown} for name, why in absent.items()]
    for quantity, series in by_quantity.items():
        for name, ms in series.items():
            speedup = {
                rival: short(float(np.median(other / ms)))
                for rival, other in series.items()
                if rival != name and not problem.contestants[rival].ours
            }
            surcharge = None
            if quantity == BOTH and name in frozen:
                surcharge = short(float(np.median(ms / by_quantity[FROZEN][name])) - 1)
            found.append(
                {
                    **row(quantity, name),
                    **statistics(ms),
                    **_rates(
                        work[quantity].less(problem.spared(name)),
                        float(np.median(ms)) / 1e3,
                        most,
                        problem.direct_count,
                    ),
                    "peak_mib": _peak(peak.get(name), quantity),
                    "speedup": speedup,
                    "surcharge_over_frozen": surcharge,
                    "others_cores": None if busy is None else round(busy, 2),
                    **notes[name],
                }
            )
    return found


def statistics(ms: np.ndarray) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and how many rounds."""
    p20, p50, p80 = (short(float(x)) for x in np.quantile(ms, (0.2, 0.5, 0.8)))
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "rounds": len(ms)}


def _rates(work: Work, seconds: float, most: limits.Limits | None, direct: bool) -> dict[str, Any]:
    """Rates on the counted work, and the least time that the machine's limits allow for it over the measured one.

    The least time counts only pairs that no shift excludes, so that leaving them out is no way past 100 %. Where nobody
    counted the bytes, arithmetic is the limit.
    """
    percent, which = None, None
    if most and not direct:
        least = {"arithmetic": (work.flop_unmasked or work.flop) / most.flops}
        if work.bytes:
            least["memory"] = work.bytes / most.bandwidth
        which = max(least, key=lambda name: least[name])
        percent = short(100 * least[which] / seconds)
        if percent > 100:  # the limit was measured beside other work
            percent, which = None, None
    return {
        **asdict(work),
        "tflops": short(work.flop / seconds / 1e12),
        "gbps": short(work.bytes / seconds / 1e9) if work.bytes else None,
        "percent_of_limit": percent,
        "limit": which,
        "limits": {name: short(value) for name, value in most._asdict().items()} if most else None,
    }


def _peak(peaks: memory.Peaks | None, quantity: str) -> float | None:
    """MiB; None where it is not known, or is nothing of its own."""
    size = None if peaks is None else {FORWARD: peaks.forward, BOTH: peaks.both, STEP: peaks.both}.get(quantity)
    return None if size is None else round(size / 2**20, 1)


if __name__ == "__main__":
    sys.exit(main())
