"""Processes that die under torchrun are restarted, and the run is the run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import (
    ENVIRONMENT,
    ROOT,
    TORCHRUN,
    changed,
    command,
    descendants,
    figures,
    train_rows,
    wait_for_end,
    wait_until,
)

from bevt.config import Config
from bevt.train import checkpoint

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")

PYTHON = (*TORCHRUN, "--max-restarts", "3")


@contextmanager
def running(config: Config, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`torchrun --max-restarts 3 -m bevt pretrain --resume`, its output in a file beside `out`."""
    with open(f"{out}.log", "wb") as log:
        words = command(config, out, "--resume", python=PYTHON)
        torchrun = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
        try:
            yield torchrun
        finally:
            torchrun.kill()
            torchrun.wait()


def rank(torchrun: int, number: int) -> int:
    """The id of one of its processes."""
    for pid in descendants(torchrun):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        if int(parent) == torchrun and f"RANK={number}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return pid
    raise AssertionError(f"no rank {number}")


def begun(out: Path, step: int) -> bool:
    """Whether `step` is past, and the checkpoint before it whole."""
    saved = checkpoint.latest(out / "checkpoints")
    return saved is not None and saved.name >= f"step_{step // 4 * 4:08d}" and len(train_rows(out)) >= step


def test_a_process_is_killed(pair: Config, undisturbed_pair: Path, tmp_path: Path) -> None:
    """Rank 1, then rank 0, each between two checkpoints in the middle of an epoch: torchrun restarts both from the last
    checkpoint, the losses are those of a run that nothing disturbed, and no process is left, decoding ones included.
    """
    out = tmp_path / "run"
    started: set[int] = set()
    with running(changed(pair, data={"workers": 1}), out) as torchrun:
        for number, step in ((1, 6), (0, 10)):
            wait_until(lambda step=step: begun(out, step), "the run does not get on")  # type: ignore[misc]
            started |= descendants(torchrun.pid)
            os.kill(rank(torchrun.pid, number), signal.SIGKILL)
        assert torchrun.wait(timeout=240) == 0, Path(f"{out}.log").read_text()
    text = Path(f"{out}.log").read_text()
    resumed = [int(step) for step in re.findall(r"resumed .* at step (\d+)", text)]
    assert len(resumed) == 2, text
    assert all(step in (4, 8, 12) for step in resumed), text
    assert figures(out) == figures(undisturbed_pair)
    assert not wait_for_end(started), "processes outlive their parent"


def test_torchrun_is_killed(pair: Config, tmp_path: Path) -> None:
    """Its processes do not go on without it: a checkpoint of the very step, and they end."""
    out = tmp_path / "run"
    with running(changed(pair, optim={"max_steps": 1000}), out) as torchrun:
        wait_until(lambda: (out / "metrics.jsonl").exists() and len(train_rows(out)) >= 2, "the run does not get on")
        started = descendants(torchrun.pid)
    assert not wait_for_end(started), "processes outlive torchrun"
    rows = train_rows(out)
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    assert saved.name == f"step_{len(rows):08d}"
