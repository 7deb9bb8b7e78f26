"""The image stream on single frames of videos (`data.image_source` "frames"), by the rules of all other samples."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import assert_same, take, with_data, with_train

from bevt.config import Config
from bevt.data import DataError, build, shapes
from bevt.data.bench import bench
from bevt.data.build import build_loader, eval_batches, frame_batches
from bevt.data.manifest import Manifest, index
from bevt.data.sampling import Sampler

av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")


@pytest.fixture
def config(config: Config, dataset: shapes.ShapesPaths) -> Config:
    """Both streams on the videos: clips, and one frame of eight of them."""
    return with_data(config, images=dataset.train_clips, val_images=dataset.val_clips, image_source="frames")


@pytest.fixture
def manifest(dataset: shapes.ShapesPaths) -> Manifest:
    """The videos."""
    return index(dataset.train_clips, "clips")


@pytest.mark.parametrize("sampling", ["dense", "segments"])
def test_every_visit_draws_a_frame_uniformly(config: Config, manifest: Manifest, sampling: str) -> None:
    """4,000 visits, of the frames of a range too; the tolerance is four standard errors."""
    entries = tuple(replace(entry, start=10, end=30) for entry in manifest.entries)
    data = with_data(config, sampling=sampling).data
    for source, first, count in ((manifest, 0, shapes.FRAMES), (replace(manifest, entries=entries), 10, 20)):
        sampler = Sampler(source, data, "images", 0)
        frames = [sampler.request(position).frames for position in range(4000)]
        assert {len(drawn) for drawn in frames} == {1}
        numbers, counts = np.unique(frames, return_counts=True)
        assert numbers.tolist() == list(range(first, first + count))
        expected = 4000 / count
        assert np.abs(counts - expected).max() < 4 * (expected * (1 - 1 / count)) ** 0.5


def test_held_out_images_are_middle_frames(config: Config) -> None:
    """The lower one of the two in the middle of 40 frames; files in their own order."""
    names = [name for batch in eval_batches(config) for name in batch.image_ids]
    source = index(config.data.val_images, "clips")
    assert names == [f"{source.locate(entry)}@19" for entry in source.entries][:5]


def test_pixels_are_those_of_the_frame(config: Config, manifest: Manifest) -> None:
    """An image is the cut of the frame that it names: what a clip of this frame alone would be."""
    sampler = Sampler(manifest, config.data, "images", 0)
    reader = build.make_backend("pyav", config.data)
    batch = take(config, 1)[0]
    for position, (name, pixels) in enumerate(zip(batch.image_ids, batch.images, strict=True)):
        request = sampler.request(position)
        assert name == f"{request.path}@{request.frames[0]}"
        other = torch.zeros(1, *pixels.shape, dtype=torch.uint8)
        reader.read([replace(request, stream="clips")], [other])
        assert pixels.any()
        assert torch.equal(pixels, other[0])
    assert (batch.image_jitter[:, :3] != 1).all()
    assert batch.image_masks.shape == (4, 4, 4)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resume_and_workers(config: Config) -> None:
    """From the state of a loader stopped in the middle of step 3, by two processes: what one would have served."""
    expected = take(config, 8)[6:]
    stopped = build_loader(config)
    list(itertools.islice(stopped, 7))
    stopped.close()
    resumed = build_loader(with_data(config, workers=2))
    resumed.load_state_dict(stopped.state_dict())
    for batch, other in zip(expected, resumed, strict=False):
        assert_same(batch, other)
    resumed.close()


def test_an_unreadable_video_is_replaced(config: Config, tmp_path: Path) -> None:
    """It turned unreadable after it was indexed: named, and a frame of the next of the epoch's order in its place."""
    folder = tmp_path / "videos"
    shutil.copytree(config.data.images, folder, ignore=shutil.ignore_patterns(".*"))
    index(str(folder), "clips", cache=tmp_path / "videos.jsonl")
    images = with_train(with_data(config, images=str(tmp_path / "videos.jsonl")), clips=0)
    expected = take(images, 1)[0]
    lost = expected.image_ids[0].partition("@")[0]
    Path(lost).write_text("damaged")
    batch = take(images, 1)[0]
    source = Sampler(index(str(folder), "clips", cache=tmp_path / "videos.jsonl"), images.data, "images", 0)
    assert [(report.position, report.path) for report in batch.bad] == [(0, lost)]
    assert batch.image_ids == (source.request(0).id, *expected.image_ids[1:])
    assert torch.equal(batch.images[1:], expected.images[1:])
    assert batch.images[0].any()


def test_other_readers_of_images(config: Config) -> None:
    """What fits a tokenizer and what measures decoders take single frames as well."""
    frames = next(frame_batches(with_data(config, clips=""), 3, seed=0))
    assert frames.shape == (3, 64, 64, 3)
    report = bench(config.data.images, "clips", with_data(config, clips="", images="").data, batch=2, seconds=0.01)
    assert "single frames" in report.title
    assert report.rows["pyav"].rate > 0


def test_pictures_are_no_videos(config: Config, dataset: shapes.ShapesPaths) -> None:
    """A folder of the wrong kind is an error, not another stream."""
    with pytest.raises(DataError, match="no clips in"):
        build_loader(with_data(config, images=dataset.train_images))
    with pytest.raises(DataError, match="no images in"):
        build_loader(with_data(config, image_source="pictures"))
