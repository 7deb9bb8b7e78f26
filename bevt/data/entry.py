"""What is known of one video or image, and how that is written: one line of JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from bevt.data.files import File

Kind = Literal["clips", "images"]

EXTENSIONS: dict[str, tuple[str, ...]] = {
    "clips": (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"),
    "images": (".jpg", ".jpeg", ".png", ".webp", ".bmp"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. An image has 1 frame and no rate; a file with an `error` has nothing but its name, size and time."""

    path: str
    """Relative to the manifest's root, with forward slashes; or absolute. Of a member: `shard/member`."""
    bytes: int
    mtime_ns: int
    """Of a member: its archive's."""
    error: str | None = None
    """Why the file cannot be used; None: it can."""
    label: str | int | None = None
    """What the list or the archive says, or the name of the parent folder; None for a file at the root."""
    width: int = 0
    """Pixels, upright: after the rotation that phones and EXIF store beside the pixels."""
    height: int = 0
    format: str = ""
    """Codec of a video (`h264`), format of an image (`JPEG`)."""
    pixel_format: str = ""
    frames: int = 0
    """Frames that the decoder shows."""
    fps: Fraction | None = None
    """Average frame rate."""
    variable_rate: bool = False
    """Some gap between frames differs from the usual one by more than a tenth."""
    key_interval: int = 0
    """Largest distance, in frames, from one key frame to the next or to the end."""
    seconds: float = 0.0
    keys: tuple[tuple[int, int], ...] = ()
    """(frame number, timestamp) of key frames at which decoding may start; empty where seeking cannot be relied on."""
    shard: str = ""
    """The tar archive that holds it, relative to the root; empty: a file of its own."""
    offset: int = 0
    """Its first byte in the archive."""
    start: int = 0
    """Frames [start, end) of the file belong to the sample; end 0: to the end of the file."""
    end: int = 0
    timing: tuple[int, float] | None = None
    """(timestamp of frame 0, ticks from one frame to the next), where round((timestamp - first) / ticks) is the number
    of every frame and seeking can be relied on; else None."""
    mislabelled: bool = False
    """The label file beside it, in an archive, holds neither a number nor a text."""
    turns: int = 0
    """Quarter turns, counter-clockwise, that bring decoded frames upright; 0 for images, whose EXIF says it."""

    def length(self) -> int:
        """Frames that belong to the sample."""
        return (self.end or self.frames) - self.start


def located(root: str, entry: Entry) -> File:
    """Where the entry's bytes are."""
    name = os.path.join(root, entry.path)
    return File(name, os.path.join(root, entry.shard), entry.offset, entry.bytes) if entry.shard else File(name, name)


_DEFAULTS = [(field.name, field.default) for field in dataclasses.fields(Entry)]


def dump(entry: Entry) -> bytes:
    """One line: what differs from the defaults."""
    plain = {name: value for name, default in _DEFAULTS if (value := getattr(entry, name)) != default}
    return json.dumps(plain, default=str, separators=(",", ":")).encode() + b"\n"


def parse(line: bytes) -> Entry:
    """The entry of a line that `dump` wrote."""
    plain: dict[str, Any] = json.loads(line)
    if "fps" in plain:
        plain["fps"] = Fraction(plain["fps"])
    if "keys" in plain:
        plain["keys"] = tuple((number, stamp) for number, stamp in plain["keys"])
    if "timing" in plain:
        plain["timing"] = tuple(plain["timing"])
    return Entry(**plain)
