"""The embedded dataset: the same pictures everywhere, real files, labels."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from bevt.data import DataError, shapes
from bevt.data.manifest import open_source, probe_source

pytest.importorskip("av", reason="PyAV is not installed: pip install av")


def test_rendered_frames_never_change() -> None:
    """One hash over nine clips (every motion) and six stills; the encoded bytes may differ between FFmpeg builds."""
    digest = hashlib.sha256()
    for i in range(9):
        digest.update(shapes.render(shapes.scene(0, "train", i * 7, still=False), 5).tobytes())
    for i in range(6):
        digest.update(shapes.render(shapes.scene(0, "val", i, still=True), 1).tobytes())
    assert digest.hexdigest()[:16] == "db89f66038a61351"


def test_seeds_and_splits_differ() -> None:
    """Held-out scenes are not training scenes."""
    scenes = [
        shapes.scene(seed, split, i, still=False) for seed in (0, 1) for split in ("train", "val") for i in range(40)
    ]
    assert len(set(scenes)) == len(scenes)


@pytest.mark.parametrize("index", range(9))
def test_the_shape_moves(index: int) -> None:
    """Every motion changes the picture from frame to frame, and most of the picture stays."""
    frames = shapes.render(shapes.scene(0, "train", index, still=False)).astype(int)
    changed = (np.abs(np.diff(frames, axis=0)).max(-1) > 8).mean((1, 2))
    assert changed.mean() > 0.002
    assert changed.max() < 0.25


def test_files(dataset: shapes.ShapesPaths) -> None:
    """H.264 and VP9 in turn, all readable, 40 frames of 128x112; JPEGs of the same size."""
    entries = open_source(dataset.train_clips, "clips").entries
    assert [entry.format for entry in entries] == ["h264", "vp9"] * 3 + ["h264"]
    assert {(entry.frames, entry.width, entry.height, entry.error) for entry in entries} == {(40, 128, 112, None)}
    images = open_source(dataset.train_images, "images").entries
    assert {(entry.format, entry.width, entry.height) for entry in images} == {("JPEG", 128, 112)}
    assert len(images) == 10


def test_decoded_frames_are_close_to_the_rendered(dataset: shapes.ShapesPaths) -> None:
    """Encoding is lossy, not wrong: the mean difference stays under 4 levels."""
    import av

    for i, name in enumerate(("0000.mp4", "0001.webm")):
        with av.open(str(Path(dataset.train_clips) / name)) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        rendered = shapes.render(shapes.scene(0, "train", i, still=False))
        assert np.abs(decoded.astype(int) - rendered).mean() < 4


def test_labels(dataset: shapes.ShapesPaths) -> None:
    """One row a file, with what moves and how."""
    with open(dataset.labels, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 + 3 + 10 + 5
    assert all((Path(dataset.labels).parent / row["path"]).exists() for row in rows)
    assert [row["motion"] for row in rows[:7]] == list(shapes.MOTIONS[:7])


def test_interrupted_rendering_is_completed(tmp_path: Path) -> None:
    """A missing file is made again, the others are left alone."""
    counts = dict(train_clips=2, val_clips=0, train_images=1, val_images=0)
    first = shapes.ensure(tmp_path, **counts)
    folder = Path(first.train_clips)
    kept = (folder / "0000.mp4").stat().st_mtime_ns
    (folder / "0001.webm").unlink()
    (folder.parent / "complete.json").unlink()
    shapes.ensure(tmp_path, **counts)
    assert (folder / "0000.mp4").stat().st_mtime_ns == kept
    assert (folder / "0001.webm").exists()


def test_the_dataset_as_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`shapes:SPLIT[:LABELS]`: rendered once into the user's cache folder, found again, and nothing else is touched."""
    few = {"train_clips": 2, "val_clips": 1, "train_images": 1, "val_images": 1}
    monkeypatch.setattr(shapes, "COUNTS", few)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    manifest = probe_source("shapes:train", "clips")
    assert [entry.path for entry in manifest.entries] == ["0000.mp4", "0001.webm"]
    assert manifest.root.startswith(str(tmp_path / "bevt" / "shapes-"))
    labelled = probe_source("shapes:val:how", "clips")
    with open(Path(manifest.root).parent / "labels.csv", newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["path"].startswith("val_clips/"))
    assert [entry.label for entry in labelled.entries] == [shapes.MOTIONS.index(row["motion"])]
    assert len(probe_source("shapes:val", "images").entries) == 1
    for name, kind in (("shapes:test", "clips"), ("shapes:train:who", "clips"), ("shapes:train:how", "images")):
        with pytest.raises(DataError, match=rf"{name}: of the embedded dataset there are shapes:train and shapes:val"):
            probe_source(name, kind)  # type: ignore[arg-type]
    assert shapes.located("videos", "clips") == "videos"
