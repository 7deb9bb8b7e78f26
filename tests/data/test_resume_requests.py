"""A run that is cut anywhere asks for what it would have asked for: whatever the workers, ranks, views and sampling."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from loading import assert_same, take, with_data, with_train

from bevt.config import Config
from bevt.data import build
from bevt.data.batch import Batch
from bevt.data.build import build_loader
from bevt.data.decoding import Decoded, Masks, Plan
from bevt.data.entry import Entry, Kind
from bevt.data.manifest import Manifest
from bevt.data.sampling import Sampler
from bevt.recipes import RECIPES

pytest.importorskip("av", reason="PyAV is not installed: pip install av")

CLIPS, IMAGES = 37, 201
"""Files of the streams, some of them unreadable: no multiple of what a step takes, so that epochs end inside steps."""

STEPS = 12
"""Beyond the first epoch of the clips (9.25 steps) and of the images (6.3), and into the second."""


@pytest.fixture
def asked(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """4 clips and 32 images a step, the joint stage's ratio, of files that only a manifest knows: none is decoded."""
    recipe = RECIPES["joint_stage"]().train
    assert recipe.images == 8 * recipe.clips
    sources = {}
    kinds: tuple[tuple[Kind, int], ...] = (("clips", CLIPS), ("images", IMAGES))
    for kind, count in kinds:
        entries = tuple(
            Entry(f"{i:03}", 1 + i, 0, "damaged" if i % 10 == 3 else None, width=128, height=112, frames=5 + 9 * i)
            for i in range(count)
        )
        sources[kind] = str(tmp_path / f"{kind}.jsonl")
        Manifest(kind, str(tmp_path), entries).save(sources[kind])
    monkeypatch.setattr(build, "make_backend", Ahead)
    return with_train(with_data(config, **sources), clips=4, images=32, micro_clips=1, micro_images=8)


class Ahead:
    """In place of a decoder: as many plans are taken ahead as by `data.workers` processes, and no pixels made."""

    def __init__(self, name: str, data: build.DataConfig) -> None:
        self.name, self._count = name, data.workers * data.prefetch

    def decode(self, plans: Iterable[Plan], masks: Masks) -> Generator[tuple[Plan, Decoded], None, None]:
        """Every plan with its masks, in order."""
        waiting: deque[Plan] = deque()
        for plan in plans:
            waiting.append(plan)
            if len(waiting) > self._count:
                plan = waiting.popleft()
                yield plan, Decoded(None, masks("clips", plan.clips), None, masks("images", plan.images), [])


def interrupted(config: Config, count: int, cut: int, again: Config, **rank: int) -> Iterator[Batch]:
    """What follows a cut after `cut` micro-batches, up to `count` of them, when the run goes on as `again` says."""
    loader = build_loader(config, **rank)
    list(itertools.islice(loader, cut))
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    assert state["step"] == cut // loader.accumulation
    loader = build_loader(again, **rank)
    loader.load_state_dict(state)
    yield from itertools.islice(loader, count - state["step"] * loader.accumulation)
    loader.close()


@pytest.mark.parametrize("sampling", ["dense", "segments"])
@pytest.mark.parametrize("views", [0, 3])
def test_the_rest_of_an_interrupted_run(asked: Config, views: int, sampling: str) -> None:
    """Of every rank of 1 and 2, under 1, 2 and 4 workers before and after the cut, at random micro-batches."""
    base, draw = with_data(asked, views=views, sampling=sampling), random.Random(views)
    for world_size, workers in itertools.product((1, 2), (1, 2, 4)):
        rank = {"rank": draw.randrange(world_size), "world_size": world_size}
        count = STEPS * 4 // world_size
        expected = take(with_data(base, workers=0), count, **rank)
        assert all((batch.clip_slots is not None) == bool(views) for batch in expected)
        for _ in range(2):
            cut, later = draw.randrange(1, count), draw.choice((1, 2, 4))
            config, again = with_data(base, workers=workers), with_data(base, workers=later)
            rest = list(interrupted(config, count, cut, again, **rank))
            whole_steps = cut * world_size // 4 * 4 // world_size
            assert len(rest) == count - whole_steps
            for batch, other in zip(rest, expected[whole_steps:], strict=True):
                assert_same(batch, other)


def together(batches: Iterable[Batch]) -> dict[str, object]:
    """The samples of some micro-batches, in order: every field as one list, tuple after tuple and row after row."""
    found: dict[str, list[object]] = {}
    for batch in batches:
        for field in fields(Batch):
            value = getattr(batch, field.name)
            rows = value.tolist() if isinstance(value, torch.Tensor) else value
            found.setdefault(field.name, []).extend(rows or ())
    return dict(found)


@pytest.mark.parametrize("sampling", ["dense", "segments"])
@pytest.mark.parametrize("views", [0, 3])
def test_ranks_share_one_sequence(asked: Config, views: int, sampling: str) -> None:
    """The samples of a step, micro-batch by micro-batch and in each rank by rank, are those of one rank: in order of
    their global positions, over the ends of both epochs.
    """
    config = with_data(asked, views=views, sampling=sampling)
    shared = {}
    for world_size in (1, 2, 4):
        ranks = [take(config, STEPS * 4 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
        shared[world_size] = together(batch for micro in zip(*ranks, strict=True) for batch in micro)
    assert shared[1] == shared[2] == shared[4]
    for stream, count, name in (("clips", 4, "clip"), ("images", 32, "image")):
        sampler = Sampler(Manifest.load(getattr(config.data, stream)), config.data, stream, config.train.seed)  # type: ignore[arg-type]
        requests = [sampler.request(position) for position in range(STEPS * count)]
        assert shared[1][f"{name}_ids"] == [request.id for request in requests]
        assert shared[1][f"{name}_slots"] == [request.slot for request in requests if views]
        assert len(requests) > len(sampler), "no epoch ends here"


@cache
def uninterrupted(config: Config, rank: int, world_size: int) -> list[Batch]:
    """Decoded in this process, 12 micro-batches."""
    return take(with_data(config, workers=0), 12, rank=rank, world_size=world_size)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_decoded_batches(config: Config, workers: int) -> None:
    """Pixels too, of real files by real processes, for one rank and for the second of two; epochs end on the way."""
    draw = random.Random(workers)
    for rank, world_size in ((0, 1), (1, 2)):
        expected = uninterrupted(config, rank, world_size)
        cut, config_ = draw.randrange(1, 10), with_data(config, workers=workers)
        rest = list(interrupted(config_, 12, cut, config_, rank=rank, world_size=world_size))
        for batch, other in zip(rest, expected[12 - len(rest) :], strict=True):
            assert_same(batch, other)
