"""Finds the best tile sizes of the Triton kernels on this GPU: `python -m benchmarks.tune`.

For each class of shapes and each kernel, candidates are compiled in parallel, judged by the error rule, and timed
interleaved with the sizes that ship, the rest of the op unchanged. The best go to `configs.json` under this GPU's
architecture; what the class had before is replaced.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.pool import Pool

import torch
from bevt_kernels import select
from bevt_kernels.testing import WindowCase, assert_within_budget
from bevt_kernels.window_attention import configs, triton_backward, triton_forward
from bevt_kernels.window_attention.configs import KERNELS, Config

from benchmarks import timing
from benchmarks.problems import WindowAttention
from benchmarks.registry import DTYPES, OPS

CASES = {
    case: OPS["window_attention"].cases[case]
    for case in ("swin-b video stage 1 shifted", "swin-b image stage 1 shifted", "784 tokens stage 1")
}
"""One case a class."""


def candidates(kernel: str, shipped: Config) -> list[Config]:
    """The shipped sizes first. Eight warps need 128 rows: with fewer, two would do the same work."""
    found = [shipped]
    for block_q, block_k, group, stages in itertools.product((64, 128), (64, 128), (1, 2, 4), (1, 2)):
        rows = block_k if kernel == "grad_kv" else block_q
        for warps in (4, 8) if rows == 128 else (4,):
            if kernel != "grad_bias":
                found.append(Config(block_q, block_k, group, warps, stages))
            elif block_q == block_k:
                found.append(Config(block_q, block_k, 32 * group, warps, stages))
    return list(dict.fromkeys(found))


def step(case: WindowCase, device: str, kernel: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The op's forward, or its backward alone, whichever `kernel` belongs to."""
    qkv, table, grad = case.inputs(DTYPES[device], device=device)
    static = (case.heads, case.window, case.shift, case.table, case.scale)
    if kernel == "forward":
        return lambda: triton_forward.forward(qkv, table, *static)
    out, lse = triton_forward.forward(qkv, table, *static)
    return lambda: triton_backward.backward(grad, qkv, table, out, lse, *static, True)


def judge(case: WindowCase, device: str, kernel: str, sizes: Config) -> str:
    """Why `sizes` cannot be taken, or nothing: it does not run, or breaks the error rule on one clip."""
    case = replace(case, batch=1)
    try:
        with configs.forced(kernel, sizes):
            got = step(case, device, kernel)()
        oracle, eager = WindowAttention(case, device).truth()  # of the same inputs
        for name, result in zip(("out",) if kernel == "forward" else ("grad qkv", "grad bias_table"), got):
            assert_within_budget(result, eager[name], oracle[name], name)
    except Exception as error:  # of many kinds: out of shared memory, a compiler's, a wrong result
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def times(case: WindowCase, device: str, kernel: str, sizes: list[Config], rounds: int) -> list[float]:
    """Median milliseconds of each of `sizes`, run in turns."""
    run = step(case, device, kernel)

    def with_sizes(these: Config) -> timing.Step:
        def timed(mark: timing.Mark) -> None:
            with configs.forced(kernel, these):
                run()
            mark()

        return timed

    steps = {str(tuple(these)): with_sizes(these) for these in sizes}
    found = timing.interleaved(steps, device, math.inf, most=rounds, warm=1)
    return [statistics.median(total for _, total in each) for each in found.values()]


def tune(
    case: WindowCase, device: str, kernel: str, found: list[Config], pool: Pool | None, rounds: int
) -> tuple[Config, list[tuple[Config, float | str]]]:
    """The best of `found`, whose first is the shipped one, and the time of each or why it was dropped.

    They are compiled and judged by the processes of `pool`, or without one here.
    """
    jobs = [(case, device, kernel, sizes) for sizes in found]
    reasons = pool.starmap(judge, jobs, chunksize=1) if pool else list(itertools.starmap(judge, jobs))
    able = [sizes for sizes, reason in zip(found, reasons) if not reason]
    if not able:
        raise RuntimeError(f"{kernel}: no sizes run; the shipped ones: {reasons[0]}")
    milliseconds = dict(zip(able, times(case, device, kernel, able, rounds)))
    report = [(sizes, milliseconds.get(sizes, reason)) for sizes, reason in zip(found, reasons)]
    return min(able, key=milliseconds.__getitem__), report


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="this kernel alone; may be repeated")
    parser.add_argument(
        "--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile at a time"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds after which no further search is begun")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA GPU: torch sees none", file=sys.stderr)
        return 2
    architecture, dtype = select.architecture(torch.device("cuda")), DTYPES["cuda"]
    tuned = json.loads(configs.PATH.read_text()) if configs.PATH.is_file() else {}
    end = time.monotonic() + arguments.time_limit
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for (name, entry), kernel in itertools.product(CASES.items(), arguments.kernel or KERNELS):
            if time.monotonic() > end:
                print(f"out of time, not tuned: {name}, {kernel}")
                continue
            assert isinstance(entry.case, WindowCase)
            case = replace(entry.case, batch=entry.batch["cuda"])
            tokens = math.prod(case.window)
            shape = configs.shape_class(dtype, case.head_dim, tokens)
            shipped = configs.config(kernel, dtype, case.head_dim, tokens, architecture)
            best, report = tune(case, "cuda", kernel, candidates(kernel, shipped), pool, arguments.rounds)
            for sizes, outcome in report:
                shown = outcome if isinstance(outcome, str) else f"{outcome:.3f} ms"
                print(f"{name}, {kernel}: {'*' if sizes == best else ' '} {tuple(sizes)} {shown}", flush=True)
            tuned.setdefault(architecture, {}).setdefault(kernel, {})[shape.name] = list(best)
            configs.PATH.write_text(json.dumps(tuned, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
