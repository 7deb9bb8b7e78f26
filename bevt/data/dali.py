"""The DALI backend: encoded bytes in, cut pixels out, on the GPU (NVDEC, nvJPEG) or, for VP8, VP9 and MJPEG, on CPUs.

One pipeline definition for videos and one for images; `device_id` alone decides where they run. Each decodes, turns the
crop of the resized frame back into a region of the decoded one, and resizes just that region (bicubic, antialiased:
the pixels of resizing everything and cropping). The batch reaches PyTorch through DLPack without a copy, on the device.
Colour jitter and the tokenizer's second resize follow there, in `bevt.data.augment`, for every backend alike: DALI's
Lanczos antialiases, and the tokenizer was made for a resize that does not.

Requests come from the same sampler as everybody's; a thread pool reads whole files, of `data.prefetch` micro-batches
ahead of those that are being decoded: that much memory they take. DALI drops a whole pipeline where one sample cannot
be decoded, so that micro-batch is then decoded file by file, and a new pipeline goes on behind it. What DALI cannot
decode PyAV does, or says why nobody can: which samples a step holds does not depend on the decoder.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, tee
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bevt.config import DataConfig
from bevt.data import DataError, pyav
from bevt.data.decoding import Begun, Decoded, Masks, Plan, shape
from bevt.data.files import ReadError
from bevt.data.manifest import Kind, Manifest
from bevt.data.sampling import STREAMS, Request, Stream

CODECS = {
    "CPUs": ("vp8", "vp9", "mjpeg"),
    "GPUs": ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg"),
}
"""What `decoders.video` of DALI 2.4 decodes, by where it runs (its own documentation; H.264 on CPUs ended with 2.1)."""

IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF")
"""What `decoders.image` decodes, by Pillow's names."""

PIXEL_FORMATS = ("yuv420p", "yuvj420p")
"""8-bit 4:2:0, which every one of these decoders takes."""

_INPUTS: dict[Kind, int] = {"clips": 6, "images": 5}
"""How many of `_columns` a pipeline takes: pictures have no frame numbers."""

_log = logging.getLogger("bevt.data")


def refusal(manifest: Manifest, device_id: int | None) -> str:
    """Why DALI cannot serve these files on that device (None: the CPU); empty where it can."""
    if manifest.kind == "images":
        strange = [name for name, _ in manifest.formats if name not in IMAGE_FORMATS]
        return f"DALI decodes {', '.join(IMAGE_FORMATS)}, not {strange[0]}" if strange else ""
    where = "CPUs" if device_id is None else "GPUs"
    for codec, pixels in manifest.formats:
        if codec not in CODECS[where]:
            elsewhere = "on a GPU it decodes" if codec in CODECS["GPUs"] else "it decodes"
            names = CODECS["GPUs" if codec in CODECS["GPUs"] else where]
            return f"DALI does not decode {codec} on {where} ({elsewhere} {', '.join(names)})"
        if pixels not in PIXEL_FORMATS:
            return f"DALI's video decoders take 8-bit 4:2:0 ({', '.join(PIXEL_FORMATS)}), not {codec} in {pixels}"
    return ""


def library() -> ModuleType:
    """DALI, or a DataError that says how to get it."""
    try:
        from nvidia import dali
    except (ImportError, OSError) as error:
        raise DataError(
            f"DALI does not import ({error}); install it: `pip install 'bevt[dali]'` (CUDA 13 or no GPU) or "
            "`pip install 'bevt[dali-cuda12]'`"
        ) from error
    return dali


