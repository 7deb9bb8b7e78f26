"""`python -m benchmarks.check`: is the working tree slower than another commit?

    python -m benchmarks.check                    the commit of this machine's newest committed rows is the base
    python -m benchmarks.check --base HEAD~1 --op linear --threads 2
    python -m benchmarks.check --ratios           no other commit: ours against eager, for CI

Each side is a process of its own (`check_worker.py`) that steps our contestant of its own tree; they take turns, and
what is judged is the ratio of their times in one round. Several pairs of processes serve one verdict, and what looks
slower is measured again before it is called so. First our results of the working tree are judged by the error rule.
Exit code 1: slower, or wrong; 2: no base, or a side that cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bevt_kernels import native

from benchmarks import check_worker, problems, rows, tables, timing, trees, verify
from benchmarks.arguments import positive, seconds, threads
from benchmarks.interrupts import terminable
from benchmarks.registry import OPS, QUANTITIES
from benchmarks.trees import Unusable

Key = tuple[str, str]
"""Op and case."""

CHOSEN: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "window_attention": ("cpu target", "cpu target shifted"),
        "masked_linear_cross_entropy": ("cpu target", "vq"),
        "linear_argmax": ("dalle 16 frames", "vq"),
        "linear": ("swin-t stage 1 fc1", "swin-t stage 4 fc2"),
        "conv3x3": ("dalle group 2, 5 frames", "dalle group 4, 20 frames"),
        "train_step": ("swin-t, vq",),  # the shortest
        **dict.fromkeys(("videomae_step", "vivit_step", "timesformer_step"), ()),  # long, and their layers are above
    },
    "cuda": {
        "window_attention": ("swin-b video stage 1 shifted", "swin-b video stage 3"),
        "masked_linear_cross_entropy": ("swin-b 8 clips, recipe masks", "vq"),
        "linear_argmax": ("dalle 128 frames", "vq"),
        "videomae_step": (),
    },
}
"""Cases by device and op where neither --op nor --case says which; of an op that is missing, its first."""

RATIOS: tuple[Key, ...] = (
    ("window_attention", "cpu target shifted"),
    ("masked_linear_cross_entropy", "cpu target"),
    ("linear_argmax", "dalle 16 frames"),
    ("linear", "swin-t stage 3 fc1"),
    ("conv3x3", "dalle group 2, 5 frames"),
)
"""Of --ratios, on the CPU."""

LIMIT = 1.05
"""A ratio of times that is let pass. One process is up to 5 % faster than another with the same code: by where its
memory lies."""

FRACTION, FRACTIONS = 0.75, {"window_attention": 0.35}
"""Of the smallest committed speed-up over eager that another machine must reach, and of some ops' another one: eager
window attention writes all scores, and its time varies by a factor of two between machines of one kind with what fresh
memory costs."""

SECONDS = {"cpu": 10.0, "cuda": 3.0}
"""For the timed rounds of one case, in all sessions together; --ratios has one."""

LEAST, MOST = 5, 40
"""Rounds of a session."""

TURN_MS, TURN_STEPS = 60.0, 50
"""How long a side's turn lasts, by as many steps as fit, at least one. The other side has used the caches since."""

CLASS = ("cpu", "cores", "isa", "gpu")
"""What makes two machines comparable, of a row's "machine"."""

DRAWS = 2000
"""Of the bootstrap."""


class Slower(NamedTuple):
    """Times of the working tree over the base's."""

    ratio: float
    """The median of the sessions' medians."""
    low: float
    """The smallest lower end of the sessions' 95 % intervals."""
    high: float
    """The largest upper end."""

    def word(self) -> str:
        """What is known: "slower", "faster", "same", or "unclear" where the noise is as large as the limit."""
        if self.low > LIMIT:
            return "slower"
        if self.high < 1 / LIMIT:
            return "faster"
        return "same" if self.low >= 1 / LIMIT and self.high <= LIMIT else "unclear"


