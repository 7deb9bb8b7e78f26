"""A run whose images are single frames of videos, from looking at the files to the evaluation and the pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import changed, figures

from bevt.config import Config
from bevt.data import shapes
from bevt.train.metrics import RunError
from bevt.train.pretrain import pretrain


def test_a_run_on_frames(config: Config, dataset: shapes.ShapesPaths, tmp_path: Path) -> None:
    """It is scored on held-out middle frames; from an earlier checkpoint it ends the same, and never on pictures."""
    videos = {"images": dataset.train_clips, "val_images": dataset.val_clips, "image_source": "frames"}
    frames = changed(config, data=videos, train={"eval_clips": 0})
    whole, again = tmp_path / "whole", tmp_path / "again"
    result = pretrain(frames, whole, quiet=True)
    assert result.finished
    shutil.copytree(whole, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / "step_00000006")
    other = pretrain(frames, again, resume=True, quiet=True)
    assert figures(again) == figures(whole)
    assert other.evaluation == result.evaluation
    assert other.evaluation["val_loss_images"] > 0
    with pytest.raises(RunError, match=r"data\.image_source = 'frames', now 'pictures'"):
        pretrain(changed(frames, data={"image_source": "pictures"}), again, resume=True, quiet=True)
