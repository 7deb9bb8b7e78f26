"""`make bench-gpu`: the ops' GPU tests, then every benchmark in order of worth, in eight minutes.

Works from the source tree without installing. Each part is a process of its own, so that a fault in one leaves the
others; its rows are in benchmarks/results, and in the folder $OUT where that is set, as soon as a case is done. What
rests on a test that is red is not measured.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch

from benchmarks import verify
from benchmarks.registry import GPU_ORDER, OPS

SECONDS = 480.0
TEST_SECONDS = 240.0
GRACE = 30.0
"""What a part may take beyond its limit before it is stopped: a limit is looked at between cases."""


def main() -> int:
    """The command; returns the exit code."""
    if not torch.cuda.is_available():
        print("needs a CUDA GPU: torch sees none", file=sys.stderr)
        return 2
    start = time.monotonic()
    end, code = start + SECONDS, 0
    red: set[str] = set()
    patterns = list(dict.fromkeys(pattern for op, _ in GPU_ORDER for pattern in OPS[op].tests))
    for i, pattern in enumerate(patterns):
        share = max(0.0, start + TEST_SECONDS - time.monotonic()) / (len(patterns) - i)  # what one leaves, others get
        try:
            print(verify.green([pattern], "cuda", share), flush=True)
        except verify.GateClosed as closed:
            print(closed, file=sys.stderr)
            red.add(pattern)
            code = 1
    for op, group in GPU_ORDER:
        if red.intersection(OPS[op].tests):
            print(f"tests are red, not measured: {op}, {group}")
            continue
        left = end - time.monotonic() - GRACE
        if left < GRACE:
            print(f"out of time, not measured: {op}, {group}")
            continue
        limit = ["--time-limit", f"{left:.0f}"]
        command = [sys.executable, "-m", "benchmarks.run", op, "--group", group, "--device", "cuda", *limit]
        try:
            code |= subprocess.run(command, cwd=verify.ROOT, timeout=left + GRACE, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"out of time in {op}, {group}")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
