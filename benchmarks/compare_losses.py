"""Two runs of one recipe, step by step: of two commits, of two paths, or of any two sets of flags.

    python -m benchmarks.compare_losses joint_stage --right="--path reference" -- FLAGS OF BOTH
    python -m benchmarks.compare_losses joint_stage --right-commit HEAD~1 -- FLAGS OF BOTH

Each side is `bevt pretrain` in a process of its own, in the working tree or in a checkout of its commit, every step
logged. Exit status 1: a figure of a step differs by more than `--most` of itself (0: bit for bit).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.trees import LIBRARY, ROOT, Unusable, give_library
from bevt.train.metrics import read_rows

FIGURES = ("loss", "loss_clips", "loss_images", "grad_norm")


def compare(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Of each figure that both have, |left - right| / |right| step by step. Raises ValueError where steps differ."""
    steps = [[row["step"] for row in rows] for rows in (left, right)]
    if steps[0] != steps[1]:
        raise ValueError(
            f"the runs have other steps: {len(steps[0])} to {steps[0][-1:]}, {len(steps[1])} to {steps[1][-1:]}"
        )
    names = [name for name in FIGURES if left and name in left[0] and name in right[0]]
    return {
        name: [abs(a[name] - b[name]) / abs(b[name]) if a[name] != b[name] else 0.0 for a, b in zip(left, right)]
        for name in names
    }


def report(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]], lines: int = 12) -> str:
    """A table of about `lines` steps, closer together at the start, and the largest differences."""
    differences = compare(left, right)
    count = len(left)
    shown = sorted({round(count ** (i / (lines - 1))) for i in range(lines)})
    out = [f"{'step':>6} {'left loss':>14} {'right loss':>14} " + " ".join(f"{name:>12}" for name in differences)]
    for i in shown:
        a, b = left[i - 1], right[i - 1]
        out.append(
            f"{a['step']:>6} {a['loss']:>14.8f} {b['loss']:>14.8f} "
            + " ".join(f"{values[i - 1]:>12.1e}" for values in differences.values())
        )
    out.append(f"{'most':>36} " + " ".join(f"{max(values):>12.1e}" for values in differences.values()))
    return "\n".join(out)


@contextlib.contextmanager
def tree(commit: str) -> Generator[Path, None, None]:
    """The working tree, or a checkout of `commit` with a native library of its own sources."""
    if not commit:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(checkout), commit], check=True)
        try:
            if (ROOT / LIBRARY).exists():  # else neither side has one
                give_library(checkout, commit)
            yield checkout
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(checkout)], check=True)


def run(commit: str, words: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """The training rows of `bevt pretrain WORDS` at a commit, or in the working tree for "". Paths are the caller's."""
    words = [str(Path(word).absolute()) if Path(word).exists() else word for word in words]
    with tree(commit) as root:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
        command = [sys.executable, "-m", "bevt", "pretrain", *words, "--out", str(out), "--train.log-every", "1"]
        print(f"{commit or 'working tree'}: {shlex.join(command[1:])}", flush=True)
        done = subprocess.run(command, cwd=root, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return [row for row in read_rows(out / "metrics.jsonl") if row["event"] == "train"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    for side in ("left", "right"):
        parser.add_argument(f"--{side}-commit", default="", help="default: the working tree")
        parser.add_argument(f"--{side}", default="", help="flags of this side alone, in one word: '--path reference'")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--most", type=float, default=1e-5, help="relative difference of a step that is let pass")
    words = list(sys.argv[1:] if arguments is None else arguments)
    common = words[words.index("--") + 1 :] if "--" in words else []
    args = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    if args.steps < 1:
        parser.error("--steps must be above 0")
    if any(word.startswith("--optim.max") for word in [*common, *shlex.split(args.left), *shlex.split(args.right)]):
        parser.error("--optim.max-steps is given by --steps")
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        for side in ("left", "right"):
            flags = [*common, "--optim.max-steps", str(args.steps), *shlex.split(getattr(args, side))]
            try:
                sides.append(run(getattr(args, f"{side}_commit"), [args.recipe, *flags], Path(folder) / side))
            except Unusable as error:
                parser.error(str(error))
    left, right = sides
    print(report(left, right))
    worst = max(max(values) for values in compare(left, right).values())
    print(f"{'the same' if worst <= args.most else 'NOT the same'}: at most {worst:.1e} apart, {args.most:g} let pass")
    return 0 if worst <= args.most else 1


if __name__ == "__main__":
    raise SystemExit(main())
