"""Data tests: a configuration for the small embedded dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bevt.config import Config, DataConfig, MaskConfig, TrainConfig
from bevt.data import shapes


@pytest.fixture
def config(dataset: shapes.ShapesPaths) -> Config:
    """Both streams at 64 pixels, 4 frames, in-process: 4 clips and 8 images a step in two micro-batches."""
    return Config(
        image_mask=MaskConfig(kind="block", min_block=4),
        clip_mask=MaskConfig(kind="tube", min_block=4),
        data=DataConfig(
            clips=dataset.train_clips,
            images=dataset.train_images,
            val_clips=dataset.val_clips,
            val_images=dataset.val_images,
            frames=4,
            stride=2,
            short_side=(64, 80),
            crop=64,
            backend="pyav",
            workers=0,
        ),
        train=TrainConfig(clips=4, images=8, micro_clips=2, micro_images=4, eval_clips=3, eval_images=5),
    )


@pytest.fixture
def clips(dataset: shapes.ShapesPaths, tmp_path: Path) -> Path:
    """A folder of its own with two good videos: 0000.mp4 and 0001.webm."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("0000.mp4", "0001.webm"):
        shutil.copy(Path(dataset.train_clips) / name, folder)
    return folder
