"""The views of a test, batch by batch: whose they are and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from loading import with_data

from bevt.config import Config
from bevt.data import DataError
from bevt.data.batch import Batch
from bevt.data.build import view_batches
from bevt.data.manifest import Manifest, index

pytest.importorskip("av", reason="PyAV is not installed: pip install av")

LABELS = np.array([5, 3, 4])


@pytest.fixture
def manifest(config: Config) -> Manifest:
    """Three videos of 40 frames, 128 x 112 pixels; resized to 73 x 64."""
    return index(config.data.val_clips, "clips")


def views(config: Config, manifest: Manifest, numbers: Sequence[int], files: int) -> list[Batch]:
    return list(view_batches(config, "clips", manifest, numbers, clips=2, crops=3, files=files, labels=LABELS))


def test_order_of_views(config: Config, manifest: Manifest) -> None:
    """File by file as they are asked for, clip by clip, crop by crop; the last batch has what is left."""
    numbers = [2, 0, 1]
    batches = views(config, manifest, numbers, 2)
    assert [len(batch.clip_ids) for batch in batches] == [12, 6]
    paths = [manifest.locate(manifest.entries[number]) for number in numbers for _ in range(6)]
    # A clip covers 7 of 40 frames: 33 places to the right of the first, of which the two take 1/4 and 3/4.
    frames = [",".join(str(start + 2 * i) for i in range(4)) for start in (8, 24) for _ in range(3)] * 3
    assert [name for batch in batches for name in batch.clip_ids] == [
        f"{path}@{frame}" for path, frame in zip(paths, frames)
    ]
    labels = torch.cat([batch.clip_labels for batch in batches if batch.clip_labels is not None])
    assert labels.tolist() == [4] * 6 + [5] * 6 + [3] * 6


def test_pixels_lie_in_the_order_of_their_names(config: Config, manifest: Manifest) -> None:
    """Crops 0, 4 and 9 pixels from the left of one clip; of another clip, others."""
    for batch in views(config, manifest, [1, 2], 2):
        assert batch.clips is not None
        left, middle, right = batch.clips.unflatten(0, (4, 3)).unbind(1)
        assert torch.equal(left[:, :, :, 4:], middle[:, :, :, :-4])
        assert torch.equal(middle[:, :, :, 5:], right[:, :, :, :-5])
        assert not torch.equal(left[0], left[1])
        assert not torch.equal(left[0], left[2])


def test_batches_hold_the_same_whatever_their_size(config: Config, manifest: Manifest) -> None:
    """One file at a time, in processes of their own."""
    whole, single = (
        torch.cat([batch.clips for batch in views(given, manifest, range(3), files) if batch.clips is not None])
        for given, files in ((config, 3), (with_data(config, workers=1), 1))
    )
    assert torch.equal(whole, single)


def test_training_settings_do_not_matter(config: Config, manifest: Manifest) -> None:
    """No box, no flip, no mask, no label where there are none."""
    (plain,) = view_batches(config, "clips", manifest, [0], clips=1, crops=1, files=4)
    (other,) = view_batches(
        with_data(config, crop_area=(0.1, 0.2), flip=1.0), "clips", manifest, [0], clips=1, crops=1, files=4
    )
    assert plain.clips is not None
    assert other.clips is not None
    assert torch.equal(plain.clips, other.clips)
    assert (plain.clip_masks, plain.clip_labels) == (None, None)


def test_unreadable_files_are_refused(config: Config, manifest: Manifest) -> None:
    """One that the manifest knows has no views."""
    known = replace(manifest.entries[1], error="damaged")
    broken = replace(manifest, entries=(manifest.entries[0], known, manifest.entries[2]))
    with pytest.raises(DataError, match=r"damaged; held-out data is never replaced"):
        views(config, broken, range(3), 1)
