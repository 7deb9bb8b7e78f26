"""The PyAV backend: requests in, uint8 pixels out. Videos through FFmpeg (PyAV), images through Pillow.

Frames are counted in the order in which the decoder shows them. Their timestamps, which containers get wrong (AVI has
none), are used only where the manifest has found that they number the frames (`Entry.timing`): then the decoder drops
what nobody asked for and no other frame refers to. Decoding starts at a key frame only where the manifest has verified
that this container can do it. Everything runs in one thread: the parallelism is one process a micro-batch (`build`).
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from bevt.data import DataError
from bevt.data.cut import cut, places
from bevt.data.files import CLOSED, MOST_PIXELS, File, ReadError
from bevt.data.sampling import Request

_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow's decoders raise on damaged files."""

_ACCURATE = 0x2 | 0x40000
"""swscale's SWS_BILINEAR | SWS_ACCURATE_RND on the way to planar RGB: bit for bit what DALI's CPU decoder gives for VP8
and VP9, and no slower than its quick path to `rgb24`, which is 1.1 levels darker on average."""

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's other formats are rare, and one of them (EPS) starts a program."""

_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,asf,flv,ogg,mxf,nut,ivf,h264,hevc,dv,rm,gif"
)
"""FFmpeg's demuxers that hold frames themselves: playlists and scripts name other files."""


def read(requests: Sequence[Request], into: Sequence[Tensor]) -> None:
    """Decode one file once and cut every request's pixels from it: uint8 RGB into `into`, one tensor a request.

    The requests are of one file. A clip's tensor is (T, size, size, 3), an image's (size, size, 3). Raises ReadError
    where the file is missing, cannot be decoded, or holds fewer frames than its manifest says; DataError where PyAV is
    not installed.
    """
    if requests[0].kind == "images":
        cut(picture(requests), list(zip(requests, into, strict=True)))
        return
    wanted = places(requests, into)
    for number, pixels in pictures(requests[0], list(wanted)):
        cut(pixels, wanted[number])


