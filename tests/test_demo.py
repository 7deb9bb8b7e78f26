"""`bevt demo` in small: every part runs and leaves its files, and its verdict is honest. `make demo` is the whole."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from bevt import demo as module
from bevt.config import Config
from bevt.data import shapes

SCORES = {
    f"{name}_{stream}": value
    for stream in ("clips", "images")
    for name, value in {
        "val_loss": 2.9,
        "entropy": 4.0,
        "val_accuracy": 0.2,
        "commonest": 0.1,
        "codes": 64.0,
    }.items()
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files and steps: too few to learn anything."""

    def shortened(config: Config) -> Config:
        return replace(
            config,
            data=replace(config.data, workers=0),
            optim=replace(config.optim, max_steps=2),
            train=replace(config.train, micro_images=4, images=4, eval_clips=2, eval_images=4, threads=1),
        )

    few = partial(shapes.ensure, train_clips=4, val_clips=2, train_images=6, val_images=4)
    monkeypatch.setattr(module.shapes, "ensure", few)
    monkeypatch.setattr(module, "demo_image_stage", lambda f=module.demo_image_stage: shortened(f()))
    monkeypatch.setattr(module, "demo_joint_stage", lambda f=module.demo_joint_stage: shortened(f()))
    monkeypatch.setattr(module, "demo_tokenizer", lambda seed, f=module.demo_tokenizer: replace(f(seed), steps=3))


def test_every_part_runs_and_leaves_its_files(short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.demo(tmp_path) is False
    out = capsys.readouterr().out
    assert "FAILED" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["val_loss_clips"] > 0.75 * result["entropy_clips"]
    for stage in ("image_stage", "joint_stage"):
        assert (tmp_path / stage / "checkpoints" / "last").exists()
        assert (tmp_path / stage / "metrics.jsonl").exists()
        assert (tmp_path / stage / "pictures" / "curves.png").exists()
    assert (tmp_path / "joint_stage" / "pictures" / "clip_0.png").exists()

    assert module.demo(tmp_path) is False  # again: nothing is done twice
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["val_loss_clips"] == result["val_loss_clips"]
    assert "fitting the tokenizer" not in again["seconds"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, True),
        ({"val_loss_clips": 3.1}, False),
        ({"val_loss_images": 3.1}, False),
        ({"val_accuracy_clips": 0.1}, False),
        ({"codes_clips": 63.0}, False),
    ],
)
def test_verdict(change: dict[str, float], verdict: bool) -> None:
    assert module._show(Console(quiet=True), SCORES | change) is verdict
