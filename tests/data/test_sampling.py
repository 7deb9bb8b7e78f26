"""The sampler: pure, fair, inside the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevt.config import DataConfig
from bevt.data.manifest import Entry, Manifest
from bevt.data.sampling import NO_JITTER, Sampler

CLIPS = Manifest(
    "clips",
    "/videos",
    tuple(
        Entry(f"{i}.mp4", 1000 + i, 0, width=340, height=256, frames=frames, keys=((0, 0), (60, 600), (150, 1500)))
        for i, frames in enumerate((300, 121, 120, 32, 1, 500, 200))
    ),
)
IMAGES = Manifest(
    "images", "/images", tuple(Entry(f"{i}.jpg", 10, 0, width=400, height=300, frames=1) for i in range(50))
)


@given(position=st.integers(0, 10**6), seed=st.integers(0, 2**31), substitute=st.integers(0, 10))
def test_request_is_pure(position: int, seed: int, substitute: int) -> None:
    """The history of a sampler leaves no trace in what it answers."""
    used = Sampler(CLIPS, DataConfig(), "clips", seed)
    for other in (position + 9, position // 2, 3):
        used.request(other)
    assert used.request(position, substitute) == Sampler(CLIPS, DataConfig(), "clips", seed).request(
        position, substitute
    )


@given(position=st.integers(0, 10**6))
def test_request_lies_inside_its_file(position: int) -> None:
    """Frames exist, loop where the span does not fit, and the crop lies in the resized frame."""
    data = DataConfig()
    request = Sampler(CLIPS, data, "clips", 0).request(position)
    length = CLIPS.entries[int(request.path.split("/")[-1].split(".")[0])].frames
    start = request.frames[0]
    assert request.frames == tuple((start + 8 * i) % length for i in range(16))
    assert start + 120 < length if length >= 121 else start == 0
    height, width = request.resize
    assert 256 <= height <= 320
    assert width == round(340 * height / 256)
    assert 0 <= request.crop[0] <= height - 224
    assert 0 <= request.crop[1] <= width - 224
    assert request.seek is None or request.seek[0] <= min(request.frames)
    assert request.jitter == NO_JITTER


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_epoch_visits_every_file_once(epoch: int) -> None:
    """In an order of its own."""
    sampler = Sampler(IMAGES, DataConfig(), "images", 3)
    paths = [sampler.request(epoch * 50 + i).path for i in range(50)]
    assert sorted(paths) == sorted(IMAGES.locate(entry) for entry in IMAGES.entries)
    assert paths != [sampler.request((epoch + 1) * 50 + i).path for i in range(50)]


def test_draws_are_uniform() -> None:
    """Means and ends of 4,000 images' numbers; the tolerance is four standard errors."""
    sampler = Sampler(IMAGES, DataConfig(), "images", 0)
    requests = [sampler.request(i) for i in range(4000)]
    sides = np.array([min(r.resize) for r in requests])
    assert (sides.min(), sides.max()) == (256, 320)
    assert abs(sides.mean() - 288) < 4 * 18.8 / 63
    assert abs(np.mean([r.flip for r in requests]) - 0.5) < 4 * 0.5 / 63
    factors = np.array([r.jitter[:3] for r in requests])
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert np.abs(factors.mean(0) - 1).max() < 4 * 0.231 / 63
    _, counts = np.unique([r.jitter[3:] for r in requests], axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - 4000 / 6).max() < 4 * 23.6
    assert len({r.mask_seed for r in requests}) == 4000


def test_evaluation_is_centred_and_in_order() -> None:
    """The middle of the video, the centre crop, no flip, no jitter, files in their own order."""
    sampler = Sampler(CLIPS, DataConfig(), "clips", 0, train=False)
    request = sampler.request(0)
    assert request.path == "/videos/0.mp4"
    assert request.frames == tuple(range(89, 210, 8))
    assert (request.resize, request.crop, request.flip) == ((256, 340), (16, 58), False)
    assert request.seek == (60, 600)


def test_substitute_is_the_next_file_with_the_same_mask() -> None:
    """The fixed rule for unreadable files."""
    sampler = Sampler(IMAGES, DataConfig(), "images", 0)
    assert sampler.request(7, substitute=2).path == sampler.request(9).path
    assert sampler.request(7, substitute=2).mask_seed == sampler.request(7).mask_seed


def test_files_known_to_be_unreadable_keep_their_places() -> None:
    """They change neither the length nor another position; theirs go to the next readable file of the epoch's order."""
    bad = {"/images/3.jpg", "/images/17.jpg", "/images/18.jpg"}
    entries = tuple(
        replace(entry, error="damaged" if f"/images/{entry.path}" in bad else None) for entry in IMAGES.entries
    )
    whole = Sampler(IMAGES, DataConfig(), "images", 0)
    sampler = Sampler(replace(IMAGES, entries=entries), DataConfig(), "images", 0)
    assert (len(sampler), sampler.readable) == (50, 47)
    assert sampler.manifest.fingerprint() == IMAGES.fingerprint()
    for epoch in (0, 1):
        order = [whole.request(50 * epoch + place).path for place in range(50)]
        for place in range(50):
            left = [path for path in order[place:] + order[:place] if path not in bad]
            for k in range(3):
                request = sampler.request(50 * epoch + place, substitute=k)
                assert request == replace(whole.request(50 * epoch + place), path=left[k])


def test_known_values() -> None:
    """The samples of a seed never change: a resumed run has to find them again."""
    request = Sampler(CLIPS, DataConfig(), "clips", 0).request(12345)
    assert (request.path, request.resize, request.crop) == ("/videos/3.mp4", (312, 414), (13, 156))
    assert (request.frames[:5], request.flip, request.mask_seed) == ((0, 8, 16, 24, 0), True, 1875867415229846789)
