"""What is asked of the files: a pure map from (seed, epoch, position) to a request, without state and without files.

Randomness is taken from raw PCG64 output, whose bits NumPy guarantees (the methods of `Generator` it does not): the
same samples on every machine and version.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Literal

import numpy as np

from bevt.config import DataConfig
from bevt.data import DataError
from bevt.data.files import File
from bevt.data.manifest import Entry, Kind, Manifest

Stream = Literal["clips", "images"]
STREAMS: tuple[Stream, ...] = ("clips", "images")

NO_JITTER = (1.0, 1.0, 1.0, 0.0, 1.0, 2.0)
"""Factors 1; brightness, contrast, saturation in that order."""

NEVER_REPLACED = "held-out data is never replaced: repair the file or remove it"

_ORDERS = tuple(permutations((0.0, 1.0, 2.0)))

_NUMBERS = 11
"""Random numbers of a sample, before those of its segments."""

_VIEWS = 2**64 + 1
"""In place of the seed where a file's fixed views are drawn: larger than any seed, so the same in every run."""

_ATTEMPTS = 10
"""Boxes of RandomResizedCrop that are drawn until one lies in the frame."""

_ASPECT = 4 / 3
"""RandomResizedCrop's largest width over height; the least is its inverse."""

_QUARTERS = tuple((y, x) for y in range(5) for x in range(5) if y % 2 == x % 2)
"""Places of the multi-scale crop, in quarters of the way down and right: 9 on the even lines, 4 between them."""

_WORTH_SEEKING = 12
"""Frames that a jump to a key frame in the middle of a clip has to save; about what a jump costs."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sample, as every backend has to serve it. Pixels and frame numbers; frames count in presentation order."""

    stream: Stream
    position: int
    """Global position in the stream: epoch * files + place in the epoch."""
    file: File
    kind: Kind
    """What the file is: `clips` a video, of which an image is one frame, `images` a picture."""
    frames: tuple[int, ...]
    """Frame numbers in the file; (0,) of a picture."""
    resize: tuple[int, int]
    """(height, width) to which the whole upright frame is resized, bicubic with antialiasing."""
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
    slot: int = -1
    """File number * `data.views` + view; -1 where views are not fixed."""
    seeks: tuple[tuple[int, int], ...] = ()
    """(frame number, timestamp) of key frames, rising, to which a decoder on its way to the next frame may jump."""
    timing: tuple[int, float] | None = None
    """`Entry.timing`."""
    turns: int = 0
    """`Entry.turns`."""
    picture: tuple[int, int] = (0, 0)
    """(height, width) of the upright picture, as the manifest has it; (0, 0): not known."""
    label: int = -1
    """Number of its class; -1: none."""
    cut: int = 0
    """Which of several cuts of the position's file it is."""

    @property
    def path(self) -> str:
        """The file's name."""
        return self.file.name

    @property
    def id(self) -> str:
        """`path@frame,frame,...` of a video, the path of a picture."""
        return self.path if self.kind == "images" else f"{self.path}@{','.join(map(str, self.frames))}"