class Pipelines:
    """`bevt.data.decoding.Backend` of DALI on one device; None: the CPU."""

    name = "dali"

    def __init__(self, data: DataConfig, device_id: int | None) -> None:
        self._data, self._device_id = data, device_id
        self._device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self._told: set[str] = set()
        library()

    def read(self, requests: Sequence[Request], into: Sequence[Tensor]) -> None:
        """Decode requests of one file; by PyAV, which the log then says, where DALI cannot. Raises ReadError."""
        for request, out in zip(requests, into, strict=True):
            sample = load(request)
            pipeline = self.pipeline(request.kind, iter([[sample]]), 1, request.size)
            try:
                out.copy_(self._run(pipeline, [sample]).view_as(out))
            except _Broken as broken:
                host = torch.zeros(out.shape, dtype=torch.uint8)
                pyav.read([request], [host])
                out.copy_(host)
                if request.path not in self._told:
                    self._told.add(request.path)
                    _log.warning("%s: %s; PyAV decodes it in its place", request.path, broken.reason)

    def decode(self, plans: Iterable[Plan], masks: Masks) -> Generator[tuple[Plan, Decoded], None, None]:
        """As `Backend.decode`; `data.prefetch` plans are being decoded ahead, as many more being read."""
        begun = Begun(plans)
        while True:
            running = self._decode(begun.hand_out(), masks)
            try:
                for decoded in running:
                    yield begun.finish(), decoded
                return
            except _Broken:
                plan = begun.finish()
            finally:
                running.close()
            yield plan, self._one_by_one(plan, masks)
            begun.start_over()

    def _decode(self, plans: Iterable[Plan], masks: Masks) -> Generator[Decoded, None, None]:
        """The plans through a pipeline a stream. Raises _Broken where one of them has ended."""
        with ThreadPoolExecutor(max(1, self._data.workers), "bevt-read") as threads:
            loaded = _ahead(threads, plans, self._data.prefetch, masks)
            first = next(loaded, None)
            if first is None:
                return
            streams = [stream for stream in STREAMS if getattr(first.plan, stream)]
            mine, *feeds = tee(chain([first], loaded), 1 + len(streams))
            pipelines = {}
            for stream, feed in zip(streams, feeds, strict=True):
                requests = getattr(first.plan, stream)
                kind, size = requests[0].kind, requests[0].size
                pipelines[stream] = self.pipeline(kind, _batches(feed, stream), len(requests), size)
            del first
            for item in mine:
                pixels = {stream: self._pixels(item, stream, pipeline) for stream, pipeline in pipelines.items()}
                yield Decoded(
                    pixels.get("clips"), item.clip_masks, pixels.get("images"), item.image_masks, item.failures
                )

    def _pixels(self, item: _Loaded, stream: Stream, pipeline: Any) -> Tensor:
        """A plan's pixels of one stream; zeros for what could not be loaded."""
        requests, samples = getattr(item.plan, stream), item.samples[stream]
        found = self._run(pipeline, samples).view(-1, *shape(requests)[1:]) if samples else None
        if found is not None and len(samples) == len(requests):
            return found
        out = torch.zeros(shape(requests), dtype=torch.uint8, device=self._device)
        lost = {row for name, row, _ in item.failures if name == stream}
        if found is not None:
            out[[row for row in range(len(requests)) if row not in lost]] = found
        return out

    def _one_by_one(self, plan: Plan, masks: Masks) -> Decoded:
        """A plan decoded file by file, which names those that cannot be."""
        failures: list[tuple[Stream, int, str]] = []
        pixels: dict[Stream, Tensor | None] = {"clips": None, "images": None}
        for stream in STREAMS:
            requests = getattr(plan, stream)
            if not requests:
                continue
            pixels[stream] = out = torch.zeros(shape(requests), dtype=torch.uint8, device=self._device)
            for row, request in enumerate(requests):
                try:
                    self.read([request], [out[row]])
                except ReadError as error:
                    failures.append((stream, row, error.reason))
        return Decoded(
            pixels["clips"], masks("clips", plan.clips), pixels["images"], masks("images", plan.images), failures
        )

    def pipeline(self, kind: Kind, feed: Iterator[list[_Sample]], batch: int, size: int) -> Any:
        """A pipeline that takes batches of at most `batch` samples from `feed`, and cuts them to squares of `size`.

        0: it returns the decoded pictures first, and then what says how to cut them.
        """
        from nvidia.dali import pipeline_def

        define = pipeline_def(_clips if kind == "clips" else _images)
        pipeline = define(
            (_columns(samples)[: _INPUTS[kind]] for samples in feed),
            "cpu" if self._device_id is None else "mixed",
            size,
            batch_size=batch,
            num_threads=max(1, self._data.workers),
            device_id=self._device_id,
            prefetch_queue_depth=self._data.prefetch,
        )
        try:
            pipeline.build()
        except RuntimeError as error:
            raise DataError(f"DALI cannot be used here ({_reason(error)}); choose another data.backend") from error
        return pipeline

    def _run(self, pipeline: Any, samples: list[_Sample]) -> Tensor:
        """(samples, size, size, 3) uint8, of videos (samples, T, size, size, 3), upright: the pipeline's next batch.

        Raises _Broken.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            batch, shapes = pipeline.run(stream)
        except RuntimeError as error:
            # Of the decoder, about a file; memory and drivers fail in it too, which is nothing about a file.
            if ".decoders." in str(error) and not re.search(r"(?i)out of memory|bad_alloc|driver", str(error)):
                raise _Broken(_reason(error)) from error
            raise DataError(
                f"DALI failed ({_reason(error)}): lower data.prefetch or train.micro_* where memory is short, "
                "or choose another data.backend"
            ) from error
        for row, sample in enumerate(samples):
            height, width = np.asarray(shapes.at(row))[-3:-1].tolist()
            if sample.picture not in ((0, 0), (height, width)):
                raise _Broken(
                    f"{width}x{height} pixels, where its manifest says {sample.picture[1]}x{sample.picture[0]}"
                )
        out = torch.from_dlpack(batch.as_tensor())
        for row, sample in enumerate(samples):
            if sample.turns:
                out[row] = torch.rot90(out[row].clone(), sample.turns, (-3, -2))
        return out


class _Broken(Exception):
    """A pipeline that has ended with an error about a file."""

    @property
    def reason(self) -> str:
        """One short sentence."""
        return f"DALI cannot decode it ({self})"


def _reason(error: RuntimeError) -> str:
    """What DALI says in the middle of its report."""
    text = str(error).partition("encountered:")[2].partition("C++ context")[0] or str(error)
    return " ".join(text.split())


class _Sample(NamedTuple):
    """One request as DALI takes it. Coordinates are those of the decoded frame, before it is turned upright."""

    encoded: np.ndarray
    frames: np.ndarray
    resize: np.ndarray
    """(height, width) of the whole frame after the resize."""
    crop: np.ndarray
    """(top, left) of the crop in it."""
    flips: np.ndarray
    """(horizontal, vertical), 0 or 1."""
    turns: int
    picture: tuple[int, int]
    """(height, width) that the decoded frame must have; (0, 0): any. Where a container lies about its frames' size,
    DALI serves rows that are shifted against each other."""


class _Loaded(NamedTuple):
    """A plan with its files' bytes; requests whose file cannot be read have no sample."""

    plan: Plan
    samples: dict[Stream, list[_Sample]]
    clip_masks: Tensor | None
    image_masks: Tensor | None
    failures: list[tuple[Stream, int, str]]


