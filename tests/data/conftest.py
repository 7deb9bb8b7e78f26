"""What the data tests read: a small embedded dataset, rendered once, and the real clips where they are present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bevt.config import Config, DataConfig, MaskConfig, TrainConfig
from bevt.data import shapes

REAL_CLIPS = (
    "kinetics_like_340x256_h264.mp4",
    "ntsc_426x240_h264.mp4",
    "short_32_frames_h264.mp4",
    "ucf_like_320x240_mpeg4.avi",
)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder of the four real clips."""
    default = Path(__file__).parents[2] / "../shared/videos"
    folder = Path(os.environ.get("BEVT_TEST_VIDEOS", default)).resolve()
    missing = [name for name in REAL_CLIPS if not (folder / name).exists()]
    if missing:
        pytest.skip(f"no {missing[0]} in {folder}: point BEVT_TEST_VIDEOS at the folder of real clips")
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> shapes.ShapesPaths:
    """7 training clips, 3 held-out ones; 10 and 5 stills."""
    root = tmp_path_factory.mktemp("shapes")
    return shapes.ensure(root, train_clips=7, val_clips=3, train_images=10, val_images=5)


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
            workers=0,
        ),
        train=TrainConfig(clips=4, images=8, micro_clips=2, micro_images=4, eval_clips=3, eval_images=5),
    )