class Sampler:
    """Requests for one stream of one run; `len` is the number of files, the length of an epoch.

    Training: every epoch visits every file once, in an order of its own. The place of a file that the manifest knows to
    be unreadable is served by the next readable one of that order, so that such a file changes no other sample. Frames:

    - `dense`: `data.frames` frames, `data.stride` apart; the clip starts anywhere it fits. A file that is too short is
      read from its first frame and loops (frame numbers modulo the length, as in the official code).
    - `segments`: one frame from each of `data.frames` equal parts, drawn uniformly (Something-Something; TSN, arXiv
      1608.00859, section 3.1); a file with fewer frames repeats them.

    An image that is taken from a video is one frame of it, drawn uniformly whatever `data.sampling` says.

    The short side is drawn uniformly from `data.short_side` (both ends included), the crop and the flip uniformly;
    images also draw three jitter factors and their order. With `data.crop_area` a box of random area and aspect is cut
    out instead and resized to the crop's size (RandomResizedCrop, as mmaction has it), with `data.crop_scales` one of
    TSN's multi-scale crop. With `train=False`: files in
    their own order, the middle of the video (of each part), the smaller of `data.short_side`, the centre crop, no flip
    and no jitter.

    Where `data.views` is V > 0, a file is cut in V ways only, which depend on its number in the manifest alone; which
    of them a position takes, and its mask, are drawn as everything else.

    Position p of epoch e uses eleven numbers, in this order: start, short side, top, left, flip, brightness, contrast,
    saturation, order, mask seed, view; then, for `segments`, one a frame; then, for `crop_area`, the areas of ten boxes
    and their aspects.

    `labels` (files,) are the numbers of the files' classes.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        stream: Stream,
        seed: int,
        *,
        train: bool = True,
        labels: np.ndarray | None = None,
    ) -> None:
        self.manifest, self.data, self.stream, self.seed, self.train = manifest, data, stream, seed, train
        self.labels = labels
        self._readable = np.ones(len(manifest.entries), bool)
        self._readable[manifest.unreadable] = False
        self.readable = int(self._readable.sum())
        """Files that can be served."""
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._readable)

    def request(self, position: int, substitute: int = 0, cut: int = 0) -> Request:
        """The request at a global position; a pure function of (seed, position, cut): each cut has numbers of its own.

        `substitute` k takes the k-th readable file after that in the epoch's order instead, for a file that turns out
        unreadable. The numbers drawn, and so the mask, stay those of the position.
        """
        data = self.data
        epoch, place = divmod(position, len(self))
        files, places = self._order(epoch)
        number = int(files[(np.searchsorted(places, place) + substitute) % self.readable])
        needed = _NUMBERS + data.frames + (2 * _ATTEMPTS if data.crop_area[1] else 0)
        drawn = self._raw(needed, self.seed, epoch, position + 1, cut)
        mask_seed, slot = int(drawn[9] >> np.uint64(1)), -1
        if data.views and self.train:
            view = int(drawn[10] % np.uint64(data.views))
            slot = number * data.views + view
            drawn = self._raw(needed, _VIEWS, number, view)
        u = (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
        shortest, longest = data.short_side

        def below(count: int, i: int) -> int:
            """A number in 0 .. count - 1; the middle one at evaluation."""
            return int(u[i] * count) if self.train else (count - 1) // 2

        entry = self.manifest.entries[number]
        frames = self._frames(entry, u if self.train else None, 0.5) if self.manifest.kind == "clips" else (0,)
        if self.train and data.crop_area[1]:
            resize, crop = _box(entry, data, u)
        elif self.train and data.crop_scales:
            resize, crop = _multi_scale(entry, data, u)
        else:
            resize = height, width = _resized(entry, shortest + (below(longest - shortest + 1, 1) if self.train else 0))
            crop = below(height - data.crop + 1, 2), below(width - data.crop + 1, 3)
        jitter = NO_JITTER
        if self.train and self.stream == "images" and data.jitter:
            factors = 1 + data.jitter * (2 * u[5:8] - 1)
            jitter = (*factors.tolist(), *_ORDERS[below(6, 8)])
        return self._request(
            number,
            entry,
            position=position,
            frames=frames,
            resize=resize,
            crop=crop,
            flip=self.train and bool(u[4] < data.flip),
            jitter=jitter,
            mask_seed=mask_seed,
            slot=slot,
            cut=cut,
        )

    def grid(self, number: int, clips: int, crops: int) -> list[Request]:
        """The test views of file `number`, clip by clip, each with its crops: what a video-level score is a mean over.

        Clip k of n lies at (2 k + 1) / (2 n) of where it fits (`segments`: of every part); crop j of m > 1 lies at
        j / (m - 1) of the longer side, the only one in its middle, all in the middle of the shorter one: K400's 4 x 3
        and Something-Something's 1 x 3 (Video Swin, arXiv 2106.13230, section 4.1). The short side is the smaller of
        `data.short_side`; no flip. Raises DataError where the manifest has an error for the file.
        """
        entry = self.manifest.entries[number]
        if entry.error:
            raise DataError(f"{self.manifest.locate(entry)}: {entry.error}; {NEVER_REPLACED}")
        height, width = _resized(entry, self.data.short_side[0])
        out = []
        for clip in range(clips):
            frames = self._frames(entry, None, (2 * clip + 1) / (2 * clips))
            for crop in range(crops):
                share = crop / (crops - 1) if crops > 1 else 0.5
                down, right = (0.5, share) if width > height else (share, 0.5)
                at = int((height - self.data.crop) * down), int((width - self.data.crop) * right)
                out.append(
                    self._request(number, entry, position=number, frames=frames, resize=(height, width), crop=at)
                )
        return out

    def _request(
        self,
        number: int,
        entry: Entry,
        *,
        position: int,
        frames: tuple[int, ...],
        resize: tuple[int, int],
        crop: tuple[int, int],
        flip: bool = False,
        jitter: tuple[float, ...] = NO_JITTER,
        mask_seed: int = 0,
        slot: int = -1,
        cut: int = 0,
    ) -> Request:
        """The request, with what the manifest knows of the file."""
        return Request(
            stream=self.stream,
            position=position,
            file=self.manifest.file(entry),
            kind=self.manifest.kind,
            frames=frames,
            resize=resize,
            crop=crop,
            size=self.data.crop,
            flip=flip,
            jitter=jitter,
            mask_seed=mask_seed,
            slot=slot,
            seeks=_seeks(entry, frames),
            timing=entry.timing,
            turns=entry.turns,
            picture=(entry.height, entry.width),
            label=-1 if self.labels is None else int(self.labels[number]),
            cut=cut,
        )

    def _frames(self, entry: Entry, u: np.ndarray | None, share: float) -> tuple[int, ...]:
        """Frame numbers of a clip, or of an image (one): drawn with the numbers `u`, or without them at `share`
        (0 .. 1) of the way.
        """
        count, stride = (self.data.frames, self.data.stride) if self.stream == "clips" else (1, 1)
        first, length = entry.start, (entry.end or entry.frames) - entry.start
        if self.stream == "clips" and self.data.sampling == "segments":
            parts = list(pairwise(i * length // count for i in range(count + 1)))
            if u is None:
                return tuple(first + a + int(max(b - a - 1, 0) * share) for a, b in parts)
            return tuple(
                first + a + int(max(b - a, 1) * x)
                for (a, b), x in zip(parts, u[_NUMBERS : _NUMBERS + count], strict=True)
            )
        slack = max(0, length - ((count - 1) * stride + 1))
        begin = int(slack * share) if u is None else int((slack + 1) * u[0])
        return tuple(first + (begin + i * stride) % length for i in range(count))

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
            order = np.argsort(self._raw(n, self.seed, epoch, 0), kind="stable") if self.train else np.arange(n)
            places = np.flatnonzero(self._readable[order])
            self._orders[epoch] = order[places], places
        return self._orders[epoch]

    def _raw(self, count: int, seed: int, epoch: int, key: int, cut: int = 0) -> np.ndarray:
        """(count,) uint64; `key` is 0 for the epoch's order, position + 1 for a sample.

        For the fixed views of a file, `seed` is _VIEWS, and its number and the view take the two other places.
        """
        words = (seed, STREAMS.index(self.stream), epoch, key, *([cut] if cut else []))
        return np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)


def _resized(entry: Entry, short: int) -> tuple[int, int]:
    """(height, width) with the short side at `short` and the aspect kept to the nearest pixel."""
    shortest = min(entry.height, entry.width)
    return tuple(max(short, round(side * short / shortest)) for side in (entry.height, entry.width))  # type: ignore[return-value]


def _box(entry: Entry, data: DataConfig, u: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """RandomResizedCrop as (whole frame's size, place of the crop in it) after the resize.

    Area uniform, aspect log-uniform; the first of ten boxes that lies in the frame, else the largest square in the
    middle (mmaction 0.15, `RandomResizedCrop`).
    """
    height, width = entry.height, entry.width
    least, most = data.crop_area
    area, aspect = u[-2 * _ATTEMPTS :].reshape(2, _ATTEMPTS)
    area = (least + (most - least) * area) * height * width
    aspect = _ASPECT ** (2 * aspect - 1)
    heights, widths = np.rint(np.sqrt(area / aspect)).astype(int), np.rint(np.sqrt(area * aspect)).astype(int)
    fits = np.flatnonzero((heights <= height) & (widths <= width) & (heights > 0) & (widths > 0))
    if len(fits):
        high, wide = int(heights[fits[0]]), int(widths[fits[0]])
        top, left = int(u[2] * (height - high + 1)), int(u[3] * (width - wide + 1))
    else:
        high = wide = min(height, width)
        top, left = (height - high) // 2, (width - wide) // 2
    return _cut_out(entry, data, (top, left, high, wide))


def _multi_scale(entry: Entry, data: DataConfig, u: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """TSN's multi-scale crop as (whole frame's size, place of the crop in it) after the resize.

    Height and width are shares of the short side, whose places in the list of scales differ by one at most; the place
    is one of 13 of a grid of quarters of what is left (VideoMAE `transforms.py`, `GroupMultiScaleCrop`).
    """
    scales, shortest = data.crop_scales, min(entry.height, entry.width)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    high, wide = (max(1, int(shortest * scale)) for scale in pairs[int(u[1] * len(pairs))])
    down, right = _QUARTERS[int(u[2] * len(_QUARTERS))]
    top, left = (entry.height - high) // 4 * down, (entry.width - wide) // 4 * right
    return _cut_out(entry, data, (top, left, high, wide))


def _cut_out(entry: Entry, data: DataConfig, box: tuple[int, int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of the whole frame, and the place of the crop in it, with which a box (top, left, height, width) of the
    frame becomes the crop.
    """
    top, left, high, wide = box
    resize = round(entry.height * data.crop / high), round(entry.width * data.crop / wide)
    place = (round(top * data.crop / high), round(left * data.crop / wide))
    return resize, (min(place[0], resize[0] - data.crop), min(place[1], resize[1] - data.crop))


def _seeks(entry: Entry, frames: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The key frames worth jumping to on the way through `frames`: before the first, and into long gaps."""
    found: list[tuple[int, int]] = []
    numbers = [number for number, _ in entry.keys]
    before = None
    for frame in sorted(set(frames)):
        at = bisect_right(numbers, frame) - 1
        if at >= 0 and (numbers[at] > 0 if before is None else numbers[at] - before >= _WORTH_SEEKING):
            found.append(entry.keys[at])
        before = frame
    return tuple(found)