def pictures(request: Request, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(number, upright RGB of (H, W, 3) uint8) of the frames `wanted`, rising, of the request's video, as they come.

    Raises as `read`.
    """
    from av.video.reformatter import VideoReformatter

    file, to_rgb = request.file, VideoReformatter()
    for number, frame in _frames(file, request, wanted):
        try:
            pixels = to_rgb.reformat(frame, format="gbrp", interpolation=_ACCURATE, **one_thread()).to_ndarray()
        except library().error.FFmpegError as error:
            raise ReadError(file.name, f"frame {number} cannot be converted to RGB ({error.strerror})") from error
        yield number, np.rot90(pixels, turns(frame))


def picture(requests: Sequence[Request]) -> np.ndarray:
    """The requests' image, upright RGB of (H, W, 3) uint8. Raises as `read`.

    A JPEG of at least twice the wanted size is decoded at a half, a quarter or an eighth of its own: nine times as fast
    for a photograph of 12 megapixels (30 ms), and not quite the pixels of a full decode (within 2 levels there).
    """
    with open_image(requests[0].file) as image:
        image.draft("RGB", (max(max(request.resize) for request in requests),) * 2)
        return np.asarray(upright(requests[0].file, image))


def library() -> ModuleType:
    """PyAV, or a DataError that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise DataError(f"videos need PyAV, which does not import ({error}); install it: `pip install av`") from error
    return av


def open_video(file: File, **options: str) -> tuple[Any, Any]:
    """(container, video stream), single-threaded; local files only, so that a playlist cannot reach the network.

    `options` are FFmpeg's for the container. Raises ReadError.
    """
    av = library()
    try:
        start = file.read(8)
        url, protocols = file.path, "file"
        if file.size:
            url, protocols = f"subfile,,start,{file.offset},end,{file.offset + file.size},,:{url}", "subfile,file"
        local = {"protocol_whitelist": protocols, "format_whitelist": _CONTAINERS}
        container = av.open(url, metadata_errors="ignore", options={**local, **options})
    except av.error.InvalidDataError as error:
        cut = "cut off: the index of the MP4 (its moov atom) is missing"
        raise ReadError(file.name, cut if start[4:] == b"ftyp" else "not a video that FFmpeg recognises") from error
    except av.error.FFmpegError as error:
        raise ReadError(file.name, f"FFmpeg does not open it ({error.strerror})") from error
    stream = container.streams.best("video")
    if stream is None:
        container.close()
        raise ReadError(file.name, "has no video stream")
    if stream.codec_context is None:
        container.close()
        raise ReadError(file.name, "its codec is unknown to the installed FFmpeg")
    stream.thread_type = "NONE"
    stream.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # frames can turn out larger than the header says
    if stream.codec_context.name == "mjpeg":  # else half-grey frames pass for sound ones: 93 of 145 damaged files
        stream.codec_context.options = {**stream.codec_context.options, "err_detect": "explode"}
    return container, stream


def frames_from(
    file: File, container: Any, stream: Any, seek: tuple[int, int] | None
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
                yield number, _sound(file, number, first)
                number += 1
            else:
                number = 0
                container.seek(0, stream=stream)
                decoded = container.decode(stream)
        else:
            decoded = container.decode(stream)
        for frame in decoded:
            yield number, _sound(file, number, frame)
            number += 1
    except av.error.FFmpegError as error:
        raise ReadError(file.name, f"frame {number} cannot be decoded ({error.strerror})") from error


def _sound(file: File, number: int, frame: Any) -> Any:
    """The frame. Raises ReadError where FFmpeg guessed a part of it, and so also what later frames take from it."""
    if frame.is_corrupt:
        raise ReadError(file.name, f"frame {number} is damaged")
    return frame


def turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, that bring a frame upright (phones store this beside the pixels)."""
    return round(frame.rotation / 90) % 4


def open_image(file: File) -> Image.Image:
    """The image, its pixels not yet decoded. Raises ReadError."""
    source = io.BytesIO(file.read()) if file.size else file.path
    try:
        return Image.open(source, formats=_IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        file.read(1)  # says so where it is empty
        raise ReadError(file.name, "not an image that Pillow recognises") from error
    except _PILLOW_ERRORS as error:
        system = isinstance(error, OSError) and error.errno is not None
        raise ReadError(file.name, f"{CLOSED if system else 'its header cannot be read'} ({error})") from error


def upright(file: File, image: Image.Image) -> Image.Image:
    """The decoded image in RGB, turned as its EXIF data says; 16-bit levels keep their upper byte. Raises ReadError."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # Pillow would cut 16-bit levels off at 255, not scale them
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode == "RGB":  # converting would copy it
            image.load()
            return image
        return image.convert("RGB")
    except _PILLOW_ERRORS as error:
        raise ReadError(file.name, f"cannot be decoded ({error})") from error


def _frames(file: File, request: Request, wanted: list[int]) -> Iterator[tuple[int, Any]]:
    """(number, frame) of the frames `wanted` (rising). Raises ReadError, also where one is not there."""
    left = wanted
    for walk in (_by_time, _by_count) if request.timing else (_by_count,):
        container, stream = open_video(file)
        with container, contextlib.closing(walk(file, container, stream, request, left)) as frames:
            for number, frame in frames:
                if number == left[0]:
                    left = left[1:]
                    yield number, frame
                if not left or number > left[0]:
                    break
        if not left:
            return
    raise ReadError(file.name, f"ends before frame {left[0]}, which the manifest promises; index it again")


def _by_count(
    file: File, container: Any, stream: Any, request: Request, wanted: list[int]
) -> Generator[tuple[int, Any], None, None]:
    """Every frame on the way to the last of `wanted`, from the key frame before the first."""
    seek = max((key for key in request.seeks if key[0] <= wanted[0]), default=None)
    yield from frames_from(file, container, stream, seek)


def _by_time(
    file: File, container: Any, stream: Any, request: Request, wanted: list[int]
) -> Generator[tuple[int, Any], None, None]:
    """The frames `wanted`, by their timestamps; of the others only those that the decoder needs are decoded."""
    assert request.timing is not None
    first, ticks = request.timing
    asked, left = set(wanted), list(wanted)
    context, seeks = stream.codec_context, [key for key in request.seeks if key[0] <= wanted[-1]]
    keep, begin = None, 0
    try:
        while left:
            jump = max((key for key in seeks if key[0] <= left[0]), default=None)
            if jump:
                begin = jump[0]  # frames of an open group of pictures come out before it, and may look damaged
                container.seek(jump[1], stream=stream)
                seeks = [key for key in seeks if key[0] > jump[0]]
            following = min((key[0] for key in seeks), default=None)
            for packet in container.demux(stream):
                if packet.pts is not None:
                    needed = round((packet.pts - first) / ticks) in asked
                    if needed is not keep:
                        context.skip_frame, keep = ("DEFAULT" if needed else "NONREF"), needed
                for frame in packet.decode():
                    number = round((frame.pts - first) / ticks) if frame.pts is not None else -1
                    if number >= begin:
                        _sound(file, number, frame)
                    if number == left[0]:
                        left.pop(0)
                        yield number, frame
                    if not left or number > left[0]:
                        return
                if following is not None and following <= left[0]:
                    break
            else:
                return
    except library().error.FFmpegError as error:
        raise ReadError(file.name, f"frame {left[0]} cannot be decoded ({error.strerror})") from error


@cache
def one_thread() -> dict[str, int]:
    """What keeps a conversion on one core: PyAV 17 and later would take all, earlier ones know no such word."""
    return {"threads": 1} if int(library().__version__.split(".")[0]) >= 17 else {}
