"""Where the bytes of one video or image are: a file of its own, or a part of an uncompressed tar archive."""

from __future__ import annotations

from typing import NamedTuple

from bevt.data import DataError

MOST_PIXELS = 1 << 26
"""Pixels of an image or frame, 8192 x 8192, above which a file is refused.

It is twice a frame of 8K video and beyond nearly all photographs. Decoding so many takes 0.2 GB as RGB and twice that
while it is turned; what a damaged or hostile header declares (60,000 x 60,000) would take 11 GB in every process.
"""


CLOSED = "cannot be opened"
"""How the error of a file begins that the system does not open."""


class ReadError(DataError):
    """A file that cannot be decoded: `path` and the `reason`, one short sentence."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class File(NamedTuple):
    """One video or image. Nothing is opened until something is read from it."""

    name: str
    """What messages and `Batch.clip_ids` call it: its path, or `archive.tar/member`."""
    path: str
    """The file on disk that holds it."""
    offset: int = 0
    """Its first byte there."""
    size: int = 0
    """Its bytes there; 0: to the end of the file."""

    def read(self, count: int = -1) -> bytes:
        """Its bytes, all or the first `count`. Raises ReadError where it is missing, empty or shorter than `size`."""
        whole = self.size and (count < 0 or count > self.size)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size if whole else count)
        except OSError as error:
            raise ReadError(self.name, f"{CLOSED} ({error.strerror})") from error
        if not data:
            raise ReadError(self.name, "the file is empty (0 bytes)")
        if whole and len(data) < self.size:
            raise ReadError(self.name, f"cut off: {self.path} ends {self.size - len(data)} bytes before it does")
        return data
