"""The torchcodec backend, where that library imports: videos through its decoder, images as the PyAV backend does.

It counts frames, seeks and turns them upright by an index of its own, in one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
from torch import Tensor

from bevt.data import DataError, pyav
from bevt.data.cut import cut, places
from bevt.data.files import ReadError
from bevt.data.sampling import Request


def library() -> ModuleType:
    """The module `torchcodec.decoders`, or a DataError that says why they do not import."""
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError) as error:  # its shared libraries are loaded on import
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise DataError(
            f"torchcodec does not import ({reason}): install the version that belongs to this torch, and FFmpeg"
        ) from error
    return decoders


def read(requests: Sequence[Request], into: Sequence[Tensor]) -> None:
    """As `bevt.data.pyav.read`."""
    if requests[0].kind == "images":
        pyav.read(requests, into)
        return
    wanted = places(requests, into)
    for number, pixels in pictures(requests[0], list(wanted)):
        cut(pixels, wanted[number])


def pictures(request: Request, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """As `bevt.data.pyav.pictures`."""
    file, decoders = request.file, library()
    try:
        source = file.read() if file.size else file.path
        decoder = decoders.VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
        missing = [number for number in wanted if number >= len(decoder)]
        if missing:
            raise ReadError(file.name, f"ends before frame {missing[0]}, which the manifest promises; index it again")
        frames = decoder.get_frames_at(wanted).data  # (N, H, W, 3)
    except ReadError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:  # of its C++ part, which has no types
        raise ReadError(file.name, f"torchcodec cannot decode it ({str(error).partition(chr(10))[0]})") from error
    yield from zip(wanted, frames.numpy(), strict=True)
