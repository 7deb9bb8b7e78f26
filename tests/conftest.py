"""Fixtures that several parts of the tests share."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its own library is decorated then
    # torch's pool of compiler processes stood still for eight minutes once, and two tests at a time fill two cores.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from benchmarks.foreign import torchvision_schemas

if TYPE_CHECKING:
    from bevt.data import shapes


@pytest.fixture(scope="session")
def torchvision_video() -> ModuleType:
    """`torchvision.models.video`, for `swin3d_t`, `_s` and `_b`."""
    torchvision_schemas()
    reason = "needs torchvision: pip install --no-deps torchvision==0.28.0 (make test does it)"
    return pytest.importorskip("torchvision.models.video", reason=reason)


@pytest.fixture(scope="session")
def flava() -> ModuleType:
    """The transformers package, from which tests take `FlavaImageCodebook`."""
    torchvision_schemas()  # transformers imports torchvision where that is installed
    return pytest.importorskip("transformers", reason="needs transformers: pip install 'transformers>=4.50'")


REAL_CLIPS = (
    "kinetics_like_340x256_h264.mp4",
    "ntsc_426x240_h264.mp4",
    "short_32_frames_h264.mp4",
    "ucf_like_320x240_mpeg4.avi",
)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """Folder of the four real clips."""
    default = Path(__file__).parents[1] / "../shared/videos"
    folder = Path(os.environ.get("BEVT_TEST_VIDEOS", default)).resolve()
    missing = [name for name in REAL_CLIPS if not (folder / name).exists()]
    if missing:
        pytest.skip(f"no {missing[0]} in {folder}: point BEVT_TEST_VIDEOS at the folder of real clips")
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> shapes.ShapesPaths:
    """The embedded dataset, small: 7 training clips, 3 held-out ones; 10 and 5 stills."""
    from bevt.data import shapes  # here: the kernels' tests run where its packages are missing

    root = tmp_path_factory.mktemp("shapes")
    return shapes.ensure(root, train_clips=7, val_clips=3, train_images=10, val_images=5)