def judge(sessions: Sequence[Sequence[float]]) -> Slower:
    """The verdict on ratios, round by round, of several pairs of processes.

    Within a session rounds are independent but for load, and a bootstrap of their median says how well it is known;
    between sessions the ratio moves by more than that, since memory lies where it lies for a process' whole life. Three
    sessions are too few for a deviation of that (t = 4.3), but a slow-down that the code has shows in each: so the ends
    are the most lenient session's, and chance has to strike in all of them. `against` asks for this of a case whose
    ratio was above the limit in other processes before.
    """
    draw = np.random.default_rng(0)
    ends = []
    for ratios in sessions:
        medians = np.median(draw.choice(np.asarray(ratios), (DRAWS, len(ratios))), axis=1)
        ends.append(np.quantile(medians, (0.025, 0.975)))
    lows, highs = zip(*ends)
    return Slower(float(np.median([np.median(ratios) for ratios in sessions])), float(min(lows)), float(max(highs)))


class Worker:
    """A process that steps the cases of the tree at `root`; see `check_worker.Side` for what can be asked."""

    def __init__(self, what: str, root: Path, threads: int) -> None:
        self.what = what
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, `close` does
        # Threads that spin after a step take the other side's core; 10000 is what the trainer sets too.
        environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, check_worker.__file__],
            cwd=root,
            env={**environment, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.send("hello", root=str(root), threads=threads)

    def send(self, do: str, **arguments: Any) -> None:
        """Ask, without waiting."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `reply` says more
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)

    def reply(self) -> dict[str, Any]:
        """The next answer. Raises Unusable where it is an error, or the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": self._last_words()}
        if "error" in found:
            raise Unusable(f"{self.what} cannot be measured: {found['error']}")
        return found

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask and wait."""
        self.send(do, **arguments)
        return self.reply()

    def step(self, n: int) -> list[float]:
        """Milliseconds of `n` steps."""
        return self.ask("step", n=n)["ms"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        return f"its process ended with code {code}\n{self.errors.read()[-2000:]}"


@contextlib.contextmanager
def workers(sides: dict[str, Path], threads: int) -> Generator[list[Worker], None, None]:
    """A fresh process for each tree, ready to build."""
    found: list[Worker] = []
    try:
        found += [Worker(what, root, threads) for what, root in sides.items()]
        for worker in found:
            worker.reply()
        yield found
    finally:
        for worker in found:
            worker.close()


@dataclass
class Series:
    """One case's times: a list a session, of milliseconds a round."""

    contestants: tuple[str, str] = ("", "")
    base: list[list[float]] = field(default_factory=list)
    new: list[list[float]] = field(default_factory=list)

    def verdict(self) -> Slower:
        return judge([[b / a for a, b in zip(*pair)] for pair in zip(self.base, self.new)])

    def medians(self) -> tuple[float, float]:
        """Milliseconds, the base's first."""
        base, new = (float(np.median([ms for session in side for ms in session])) for side in (self.base, self.new))
        return base, new


def measure(
    sides: dict[str, Path], cases: Iterable[Key], device: str, threads: int, seconds: float, sessions: int
) -> tuple[dict[Key, Series], list[Key]]:
    """Times of `cases` by `sides`, base first; and the cases that the base does not know as the working tree does.

    Raises Unusable where a side fails.
    """
    found = {key: Series() for key in cases}
    new: list[Key] = []
    for session in range(sessions):
        with workers(sides, threads) as pair:
            for key in [key for key in found if key not in new]:
                for worker in pair:
                    worker.send("build", op=key[0], case=key[1], device=device)
                base, ours = (worker.reply() for worker in pair)
                if base.get("problem") != ours.get("problem"):
                    new.append(key)
                    continue
                found[key].contestants = base["contestant"], ours["contestant"]
                times = _turns(pair, seconds / sessions)
                found[key].base.append(times[0])
                found[key].new.append(times[1])
                print(f"  session {session + 1} of {sessions}: {', '.join(key)}", flush=True)
    return {key: series for key, series in found.items() if key not in new}, new


def _turns(pair: Sequence[Worker], seconds: float) -> tuple[list[float], list[float]]:
    """A turn's median step in milliseconds, round by round; who is first changes from round to round."""
    slowest = max(worker.step(2)[-1] for worker in pair)  # compilation and first touch of memory are in the first
    n = min(TURN_STEPS, max(1, round(TURN_MS / slowest)))
    times: tuple[list[float], list[float]] = ([], [])
    start = time.monotonic()
    for i in range(MOST):
        if i >= LEAST and time.monotonic() - start > seconds:
            break
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            times[side].append(float(np.median(pair[side].step(n))))
    return times


def machine_class(machine: Any) -> tuple[Any, ...] | None:
    """Of a row's "machine"; None where that is no dictionary."""
    return tuple(machine.get(name) for name in CLASS) if isinstance(machine, dict) else None


def committed_rows(dirty: bool | None = False) -> list[rows.Row]:
    """Rows of a clean tree, as the last commit has them, or the files where there is no git.

    With `dirty` None instead those of trees without git, of which nobody knows whether they were clean.
    """
    folder = "benchmarks/results"
    names = [path.name for path in sorted((trees.ROOT / folder).glob("*.jsonl"))]
    try:
        texts = [trees.git("show", f"HEAD:{folder}/{name}").stdout for name in names]
    except OSError:
        texts = []
    if not any(texts):
        texts = [(trees.ROOT / folder / name).read_text() for name in names]
    found = [row for name, text in zip(names, texts) for row in rows.parse(text, f"{folder}/{name}")]
    return [row for row in found if row.get("dirty", True) is dirty]


def base_commit(committed: Sequence[rows.Row], machine: rows.Row) -> str:
    """The newest commit that this repository has and that has rows of machines like `machine`.

    Raises Unusable, with the classes there are, where none has; it says so where rows of trees without git are.
    """
    by_class: dict[tuple[Any, ...], set[str]] = {}
    for row in committed:
        where = machine_class(row.get("machine"))
        if where:
            by_class.setdefault(where, set()).add(row["commit"])
    mine = machine_class(machine)
    known, unknown = [], ""
    for rev in by_class.get(mine or (), ()):
        try:
            known.append(trees.commit(rev))
        except Unusable as error:
            unknown = str(error)
    if not known and unknown:
        raise Unusable(f"no commit that has rows of such a machine can be a base: {unknown}; or name one: --base REV")
    if not known:
        listed = "\n".join(f"  {_class_words(where)}" for where in by_class)
        here = any(machine_class(row.get("machine")) == mine for row in committed_rows(None))
        why = "rows of this class are of trees without git: " if here else ""
        raise Unusable(
            f"no committed rows of a commit of this repository are from a machine of this class "
            f"({_class_words(mine or ())}); there are rows of\n{listed}\n{why}name a base: --base REV"
        )
    return trees.git("rev-list", "--no-walk=sorted", "--max-count=1", *known).stdout.strip()


def _class_words(where: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(CLASS, where) if value is not None)


def chosen(device: str, ops: Sequence[str], cases: Sequence[str]) -> list[Key]:
    """The cases to measure: those of CHOSEN, or all that `ops` and `cases` leave.

    Raises Unusable for a case that is not there, and where none is left.
    """
    on_device = [(op, case) for op in OPS for case, entry in OPS[op].cases.items() if device in entry.batch]
    if not ops and not cases:
        found: list[Key] = []
        for op in dict.fromkeys(op for op, _ in on_device):
            first = next(case for name, case in on_device if name == op)
            found += [(op, case) for case in CHOSEN[device].get(op, (first,))]
        return found
    there = [(op, case) for op, case in on_device if not ops or op in ops]
    for case in cases:
        if case not in [name for _, name in there]:
            listed = ", ".join(repr(name) for _, name in there)
            raise Unusable(f"no case {case!r} on {device}{' of ' * bool(ops)}{', '.join(ops)}; there are: {listed}")
    left = [key for key in there if not cases or key[1] in cases]
    if not left:
        raise Unusable(f"no case of {', '.join(ops)} is for {device}")
    return left


def verified(root: Path, cases: Sequence[Key], device: str, threads: int) -> None:
    """Judge our results of the tree at `root` on the inputs that are timed. Raises GateClosed where one is wrong."""
    with workers({"the working tree": root}, threads) as (worker,):
        for op, case in cases:
            built = worker.ask("build", op=op, case=case, device=device)
            wrong = worker.ask("verify")["wrong"]
            if wrong:
                raise verify.GateClosed(f"{op}, {case}: {wrong}")
            print(f"  within the error rule: {op}, {case}, {built['contestant']}", flush=True)


def against(base: str, args: argparse.Namespace) -> int:
    """Compare with a commit; returns the exit code. Raises Unusable and GateClosed."""
    cases = chosen(args.device, args.op, args.case)
    environment = rows.environment(args.device)
    of = trees.commit(base) if base else base_commit(committed_rows(), environment["machine"])
    if args.device == "cpu":
        if why := trees.stale():
            raise Unusable(why)
        if not native.loaded():
            raise Unusable(f"the working tree's native library: {native.status()}")
    subject = trees.git("show", "--no-patch", "--format=%ad, %s", "--date=short", of).stdout.strip()
    print(f"base: {of[:10]} ({subject[:90]})", flush=True)
    if of == environment["commit"] and not environment["dirty"]:
        print("the working tree is the base: what differs is noise")
    sides = {f"the base, {of[:10]},": trees.checkout(of, args.device == "cpu"), "the working tree": trees.ROOT}
    verified(trees.ROOT, cases, args.device, args.threads)
    times, new = measure(sides, cases, args.device, args.threads, args.seconds, args.sessions)
    print(f"\n{table(times, new)}", flush=True)
    verdicts = {key: series.verdict() for key, series in times.items()}
    suspects = [key for key, verdict in verdicts.items() if verdict.ratio > LIMIT]
    if suspects:
        print(f"\nlooks slower; once more, twice as long, in fresh processes: {_listed(suspects)}", flush=True)
        again, _ = measure(sides, suspects, args.device, args.threads, 2 * args.seconds, args.sessions)
        print(f"\n{table(again, [])}")
        verdicts |= {key: series.verdict() for key, series in again.items()}
    words = {key: verdict.word() for key, verdict in verdicts.items()}
    slower = [key for key, word in words.items() if word == "slower"]
    print()
    for word in ("faster", "unclear"):
        if some := [key for key in words if words[key] == word]:
            note = ": noise hides 5 % here; more --seconds, or an idle machine" if word == "unclear" else ""
            print(f"{word}: {_listed(some)}{note}")
    if new:
        print(f"not compared, as the base knows no such problem: {_listed(new)}")
    if slower:
        print(f"SLOWER than {of[:10]} by more than {100 * (LIMIT - 1):.0f} %: {_listed(slower)}")
        return 1
    print(f"no case is shown to be slower than {of[:10]}" if times else "nothing was compared")
    return 0


def _listed(keys: Sequence[Key]) -> str:
    return "; ".join(", ".join(key) for key in keys)


def table(times: dict[Key, Series], new: Sequence[Key]) -> str:
    """A line a case: medians, the ratio with its interval, the verdict."""
    lines = [("case", "base ms", "new ms", "new / base", "95 %", "verdict")]
    for key, series in times.items():
        base, ours = (f"{ms:.4g}" for ms in series.medians())
        verdict = series.verdict()
        names = series.contestants
        who = names[1] if names[0] == names[1] else f"{names[0]} -> {names[1]}"
        interval = f"{verdict.low:.3f} .. {verdict.high:.3f}"
        lines.append((f"{', '.join(key)}, {who}", base, ours, f"{verdict.ratio:.3f}", interval, verdict.word()))
    lines += [(", ".join(key), "-", "-", "-", "-", "new: nothing to compare with") for key in new]
    return tables.aligned(lines, left=(0, -1))


def floor(committed: Sequence[rows.Row], key: Key, contestant: str, quantity: str, machine: Any) -> tuple[float, str]:
    """The least speed-up over eager that is let pass, and the machines whose rows it comes from.

    A share (FRACTIONS, FRACTION) of the smallest in the rows of machines of the class of `machine`; where there are
    none, of any class: on AMD's AVX-512 eager's products are AVX2 (LOG.md), so that a linear layer gains 2.1 times on
    Zen 5, and next to nothing on Zen 4, whose AVX-512 is no faster. Raises Unusable without rows.
    """
    smallest: dict[tuple[Any, ...], float] = {}
    for row in committed:
        same = [row.get(name) for name in ("op", "case", "device", "contestant", "quantity")]
        if same == [*key, "cpu", contestant, quantity] and "eager" in row["speedup"]:
            where = machine_class(row["machine"]) or ()
            smallest[where] = min(smallest.get(where, np.inf), row["speedup"]["eager"])
    if not smallest:
        raise Unusable(f"no committed row says how much faster than eager {contestant} is on {', '.join(key)}")
    own = machine_class(machine)
    where = own if own in smallest else min(smallest, key=lambda there: smallest[there])
    assert where is not None
    return FRACTIONS.get(key[0], FRACTION) * smallest[where], _class_words(where)


def ratios(cases: Sequence[Key], seconds: float) -> int:
    """Ours and eager in turns, in this process; returns the exit code. Raises Unusable and GateClosed."""
    if not native.loaded():
        raise Unusable(f"the native library: {native.status()}")
    committed, machine = committed_rows(), rows.machine("cpu")
    lines = [("case", "eager ms", "ours ms", "eager / ours", "floor", "rows of", "verdict")]
    below = []
    built = []
    for op, case in cases:
        problem = problems.build(op, case, "cpu")
        try:
            name = check_worker.ours(problem)
        except ValueError as error:
            raise Unusable(f"{op}, {case}: {error}; there is nothing to compare with eager") from error
        quantity = QUANTITIES[2] if problem.grads else QUANTITIES[0]
        least, where = floor(committed, (op, case), name, quantity, machine)
        good, wrong = verify.contestants(problem, [name, "eager"])
        if wrong:
            raise Unusable(f"{op}, {case}: eager, which ours is compared with, fails: {wrong['eager']}")
        built.append((problem, op, case, name, least, where))
        print(f"  within the error rule: {op}, {case}, {', '.join(good)}", flush=True)
    for problem, op, case, name, least, where in built:
        steps: dict[str, timing.Step] = {
            n: lambda mark, p=problem, n=n: p.step(n, False, mark) for n in (name, "eager")
        }
        times = timing.interleaved(steps, "cpu", seconds, least=problem.least, warm=problem.warm)
        ours, eager = (np.array([total for _, total in times[n]]) for n in steps)
        ratio = float(np.median(eager / ours))
        low = ratio < least
        below += [(op, case)] if low else []
        numbers = (f"{np.median(eager):.4g}", f"{np.median(ours):.4g}", f"{ratio:.2f}", f"{least:.2f}", where)
        lines.append((f"{op}, {case}, {name}", *numbers, "BELOW" if low else "good"))
    print(f"\n{tables.aligned(lines, left=(0, -1))}")
    if below:
        print(f"BELOW the floor that the committed rows' speed-up over eager gives: {_listed(below)}")
    return int(bool(below))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA GPU: torch sees none", file=sys.stderr)
        return 2
    if args.ratios and (args.base or args.device == "cuda"):
        print("--ratios is for the CPU, and has no base: leave out --base, or --device cuda", file=sys.stderr)
        return 2
    args.threads = args.threads or torch.get_num_threads()
    args.seconds = args.seconds or SECONDS[args.device]
    torch.set_num_threads(args.threads)
    try:
        with terminable():
            if args.ratios:
                asked = chosen("cpu", args.op, args.case) if args.op or args.case else RATIOS
                return ratios(asked, args.seconds)
            return against(args.base, args)
    except verify.GateClosed as closed:
        print(closed, file=sys.stderr)
        return 1
    except (Unusable, rows.Unreadable) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is judged", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="", metavar="REV", help="default: that of the newest rows of such a machine")
    parser.add_argument("--op", action="append", default=[], choices=OPS, help="all its cases; several are fine")
    parser.add_argument("--case", action="append", default=[], help="a case of the registry; several are fine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=threads, help="CPU threads of torch")
    parser.add_argument("--seconds", type=seconds, help=f"of timed rounds a case; default {SECONDS}")
    parser.add_argument("--sessions", type=positive, default=3, help="pairs of processes, one after the other")
    parser.add_argument("--ratios", action="store_true", help="ours against eager, by committed rows; no other commit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