def _clips(feed: Iterator[Any], device: str, size: int) -> Any:
    """Batches of `_columns` in; (B, T, size, size, 3) uint8 out, and the shapes before the cut."""
    from nvidia.dali import fn

    encoded, *cut, frames = _source(feed, _INPUTS["clips"])
    # Without pad_mode="none" a video that is too short would end in black frames, in silence.
    return _cut(fn.decoders.video(encoded, frames=frames, device=device, pad_mode="none"), size, *cut)


def _images(feed: Iterator[Any], device: str, size: int) -> Any:
    """As `_clips`, (M, size, size, 3) uint8. The decoder turns images as their EXIF data says."""
    from nvidia.dali import fn, types

    encoded, *cut = _source(feed, _INPUTS["images"])
    return _cut(fn.decoders.image(encoded, device=device, output_type=types.RGB), size, *cut)


def _source(feed: Iterator[Any], count: int) -> list[Any]:
    """The first `count` of `_columns`."""
    from nvidia.dali import fn, types

    kinds = [types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.INT32, types.INT32][:count]
    return list(fn.external_source(source=feed, num_outputs=count, dtype=kinds, batch=True))


def _cut(pictures: Any, size: int, resize: Any, crop: Any, horizontal: Any, vertical: Any) -> Any:
    """The crop at `crop` of the pictures at `resize`, by resizing only that region of them.

    `size` 0: the pictures as they are, and the other inputs, of which DALI would otherwise say that nobody uses them.
    """
    from nvidia.dali import fn, types

    if size == 0:
        return pictures, resize, crop, horizontal, vertical
    region = fn.resize(
        pictures,
        size=[size, size],
        roi_start=crop / resize,
        roi_end=(crop + float(size)) / resize,
        roi_relative=True,
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    return fn.flip(region, horizontal=horizontal, vertical=vertical), pictures.shape()


def _columns(samples: list[_Sample]) -> tuple[list[np.ndarray], ...]:
    """What the external source takes: a list over the samples of each input."""
    return (
        [sample.encoded for sample in samples],
        [sample.resize for sample in samples],
        [sample.crop for sample in samples],
        [sample.flips[0] for sample in samples],
        [sample.flips[1] for sample in samples],
        [sample.frames for sample in samples],
    )


def load(request: Request) -> _Sample:
    """The request with its file's bytes. Raises ReadError."""
    (height, width), (top, left), size, turns = request.resize, request.crop, request.size, request.turns
    # Where the upright crop lies in the frame as decoded, which `turns` quarter turns bring upright.
    resize = (height, width) if turns % 2 == 0 else (width, height)
    crop = {
        0: (top, left),
        1: (left, resize[1] - top - size),
        2: (resize[0] - top - size, resize[1] - left - size),
        3: (resize[0] - left - size, top),
    }[turns]
    flips = (request.flip and turns % 2 == 0, request.flip and turns % 2 == 1)
    return _Sample(
        np.frombuffer(request.file.read(), np.uint8),
        np.array(request.frames, np.int32),
        np.array(resize, np.float32),
        np.array(crop, np.float32),
        np.array(flips, np.int32),
        turns,
        request.picture if turns % 2 == 0 else request.picture[::-1],
    )


def _batches(loaded: Iterator[_Loaded], stream: Stream) -> Iterator[list[_Sample]]:
    return (item.samples[stream] for item in loaded if item.samples[stream])


def _ahead(threads: ThreadPoolExecutor, plans: Iterable[Plan], count: int, masks: Masks) -> Iterator[_Loaded]:
    """The plans with their files' bytes, in order, read and masked `count` plans ahead by the threads."""

    def attempt(request: Request) -> _Sample | ReadError:
        try:
            return load(request)
        except ReadError as error:
            return error

    waiting: deque[tuple[Plan, dict[Stream, list[Any]], list[Any]]] = deque()

    def finish() -> _Loaded:
        plan, files, drawn = waiting.popleft()
        samples: dict[Stream, list[_Sample]] = {"clips": [], "images": []}
        failures: list[tuple[Stream, int, str]] = []
        for stream, futures in files.items():
            for row, future in enumerate(futures):
                sample = future.result()
                if isinstance(sample, ReadError):
                    failures.append((stream, row, sample.reason))
                else:
                    samples[stream].append(sample)
        clip_masks, image_masks = (future.result() for future in drawn)
        return _Loaded(plan, samples, clip_masks, image_masks, failures)

    for plan in plans:
        files = {stream: [threads.submit(attempt, request) for request in getattr(plan, stream)] for stream in STREAMS}
        drawn = [threads.submit(masks, stream, getattr(plan, stream)) for stream in STREAMS]
        waiting.append((plan, files, drawn))
        if len(waiting) > count:
            yield finish()
    while waiting:
        yield finish()
