"""What is asked of the files: a pure map from (seed, epoch, position) to a request, without state and without files.

Randomness is taken from raw PCG64 output, whose bits NumPy guarantees (the methods of `Generator` it does not): the
same samples on every machine and version.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np

from bevt.config import DataConfig
from bevt.data.manifest import Entry, Manifest

Stream = Literal["clips", "images"]
STREAMS: tuple[Stream, ...] = ("clips", "images")

NO_JITTER = (1.0, 1.0, 1.0, 0.0, 1.0, 2.0)
"""Factors 1; brightness, contrast, saturation in that order."""

_ORDERS = tuple(permutations((0.0, 1.0, 2.0)))


@dataclass(frozen=True, slots=True)
class Request:
    """One sample, as every backend has to serve it. Pixels and frame numbers; frames count in presentation order."""

    stream: Stream
    position: int
    """Global position in the stream: epoch * files + place in the epoch."""
    path: str
    frames: tuple[int, ...]
    """Frame numbers in the file; (0,) for an image."""
    resize: tuple[int, int]
    """(height, width) to which the whole upright frame is resized, bicubic."""
    crop: tuple[int, int]
    """(top, left) of the crop in the resized frame."""
    size: int
    """Side of the crop."""
    flip: bool
    """Mirror left and right, after the crop."""
    jitter: tuple[float, ...]
    """Six numbers, as in `Batch.image_jitter`."""
    mask_seed: int
    """For `bevt.masking.generate`, in 0 .. 2**63 - 1."""
    seek: tuple[int, int] | None = None
    """Frame number and timestamp of a key frame from which decoding may start; None: from the beginning."""

    @property
    def id(self) -> str:
        """`path@frame,frame,...` of a clip, the path of an image."""
        return self.path if self.stream == "images" else f"{self.path}@{','.join(map(str, self.frames))}"


class Sampler:
    """Requests for one stream of one run; `len` is the number of files, the length of an epoch.

    Training: every epoch visits every file once, in an order of its own. The place of a file that the manifest knows to
    be unreadable is served by the next readable one of that order, so that such a file changes no other sample. A clip
    starts anywhere it fits; one that is too short starts at frame 0 and loops (frame numbers modulo the length, as in
    the official code). The short side is drawn uniformly from `data.short_side` (both ends included), the crop and the
    flip uniformly; images also draw three jitter factors and their order. With `train=False`: files in their own order,
    the middle of the video, the smaller of `data.short_side`, the centre crop, no flip and no jitter.

    Position p of epoch e uses ten numbers, in this order: start, short side, top, left, flip, brightness, contrast,
    saturation, order, mask seed.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, stream: Stream, seed: int, *, train: bool = True) -> None:
        self.manifest, self.data, self.stream, self.seed, self.train = manifest, data, stream, seed, train
        self._readable = np.array([entry.error is None for entry in manifest.entries])
        self.readable = int(self._readable.sum())
        """Files that can be served."""
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._readable)

    def request(self, position: int, substitute: int = 0) -> Request:
        """The request at a global position; a pure function of (seed, position).

        `substitute` k takes the k-th readable file after that in the epoch's order instead, for a file that turns out
        unreadable. The numbers drawn, and so the mask, stay those of the position.
        """
        data = self.data
        epoch, place = divmod(position, len(self))
        files, places = self._order(epoch)
        entry = self.manifest.entries[files[(np.searchsorted(places, place) + substitute) % self.readable]]
        raw = self._raw(10, epoch, position + 1)
        u = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)

        def below(count: int, i: int) -> int:
            """A number in 0 .. count - 1; the middle one at evaluation."""
            return int(u[i] * count) if self.train else (count - 1) // 2

        frames, seek = (0,), None
        if self.stream == "clips":
            slack = entry.frames - ((data.frames - 1) * data.stride + 1)
            start = below(slack + 1, 0) if slack > 0 else 0
            frames = tuple((start + i * data.stride) % entry.frames for i in range(data.frames))
            seek = max((key for key in entry.keys if 0 < key[0] <= min(frames)), default=None)
        shortest, longest = data.short_side
        short = shortest + (below(longest - shortest + 1, 1) if self.train else 0)
        height, width = _resized(entry, short)
        jitter = NO_JITTER
        if self.train and self.stream == "images" and data.jitter:
            factors = 1 + data.jitter * (2 * u[5:8] - 1)
            jitter = (*factors.tolist(), *_ORDERS[below(6, 8)])
        return Request(
            stream=self.stream,
            position=position,
            path=self.manifest.locate(entry),
            frames=frames,
            resize=(height, width),
            crop=(below(height - data.crop + 1, 2), below(width - data.crop + 1, 3)),
            size=data.crop,
            flip=self.train and bool(u[4] < data.flip),
            jitter=jitter,
            mask_seed=int(raw[9] >> np.uint64(1)),
            seek=seek,
        )

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The readable files in the epoch's order and their places in it (rising), both (readable,) int64.

        Two epochs' are kept: a micro-batch can straddle the end of one.
        """
        if not self.train:
            epoch = 0
        if epoch not in self._orders:
            if len(self._orders) == 2:
                del self._orders[min(self._orders)]
            n = len(self)
            order = np.argsort(self._raw(n, epoch, 0), kind="stable") if self.train else np.arange(n)
            places = np.flatnonzero(self._readable[order])
            self._orders[epoch] = order[places], places
        return self._orders[epoch]

    def _raw(self, count: int, epoch: int, key: int) -> np.ndarray:
        """(count,) uint64; `key` is 0 for the epoch's order, position + 1 for a sample."""
        words = (self.seed, STREAMS.index(self.stream), epoch, key)
        return np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)


def _resized(entry: Entry, short: int) -> tuple[int, int]:
    """(height, width) with the short side at `short` and the aspect kept to the nearest pixel."""
    shortest = min(entry.height, entry.width)
    return tuple(max(short, round(side * short / shortest)) for side in (entry.height, entry.width))  # type: ignore[return-value]
