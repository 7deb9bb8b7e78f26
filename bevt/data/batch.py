"""What a data backend hands to the training loop: the `Batch` type and the `Loader` contract."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadFile:
    """A file that could not be read: what happened to which sample, and what was read in its place."""

    stream: str
    """`clips` or `images`."""
    position: int
    """Global position of the sample in the stream; -1: known before the first step, of every position of the file."""
    path: str
    error: str
    replaced_by: str
    """The file that serves the position by the fixed rule: the next readable one in the epoch's order."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one device. A stream that takes no part has None in its fields.

    Letters: B clips, M images, T frames, H = W = crop in pixels, d = T / 2, h = w = crop / 16 (the token grid).
    A backend may leave pixels on the device, but masks are on the CPU until the step moves them: it looks at them to
    choose the frames that are tokenised, and would wait for the device otherwise (it refuses them).
    """

    clips: Tensor | None
    """(B, T, H, W, 3) uint8, RGB."""
    clip_masks: Tensor | None
    """(B, d, h, w) bool, True = hidden from the encoder."""
    images: Tensor | None
    """(M, H, W, 3) uint8, RGB, before colour jitter."""
    image_masks: Tensor | None
    """(M, h, w) bool."""
    image_jitter: Tensor | None
    """(M, 6) float32: brightness, contrast, saturation factors, then the order in which the three are applied."""
    clip_seeds: Tensor | None = None
    """(B,) int64 on the CPU: what a visit of a sample draws its mask from, and drop path; None: nothing is dropped."""
    image_seeds: Tensor | None = None
    """(M,) int64 on the CPU, likewise."""
    clip_slots: Tensor | None = None
    """(B,) int64 on the CPU: file number * `data.views` + view; None where views are not fixed."""
    image_slots: Tensor | None = None
    """(M,) int64 on the CPU, likewise."""
    clip_labels: Tensor | None = None
    """(B,) int64 on the CPU: numbers of the classes; -1: none."""
    image_labels: Tensor | None = None
    """(M,) int64 on the CPU, likewise."""
    clip_ids: tuple[str, ...] = ()
    """One per clip: `path@frame,frame,...`."""
    image_ids: tuple[str, ...] = ()
    """One per image: `path`, or `path@frame` where it is a frame of a video."""
    bad: tuple[BadFile, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch with every tensor on `device` (asynchronously from pinned memory)."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("clips", "clip_masks", "images", "image_masks", "image_jitter")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


class Loader(Protocol):
    """An endless, resumable source of micro-batches; what it yields is a function of (seed, step) alone."""

    steps_per_epoch: float
    """Optimizer steps in one pass over the clips (over the images where there are no clips)."""

    accumulation: int
    """Micro-batches of one process that make one optimizer step."""

    unreadable: tuple[BadFile, ...]
    """Files that the index already knows to be unreadable, position -1; they are in no `Batch.bad`."""

    def __iter__(self) -> Iterator[Batch]:
        """Micro-batches from the current step on: `accumulation` of them make one optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """Where the next step starts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`; raises ValueError where it belongs to other data or another seed."""

    def close(self) -> None:
        """End the workers; idempotent."""
