"""Small runs, and what they wrote."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bevt.config import AnyConfig, command_of, to_dict
from bevt.recipes import ALL_RECIPES
from bevt.train.metrics import read_rows
from bevt.train.optim import build_optimizer

C = TypeVar("C", bound=AnyConfig)
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
"""For commands in processes of their own, installed or not."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
"""Two processes of this machine."""


def changed(config: C, **groups: dict[str, Any]) -> C:
    """`config` with other values: `changed(config, train={"clips": 0})`."""
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in groups.items()})


def command(config: AnyConfig, out: Path, *options: str, python: tuple[str, ...] = (sys.executable,)) -> list[str]:
    """`bevt pretrain`, `finetune` or `contrast`: every key that differs from the recipe's given as a flag."""
    recipe = config.recipe
    words, base = [*python, "-m", "bevt", command_of(config), recipe], to_dict(ALL_RECIPES[recipe]())
    words += ["--out", str(out), *options]
    if init := getattr(config, "init", ""):
        words += ["--init", init]
    for group, values in to_dict(config).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if value != base[group][key]:
                words.append(f"--{group}.{key}".replace("_", "-"))
                words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def train_rows(out: Path) -> list[dict[str, Any]]:
    """The training rows of a run."""
    return [row for row in read_rows(out / "metrics.jsonl") if row["event"] == "train"]


def figures(out: Path) -> list[dict[str, Any]]:
    """The training rows without what a clock measured."""
    timed = ("_seconds", "_per_second", "data_wait", "tflops", "mfu", "memory_gib")
    return [{key: value for key, value in row.items() if not key.endswith(timed)} for row in train_rows(out)]


def descendants(pid: int) -> set[int]:
    """Ids of the processes below one."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:  # gone meanwhile
            continue
        parents[int(status.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


def wait_for_end(processes: set[int], most: int = 0) -> set[int]:
    """Those of which more than `most` are still there after a while."""
    deadline = time.monotonic() + 20
    while True:
        alive = {pid for pid in processes if Path(f"/proc/{pid}").exists()}
        if len(alive) <= most or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 240) -> None:
    """Wait until it holds; `what` says what did not come to be in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def signalling() -> Callable[..., Any]:
    """`build_optimizer` during which SIGTERM arrives."""

    def build(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return build_optimizer(*arguments, **keywords)

    return build


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process may grow, or be written, beyond `size` bytes: as a full disk, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def output(words: list[str], timeout: float = 120) -> str:
    """What a command prints that ends well."""
    done = subprocess.run(
        words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained(seed: int, steps: int = 2) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model of odd sizes, which no number of processes divides evenly, and its optimizer after a few steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """A few steps on noise."""
    for _ in range(steps):
        model(torch.randn(4, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def same_tensors(saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Assert that a loaded checkpoint holds exactly this model and optimizer, bit for bit."""
    parameters = dict(model.named_parameters())
    assert saved["model"].keys() == parameters.keys()
    assert saved["optimizer"].keys() == {name for name, value in parameters.items() if value in optimizer.state}
    for name, value in parameters.items():
        assert torch.equal(saved["model"][name], value), name
    for name, state in saved["optimizer"].items():
        assert state.keys() == optimizer.state[parameters[name]].keys()
        for key, value in optimizer.state[parameters[name]].items():
            assert torch.equal(state[key], value), (name, key)
