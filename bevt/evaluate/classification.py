"""Classifying every held-out file by several views, over any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from bevt import draws
from bevt.config import FinetuneConfig, UserError
from bevt.data import DataError, augment
from bevt.data.build import check_held_out, view_batches
from bevt.data.entry import Entry
from bevt.data.manifest import Manifest
from bevt.evaluate.predictions import Predictions, merge
from bevt.train.distributed import World
from bevt.train.memory import advised, views_at_once
from bevt.train.metrics import RunError
from bevt.train.step import autocast

Order = Literal["normal", "single", "shuffled", "reversed"]

ORDERS: tuple[Order, ...] = ("normal", "single", "shuffled", "reversed")
"""Of a clip's frames: as they are; the middle one in the place of all; in a random order; from the last to the first.
How much a model loses by the second and third is how much it depends on time (paper, Table 2)."""


@torch.no_grad()
def classify(
    model: nn.Module,
    config: FinetuneConfig,
    manifest: Manifest,
    classes: Sequence[str],
    world: World,
    *,
    views: tuple[int, int],
    labels: np.ndarray | None = None,
    orders: Sequence[Order] = ("normal",),
    about: dict[str, str] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[tuple[str, Order], Predictions]:
    """The softmax outputs of every file's `views`, clips x crops (`Sampler.grid`), by head and order of frames.

    Process r of n takes the files r, r + n, ...: each file once, whatever n is; the first one returns all, the others
    nothing. As many views go through the model together as `config.test.memory` lets. Nothing is returned where
    `stopped` says so. Raises DataError, in all processes, that lists the files that cannot be read.
    """
    (clips, crops), heads = views, config.head.names or ("",)
    check_held_out(manifest, config.data.backend)
    most = views_at_once(config, len(classes), world.device.type)
    files = max(1, most // (clips * crops))
    numbers = range(world.rank, len(manifest.entries), world.size)
    found: dict[tuple[str, Order], list[np.ndarray]] = {(head, order): [] for head in heads for order in orders}
    problem: UserError | None = None
    was_training = model.training
    model.eval()
    try:
        batches = view_batches(
            config, config.stream, manifest, numbers, clips=clips, crops=crops, files=files, labels=labels
        )
        with closing(batches):
            for i, batch in enumerate(batches):
                if stopped():
                    break
                pixels = getattr(batch.to(world.device), config.stream)
                clip_numbers = np.array(numbers[i * files : (i + 1) * files])[:, None] * clips + np.arange(clips)
                seeds = clip_numbers.repeat(crops)  # a clip's, so of all its crops
                for order in orders:
                    with advised("test.memory"):
                        outputs = [
                            _outputs(model, config, part, world.device)
                            for part in reordered(pixels, order, seeds).split(most)
                        ]
                    for head, values in zip(heads, torch.cat(outputs, dim=1).cpu().numpy()):
                        found[head, order].append(values)
                        if not np.isfinite(values).all():
                            raise RunError("the model's outputs are not finite: it has diverged; lower optim.lr")
    except (DataError, RunError) as error:
        problem = error
    finally:
        model.train(was_training)
    if problems := [each for each in world.gather(problem) if each]:
        raise type(problems[0])("\n".join(dict.fromkeys(map(str, problems))))
    if any(world.gather(stopped())):
        return {}
    everything = tuple(map(_name, manifest.entries))
    names = tuple(everything[number] for number in numbers)
    own = {
        key: Predictions(
            files=names,
            labels=np.full(len(names), -1) if labels is None else labels[list(numbers)],
            probabilities=np.concatenate(values).reshape(len(names), clips, crops, -1)
            if values
            else np.empty((0, clips, crops, len(classes)), np.float32),
            classes=tuple(classes),
            about=about or {},
        )
        for key, values in found.items()
    }
    parts = world.collect(own)
    return {key: merge([part[key] for part in parts], everything) for key in own} if parts else {}


def _name(entry: Entry) -> str:
    """The file's path in its source, and which frames where it is not all of them."""
    return f"{entry.path}:{entry.start}-{entry.end or ''}" if entry.start or entry.end else entry.path


def _outputs(model: nn.Module, config: FinetuneConfig, views: Tensor, device: torch.device) -> Tensor:
    """(heads, views, classes) float32 softmax outputs of uint8 views."""
    encode = augment.to_encoder_clips if views.ndim == 5 else augment.to_encoder_images
    pixels = encode(views, config.model.pixels)
    with autocast(config, device):
        logits = model(pixels)
    return logits.double().softmax(-1).float().view(-1, len(views), logits.shape[-1])


def reordered(clips: Tensor, order: Order, seeds: np.ndarray) -> Tensor:
    """Clips (B, T, H, W, 3) with their frames in another order; `seeds` (B,) choose that of shuffled ones."""
    if order == "normal":
        return clips
    if order == "single":
        return clips[:, clips.shape[1] // 2, None].expand_as(clips)
    if order == "reversed":
        return clips.flip(1)
    drawn = draws.uniform(draws.keys(seeds), np.arange(clips.shape[1]))
    places = torch.from_numpy(drawn.argsort(axis=1)).to(clips.device)
    return torch.stack([clip[place] for clip, place in zip(clips, places)])
