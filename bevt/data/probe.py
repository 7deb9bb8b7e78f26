"""What is in a file: it is opened, both its ends are decoded, and what the container promises is held against that."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from bevt.data import DataError
from bevt.data.entry import Entry, Kind, located
from bevt.data.files import CLOSED, MOST_PIXELS, File, ReadError
from bevt.data.processes import pool, undisturbed
from bevt.data.sources import CUT

MOST_FRAMES = 1_000_000
"""Packets of a video, 9 hours at 30 a second, above which it is refused: a header can declare billions."""

OUTSIDE = "its list says frames"
"""How the error of a video begins that has fewer frames than its list says."""

_NO_MEMORY = "not enough memory to decode it"
_DIED = "the process that probed it died: the decoder crashed, or memory ran out"

_LONGEST = 100
"""Longer sides of a picture over shorter ones; resized to 256 pixels, 1 x 60 million would take 12 TB."""

_KEY_SPACING = 12
"""Key frames closer than this to the last one kept are left out of `Entry.keys`: seeking would gain nothing."""

_EXACT_PACKETS = {"h264", "hevc", "vp9", "av1"}
"""Codecs of which one packet of an MP4 or Matroska file is one shown frame (VP8 hides some, AVI splits some)."""


Look = Callable[[str, Kind, Entry], Entry]
"""`probe` or `decode`."""


def probe(root: str, kind: Kind, entry: Entry) -> Entry:
    """The entry with what is in the file, or with the error. Raises DataError where PyAV is missing."""
    file = located(root, entry)
    try:
        facts = _clip(file) if kind == "clips" else _image(file)
    except ReadError as error:
        return replace(entry, error=error.reason)
    except MemoryError:
        return replace(entry, error=_NO_MEMORY)
    if entry.start >= facts["frames"] or entry.end > facts["frames"]:
        end = entry.end or "the end"
        return replace(entry, error=f"{OUTSIDE} {entry.start} to {end}, but it has {facts['frames']}")
    return replace(entry, **facts)


def decode(root: str, kind: Kind, entry: Entry) -> Entry:
    """The probed entry again, with an error where not all of what `probe` found can be decoded."""
    file, frames = located(root, entry), 1
    try:
        if kind == "clips":
            frames, _ = _decode(file, None)
        else:
            _image(file)
    except ReadError as error:
        return replace(entry, error=error.reason)
    except MemoryError:
        return replace(entry, error=_NO_MEMORY)
    if frames != entry.frames:
        return replace(entry, error=f"{CUT} or damaged: {frames} of its {entry.frames} frames can be decoded")
    return entry


def passing(entry: Entry) -> bool:
    """Whether its error is of the machine, not of the file: worth another look."""
    return entry.error is not None and entry.error.startswith((CLOSED, _NO_MEMORY, _DIED))


def probe_all(root: str, kind: Kind, entries: list[Entry], workers: int, look: Look) -> Iterator[Entry]:
    """What `look` makes of the entries, in any order. One on which its process dies gets an error, the others do not.

    Fewer than 8 files, or all where there is one worker, are probed in this process, without that
    protection. Raises DataError where no process can be started, or PyAV is missing.
    """
    if workers == 1 or len(entries) < 8:  # starting processes costs more than a few files
        yield from (look(root, kind, entry) for entry in entries)
        return
    # Ctrl-C waits for what is under way.
    size = max(1, min(4 if kind == "clips" else 64, len(entries) // (4 * workers)))
    chunks = deque(entries[i : i + size] for i in range(0, len(entries), size))
    while chunks:
        running: dict[Future[list[Entry]], list[Entry]] = {}
        with pool(workers) as processes:
            try:
                while chunks or running:
                    # Few at a time: when a process dies, nobody can tell on which of those that were handed out.
                    with undisturbed():
                        while chunks and len(running) < 2 * workers:
                            running[processes.submit(_probe_some, root, kind, chunks[0], look)] = chunks[0]
                            chunks.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield from future.result()
                        del running[future]
            except BrokenProcessPool:
                pass  # what it leaves in `running` is probed below
            finally:
                processes.shutdown(cancel_futures=True)
        yield from _probe_singly(root, kind, [entry for chunk in running.values() for entry in chunk], look)


def _probe_some(root: str, kind: Kind, entries: list[Entry], look: Look) -> list[Entry]:
    return [look(root, kind, entry) for entry in entries]


def _probe_singly(root: str, kind: Kind, entries: list[Entry], look: Look) -> Iterator[Entry]:
    """As `probe_all`, one after the other in a process that may die of one."""
    left = deque(entries)
    while left:
        with pool(1) as processes:
            try:
                with undisturbed():
                    begun = processes.submit(int)
                begun.result()
            except BrokenProcessPool as error:
                raise DataError(
                    "processes that probe files end before they begin: a script needs `if __name__ == '__main__':` "
                    "around what it does, and a machine free memory; `bevt data index` shows which"
                ) from error
            try:
                while left:
                    yield processes.submit(look, root, kind, left[0]).result()
                    left.popleft()
            except BrokenProcessPool:
                yield replace(left.popleft(), error=_DIED)


def _refuse_huge(file: File, width: int, height: int) -> None:
    """Raise ReadError above MOST_PIXELS, and for a strip whose short side cannot be resized to that of a crop."""
    if width * height > MOST_PIXELS:
        raise ReadError(file.name, f"its header declares {width}x{height}, more than {MOST_PIXELS >> 20} megapixels")
    if max(width, height) > _LONGEST * min(width, height):
        raise ReadError(file.name, f"its sides, {width}x{height}, are more than {_LONGEST} to 1")


def _image(file: File) -> dict[str, Any]:
    from bevt.data.pyav import open_image, upright

    with open_image(file) as image:
        _refuse_huge(file, *image.size)
        facts = {"format": image.format or "", "pixel_format": image.mode}
        width, height = upright(file, image).size  # decodes everything: a cut-off file has a healthy header
    return facts | {"width": width, "height": height, "frames": 1}


@dataclass(frozen=True, slots=True)
class _Packet:
    """What the container says of one packet."""

    stamp: int | None
    """Presentation time, in ticks of the stream."""
    end: float
    """Presentation time plus duration, in seconds; 0 where unknown."""
    key: bool
    hidden: bool
    """Decoded but not shown (an MP4 edit list starts behind it)."""
    whole: bool
    """All its bytes are in the file."""


def _packets(file: File, container: Any, *streams: Any) -> list[_Packet]:
    """The packets of the streams, in file order. Raises ReadError."""
    from bevt.data.pyav import library

    packets = []
    try:
        for packet in container.demux(*streams):
            if packet.size:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base if packet.pts is not None else 0
                packets.append(
                    _Packet(packet.pts, float(end), packet.is_keyframe, packet.is_discard, not packet.is_corrupt)
                )
                if len(packets) > MOST_FRAMES:
                    raise ReadError(file.name, f"more than {MOST_FRAMES} packets")
    except library().error.FFmpegError as error:
        reason = f"{CUT} or damaged: packet {len(packets)} cannot be read ({error.strerror})"
        raise ReadError(file.name, reason) from error
    return packets


def _reject_truncated(file: File, container: Any, stream: Any, packets: list[_Packet]) -> None:
    """Raise ReadError where the file ends before what its header declares."""
    from bevt.data.pyav import open_video

    if any(not packet.whole for packet in packets):
        raise ReadError(file.name, f"{CUT}: a packet is incomplete")
    have, wanted = file.size or os.path.getsize(file.path), _matroska_size(file)
    if have < wanted:
        raise ReadError(file.name, f"{CUT}: {have} of the {wanted} bytes that its header declares")
    is_mp4, declared, count = container.format.name.startswith("mov,"), stream.frames, len(packets)
    if is_mp4 and count < declared:  # the sample table is exact, but an edit list may hide samples
        whole, video = open_video(file, ignore_editlist="1")
        with whole:
            count = len(_packets(file, whole, video))
    # The counts in AVI and FLV headers are a few frames off in healthy files (UCF-101).
    if count < (declared if is_mp4 else 0.95 * declared):
        raise ReadError(file.name, f"{CUT}: {count} of the {declared} frames that its header declares")
    seconds = (container.duration or 0) / 1e6
    if not declared and max(packet.end for packet in packets) < 0.95 * seconds - 0.5:
        every, _ = open_video(file)  # the sound may be longer than the pictures
        with every:
            end = max(packet.end for packet in _packets(file, every)) - (every.start_time or 0) / 1e6
        if end < 0.95 * seconds - 0.5:
            reason = f"{CUT}: it ends at {end:.1f} of the {seconds:.1f} seconds its header declares"
            raise ReadError(file.name, reason)


def _matroska_size(file: File) -> int:
    """Bytes of a Matroska or WebM file by its header: the end of its Segment (RFC 9559, section 5). 0: it does not say.

    FFmpeg passes over a cluster that is cut: by duration alone a short clip could lose a third of its frames.
    """
    head, place = file.read(1 << 12), 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # an EBML header, then the Segment
        width = 9 - head[place + 4].bit_length() if len(head) > place + 4 else 9
        if head[place : place + 4] != name or width > 8:
            return 0
        size = int.from_bytes(head[place + 4 : place + 4 + width], "big") & ((1 << 7 * width) - 1)
        if size == (1 << 7 * width) - 1:  # written without knowing, as a live stream is
            return 0
        place += 4 + width + size
    return place


def _clip(file: File) -> dict[str, Any]:
    """Count packets, then make sure of the ends: decode the first frame, and from the last key frame to the last.

    Where one packet need not be one frame, or the end does not come out as the packets promise, the whole file is
    decoded and counted, and neither key frames nor timestamps are trusted.
    """
    from bevt.data.pyav import open_video, turns

    container, stream = open_video(file)
    with container:
        _refuse_huge(file, stream.codec_context.width, stream.codec_context.height)
        packets = _packets(file, container, stream)
        if not packets:
            raise ReadError(file.name, f"no frame can be found in it: empty or {CUT}")
        _reject_truncated(file, container, stream, packets)
        codec, container_name, tick = (
            stream.codec_context.codec.canonical_name,
            container.format.name,
            float(stream.time_base),
        )
        pixel_format, fps = stream.codec_context.pix_fmt or "", stream.average_rate
    shown = [packet for packet in packets if not packet.hidden]
    stamps = sorted(packet.stamp for packet in shown if packet.stamp is not None)
    keys: list[tuple[int, int]] = []
    if codec in _EXACT_PACKETS and container_name.startswith(("mov,", "matroska,")) and len(set(stamps)) == len(shown):
        place = {stamp: number for number, stamp in enumerate(stamps)}
        keys = sorted(
            (place[packet.stamp], packet.stamp) for packet in shown if packet.key and packet.stamp is not None
        )

    _, first = _decode(file, None, 1)
    if first is None:
        raise ReadError(file.name, "none of its frames can be decoded")
    turn = turns(first)
    height, width = (first.height, first.width) if turn % 2 == 0 else (first.width, first.height)
    frames, last = _decode(file, keys[-1]) if keys and keys[0][0] == 0 else (0, None)
    if last is None or frames != len(shown) or (first.pts, last.pts) != (stamps[0], stamps[-1]):
        frames, keys = _decode(file, None)[0], []

    gaps = [b - a for a, b in pairwise(stamps)]
    usual = statistics.median(gaps) if gaps else 0
    marks = [number for number, _ in keys] or [number for number, packet in enumerate(shown) if packet.key]
    spaced: list[tuple[int, int]] = []
    for key in keys:
        if not spaced or key[0] - spaced[-1][0] >= _KEY_SPACING:
            spaced.append(key)
    return {
        "width": width,
        "height": height,
        "format": codec,
        "pixel_format": pixel_format,
        "frames": frames,
        "fps": Fraction(fps) if fps else None,
        "variable_rate": any(abs(gap - usual) > max(1.5, 0.1 * usual) for gap in gaps),
        "key_interval": max((b - a for a, b in zip(marks, [*marks[1:], frames])), default=0),
        "seconds": round((stamps[-1] - stamps[0] + usual) * tick, 3) if stamps else 0.0,
        "keys": tuple(spaced),
        "timing": _timing(stamps) if keys else None,
        "turns": turn,
    }


def _timing(stamps: list[int]) -> tuple[int, float] | None:
    """`Entry.timing` of all frames' timestamps, in order: the line through both ends, where it goes by every one."""
    ticks = (stamps[-1] - stamps[0]) / (len(stamps) - 1) if len(stamps) > 1 else 1.0
    exact = all(round((stamp - stamps[0]) / ticks) == number for number, stamp in enumerate(stamps))
    return (stamps[0], ticks) if exact else None


def _decode(file: File, seek: tuple[int, int] | None, most: float = math.inf) -> tuple[int, Any]:
    """(number after the last frame decoded from `seek` on, that frame); at most `most` frames. Raises ReadError."""
    from bevt.data.pyav import frames_from, open_video

    end, frame = 0, None
    container, stream = open_video(file)
    with container, contextlib.closing(frames_from(file, container, stream, seek)) as frames:
        for number, frame in frames:  # noqa: B007
            end = number + 1
            if end >= most:
                break
    return end, frame
