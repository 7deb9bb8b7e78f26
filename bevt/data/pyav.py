"""The PyAV backend: requests in, uint8 pixels out. Videos through FFmpeg (PyAV), images through Pillow.

Frames are counted in the order in which the decoder shows them, never by timestamps alone, which containers get wrong
(AVI has none). Decoding starts at a key frame only where the manifest has verified that this container can do it.
Everything runs in one thread: the parallelism is one process a micro-batch (`build`).
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Generator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bevt.data import DataError
from bevt.data.sampling import Request

_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow's decoders raise on damaged files."""


class ReadError(DataError):
    """A file that cannot be decoded: `path` and the `reason`, one short sentence."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read(request: Request) -> np.ndarray:
    """The pixels a request asks for, uint8 RGB: (T, size, size, 3) of a clip, (size, size, 3) of an image.

    Raises ReadError where the file is missing, cannot be decoded, or holds fewer frames than its manifest says;
    DataError where PyAV is not installed.
    """
    return _read_image(request) if request.stream == "images" else _read_clip(request)


def library() -> ModuleType:
    """PyAV, or a DataError that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise DataError(f"videos need PyAV, which does not import ({error}); install it: `pip install av`") from error
    return av


def open_video(path: str, **options: str) -> tuple[Any, Any]:
    """(container, video stream), single-threaded; local files only, so that a playlist cannot reach the network.

    `options` are FFmpeg's for the container. Raises ReadError.
    """
    av = library()
    try:
        if os.path.getsize(path) == 0:
            raise ReadError(path, "the file is empty (0 bytes)")
        container = av.open(path, metadata_errors="ignore", options={"protocol_whitelist": "file", **options})
    except av.error.InvalidDataError as error:
        with open(path, "rb") as file:
            is_mp4 = file.read(8)[4:] == b"ftyp"
        cut = "cut off: the index of the MP4 (its moov atom) is missing"
        raise ReadError(path, cut if is_mp4 else "not a video that FFmpeg recognises") from error
    except (av.error.FFmpegError, OSError) as error:
        raise ReadError(path, f"cannot be opened ({error.strerror})") from error
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise ReadError(path, "has no video stream")
    if stream.codec_context is None:
        container.close()
        raise ReadError(path, "its codec is unknown to the installed FFmpeg")
    stream.thread_type = "NONE"
    stream.thread_count = 1
    return container, stream


def frames_from(
    path: str, container: Any, stream: Any, seek: tuple[int, int] | None
) -> Generator[tuple[int, Any], None, None]:
    """(number, frame) in presentation order, from key frame `seek` = (number, timestamp) on.

    Where the container does not land on that key frame, decoding starts over at the beginning: slower, the same frames.
    Raises ReadError at the frame that cannot be decoded.
    """
    av = library()
    number = 0
    try:
        if seek is not None:
            number = seek[0]
            container.seek(seek[1], stream=stream)
            decoded = container.decode(stream)
            # Frames of an open group of pictures come out before its key frame; they belong to what lies before.
            first = next((f for f in decoded if f.pts is not None and f.pts >= seek[1]), None)
            if first is not None and first.pts == seek[1]:
                yield number, first
                number += 1
            else:
                number = 0
                container.seek(0, stream=stream)
                decoded = container.decode(stream)
        else:
            decoded = container.decode(stream)
        for frame in decoded:
            yield number, frame
            number += 1
    except av.error.FFmpegError as error:
        raise ReadError(path, f"frame {number} cannot be decoded ({error.strerror})") from error


def turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, that bring a frame upright (phones store this beside the pixels)."""
    return round(frame.rotation / 90) % 4


def open_image(path: str) -> Image.Image:
    """The image, its pixels not yet decoded. Raises ReadError."""
    try:
        if os.path.getsize(path) == 0:
            raise ReadError(path, "the file is empty (0 bytes)")
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise ReadError(path, "not an image that Pillow recognises") from error
    except _PILLOW_ERRORS as error:
        raise ReadError(path, f"cannot be opened ({error})") from error


def upright(path: str, image: Image.Image) -> Image.Image:
    """The decoded image in RGB, turned as its EXIF data says; 16-bit levels keep their upper byte. Raises ReadError."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # Pillow would cut 16-bit levels off at 255, not scale them
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except _PILLOW_ERRORS as error:
        raise ReadError(path, f"cannot be decoded ({error})") from error


def _read_clip(request: Request) -> np.ndarray:
    from av.video.reformatter import VideoReformatter

    wanted, last = set(request.frames), max(request.frames)
    found: dict[int, np.ndarray] = {}
    scaler = VideoReformatter()
    container, stream = open_video(request.path)
    with container, contextlib.closing(frames_from(request.path, container, stream, request.seek)) as frames:
        for number, frame in frames:
            if number in wanted:
                try:
                    pixels = _rgb(scaler, frame, request.resize)
                except library().error.FFmpegError as error:
                    reason = f"frame {number} cannot be converted to RGB ({error.strerror})"
                    raise ReadError(request.path, reason) from error
                found[number] = _crop(pixels, request)
            if number == last:
                break
    if len(found) < len(wanted):
        missing = min(wanted - set(found))
        raise ReadError(request.path, f"ends before frame {missing}, which the manifest promises; index it again")
    return np.stack([found[number] for number in request.frames])


def _rgb(scaler: Any, frame: Any, resize: tuple[int, int]) -> np.ndarray:
    """(height, width, 3): the whole frame, upright, resized by swscale (bicubic, which antialiases when it shrinks)."""
    turn = turns(frame)
    height, width = resize if turn % 2 == 0 else resize[::-1]
    scaled = scaler.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", **_one_thread())
    return np.rot90(scaled.to_ndarray(), turn)


@cache
def _one_thread() -> dict[str, int]:
    """PyAV 17 and later scale on every core unless told otherwise; earlier ones have no such argument."""
    return {"threads": 1} if int(library().__version__.split(".")[0]) >= 17 else {}


def _crop(pixels: np.ndarray, request: Request) -> np.ndarray:
    top, left = request.crop
    cut = pixels[top : top + request.size, left : left + request.size]
    return cut[:, ::-1] if request.flip else cut


def _read_image(request: Request) -> np.ndarray:
    """Decode, turn, resize (bicubic; Pillow antialiases when it shrinks), crop.

    A JPEG of at least twice the wanted size is decoded at a half, a quarter or an eighth of its own: nine times as fast
    for a photograph of 12 megapixels (30 ms), and not quite the pixels of a full decode (within 2 levels there).
    """
    height, width = request.resize
    with open_image(request.path) as image:
        image.draft("RGB", (max(height, width),) * 2)
        whole = upright(request.path, image)
    return _crop(np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC)), request)
