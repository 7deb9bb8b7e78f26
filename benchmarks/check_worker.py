"""One side of `benchmarks.check`: a process that builds a case of its own tree and steps it when asked.

Run by path from the working tree, for both sides, so that one clock and one protocol serve both; PYTHONPATH names the
tree whose `benchmarks` and kernels are measured, and nothing else of the working tree's is imported. A request is a
line of JSON on stdin, the reply one on stdout; what libraries print goes to stderr. Between requests it waits.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def _timing() -> ModuleType:
    """The clock beside this file: the two sides' own might differ."""
    spec = spec_from_file_location("check_timing", Path(__file__).with_name("timing.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(problem: Any) -> str:
    """The contestant that `auto` would pick, as far as names tell: the first of ours that can run, reference last.

    Raises ValueError where none can.
    """
    can = [
        name
        for name, contestant in problem.contestants.items()
        # With Triton's interpreter `triton` can run on a CPU, if named.
        if contestant.ours and not contestant.reasons and (name, problem.device) != ("triton", "cpu")
    ]
    if not can:
        raise ValueError("none of our implementations can run")
    return min(can, key=lambda name: name == "reference")


class Side:
    """What can be asked; every method is a request, its arguments the request's other entries."""

    def __init__(self) -> None:
        self.timing = _timing()
        self.problem: Any = None
        self.name = ""

    def hello(self, root: str, threads: int) -> dict[str, Any]:
        """Import the tree at `root`. Raises ImportError where another one is found first."""
        import torch

        torch.set_num_threads(threads)
        from benchmarks import problems

        self.problems = problems
        for name in ("benchmarks", "bevt", "bevt_kernels"):
            file = getattr(sys.modules.get(name), "__file__", None)
            if file and not Path(file).resolve().is_relative_to(Path(root).resolve()):
                raise ImportError(f"{name} does not come from the tree that is measured, but from {file}")
        return {}

    def build(self, op: str, case: str, device: str) -> dict[str, Any]:
        """The case, as this tree knows it; "unknown" where it does not."""
        from benchmarks.registry import OPS

        self.problem = None  # before the next one takes its memory
        gc.unfreeze()
        gc.collect()
        if op not in OPS or case not in OPS[op].cases or device not in OPS[op].cases[case].batch:
            return {"unknown": True}
        self.problem = self.problems.build(op, case, device)
        self.name = ours(self.problem)
        gc.collect()
        gc.freeze()  # the clock collects before each turn: let it find little
        dtype = str(self.problem.dtype).removeprefix("torch.")
        return {"problem": {**asdict(self.problem.case), "dtype": dtype}, "contestant": self.name}

    def verify(self) -> dict[str, Any]:
        """What is wrong with this tree's results by the error rule; "" where nothing is."""
        from benchmarks import verify

        try:
            verify.contestants(self.problem, [self.name])
        except verify.GateClosed as closed:
            return {"wrong": str(closed)}
        return {"wrong": ""}

    def step(self, n: int) -> dict[str, Any]:
        """Milliseconds of each of `n` steps, forward and backward together where there is one."""
        steps = {self.name: lambda mark: self.problem.step(self.name, False, mark)}
        times = self.timing.interleaved(steps, self.problem.device, seconds=0.0, most=n, least=n, warm=0)
        return {"ms": [total for _, total in times[self.name]]}


def main() -> None:
    """Serve until stdin ends."""
    # This file's folder, whose modules have everyday names.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(side, request.pop("do"))(**request)
        except Exception as error:  # the other process decides what becomes of it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
