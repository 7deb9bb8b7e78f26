"""`--profile`, and what a row says of a GPU's use."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import changed, train_rows

from bevt.config import Config
from bevt.train.distributed import World
from bevt.train.metrics import Meter, RunError
from bevt.train.phases import PHASES
from bevt.train.pretrain import pretrain
from bevt.train.profile import Profile
from bevt.train.step import StepResult


def test_a_profile(config: Config, finished: Path, tmp_path: Path) -> None:
    """A trace of three steps with their parts, a table, and a run that is none the different."""
    pretrain(changed(config, optim={"max_steps": 9}), tmp_path, quiet=True, profile=True)
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert names.count("bevt: optimizer") == 3
    assert names.count("bevt: backward") == 3 * 2 * 2  # two streams in each of two micro-batches
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert "bevt: tokenizer" in table
    assert "Self CPU" in table


def test_rows_beside_a_profile(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are of steps alone: those in which the trace is written, after step 8 of the third row, are in none."""
    write, seconds = Profile._write, 2.0

    def slow(self: Profile, *recorded: Any) -> None:
        write(self, *recorded)
        time.sleep(seconds)

    monkeypatch.setattr(Profile, "_write", slow)
    slower = changed(config, optim={"max_steps": 9}, train={"log_every": 3, "checkpoint_every": 100})
    pretrain(slower, tmp_path, quiet=True, profile=True)
    rows = train_rows(tmp_path)
    assert [row["step"] for row in rows] == [3, 6, 9]
    for row in rows:
        assert 3 * row["step_seconds"] < seconds
        assert 0.5 * row["step_seconds"] < sum(row[f"{phase}_seconds"] for phase in PHASES) < 1.01 * row["step_seconds"]


def test_a_profile_of_a_short_run(config: Config, tmp_path: Path) -> None:
    """It would end before anything is recorded: said before it starts."""
    with pytest.raises(RunError, match="--profile takes 8 steps, and this run has 2 left"):
        pretrain(changed(config, optim={"max_steps": 2}), tmp_path, quiet=True, profile=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_utilisation(config: Config, tmp_path: Path) -> None:
    """Counted operations of this device's share, without tokens that were kept, a second, over what it can do."""
    meter = Meter(config, World(0, 2, torch.device("cpu")), [], tmp_path, flop=6e12, tokenizing=4e12, peak=100e12)
    meter.world = World(0, 1, torch.device("cpu"))  # nobody to meet
    ok = StepResult(
        {"loss": torch.tensor(1.0), "tokens_cached": torch.tensor(0.5)}, torch.tensor(True), torch.tensor(-1)
    )
    meter.start()
    meter.add(1, [], ok)
    meter.add(2, [], ok)
    row = meter.row(2, 0.1, dict.fromkeys(PHASES, 0.5))
    assert row["tflops"] == pytest.approx(4 / row["step_seconds"])
    assert row["mfu"] == pytest.approx(row["tflops"] / 100)
    assert row["encoder_seconds"] == 0.25
