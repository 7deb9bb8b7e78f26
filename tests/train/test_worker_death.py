"""A decoding process is killed in the middle of a run."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny import changed, figures

from bevt.config import Config
from bevt.data import DataError
from bevt.train.pretrain import pretrain
from bevt.train.step import StepResult, TrainStep


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process that ends in the third step, as if out of memory."""
    pids: list[int] = []
    real = TrainStep.__call__

    steps = itertools.count()

    def step(self: TrainStep, *arguments: Any) -> StepResult:
        if next(steps) == 2 and not pids:
            pid = multiprocessing.active_children()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            pids.append(pid)
        return real(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", step)
    return pids


def test_the_run_goes_on(
    config: Config, finished: Path, killed: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says which process died, and ends with the figures of a run that nothing happened to."""
    out = tmp_path / "run"
    assert pretrain(changed(config, data={"workers": 1, "prefetch": 1}), out, quiet=True).finished
    assert f"the decoding process {killed[0]} died (SIGKILL)" in caplog.text
    assert figures(out) == figures(finished)


def test_the_run_stops(config: Config, finished: Path, killed: list[int], tmp_path: Path) -> None:
    """With `worker_death="stop"`: an error that names it, a checkpoint, and a resumed run that is the whole one."""
    out = tmp_path / "run"
    strict = changed(config, data={"workers": 1, "prefetch": 1, "worker_death": "stop"})
    with pytest.raises(DataError, match=r"the decoding process \d+ died \(SIGKILL\): .*It was the turn of "):
        pretrain(strict, out, quiet=True)
    assert killed
    assert (out / "checkpoints" / "last").exists()
    assert pretrain(strict, out, quiet=True, resume=True).finished
    assert figures(out) == figures(finished)
    assert not multiprocessing.active_children()
