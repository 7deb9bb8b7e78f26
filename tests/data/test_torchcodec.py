"""The torchcodec backend against a stand-in of its decoder: its wheels need CUDA's or FFmpeg's libraries to import."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from loading import assert_same, take, with_data, with_train

from bevt.config import Config, ConfigError
from bevt.data import shapes
from bevt.data.build import build_loader
from bevt.data.files import File, ReadError
from bevt.data.manifest import index
from bevt.data.sampling import Sampler

av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")

from bevt.data import pyav, torchcodec  # noqa: E402


class VideoDecoder:
    """What the backend uses of torchcodec.decoders.VideoDecoder, on PyAV."""

    def __init__(self, source: str | bytes, *, dimension_order: str, num_ffmpeg_threads: int) -> None:
        assert (dimension_order, num_ffmpeg_threads) == ("NHWC", 1)
        if isinstance(source, str) and Path(source).suffix == ".txt":
            raise RuntimeError("Could not open input file\nand more")
        with av.open(source) as container:
            self.frames = np.stack(
                [
                    frame.reformat(format="gbrp", interpolation=0x40002).to_ndarray()
                    for frame in container.decode(video=0)
                ]
            )

    def __len__(self) -> int:
        return len(self.frames)

    def get_frames_at(self, indices: list[int]) -> SimpleNamespace:
        """Frames by number, as (N, H, W, 3)."""
        return SimpleNamespace(data=torch.from_numpy(self.frames[indices]))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchcodec, installed."""
    decoders = ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = VideoDecoder  # type: ignore[attr-defined]
    package = ModuleType("torchcodec")
    package.decoders = decoders  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


@pytest.mark.usefixtures("library")
def test_it_serves_what_pyav_serves(config: Config) -> None:
    """Videos and images, masks and replacements."""
    loader = build_loader(with_data(config, backend="torchcodec"))
    assert loader.backend == "torchcodec"
    for batch, expected in zip(loader, take(config, 3), strict=False):
        assert_same(batch, expected)
    loader.close()


@pytest.mark.usefixtures("library")
def test_errors_name_the_file(dataset: shapes.ShapesPaths, config: Config, tmp_path: Path) -> None:
    """What it cannot open, and a video that is shorter than it was."""
    request = Sampler(index(dataset.val_clips, "clips"), config.data, "clips", 0).request(0)
    out = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    path = str(tmp_path / "a.txt")
    with pytest.raises(ReadError, match=r"a\.txt: torchcodec cannot decode it \(Could not open input file\)$"):
        torchcodec.read([replace(request, file=File(path, path))], [out])
    late = replace(request, frames=(0, 1, 2, 99))
    for backend in (torchcodec, pyav):
        with pytest.raises(ReadError, match="ends before frame 99, which the manifest promises; index it again"):
            backend.read([late], [out])


def test_it_is_refused_where_it_does_not_import(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, and what can."""
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(ConfigError, match=r"'torchcodec' cannot read this data: torchcodec does not import .*pyav can"):
        build_loader(with_train(with_data(config, backend="torchcodec"), images=0))
