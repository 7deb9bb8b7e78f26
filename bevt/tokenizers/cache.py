"""Codes of fixed views, kept on disk: a frame that was tokenised in an earlier epoch or run is looked up.

A view's codes depend on neither mask nor epoch, so a file that is cut in V ways only (`data.views`) has at most V times
its frames to tokenise. Each stream has one memory-mapped file, `<stream>.tokens`: HEADER bytes of JSON that say what
the codes depend on, then for each view, in order, a record a frame:

    h * w codes, uint16 | CRC-32 of the record's number and its codes, uint32 and never 0

16 frames of 14x14 codes take 6336 bytes. Little-endian throughout. A checksum that does not fit, as in a record of
zeros, means that the codes are not there: they are computed, and written (again). So nothing has to keep writers apart:
of two that write a record at once the last one stays, and what a crash tears is noticed.

Codes that are found are those that would be computed, but for near-ties: a convolution may round a frame otherwise
among other frames.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bevt.config import Config, ConfigError
from bevt.tokenizers import Tokenizer

FORMAT = "bevt tokens 2"
HEADER = 4096
"""Bytes before the first record."""

_log = logging.getLogger("bevt.tokenizers")


class TokenStore:
    """The codes of one stream: (slots, frames, h, w), with holes. A record's number is slot * frames + frame.

    Read through the map, written with pwrite: on a full disk a store into a map ends the process (SIGBUS), pwrite fails
    with OSError. The file has its full size on disk from the start, for the same reason: on a tmpfs even reading a
    hole through a map takes a page.
    """

    def __init__(self, path: Path, identity: dict[str, Any], slots: int, frames: int, grid: tuple[int, int]) -> None:
        """Open `path`, or make it with empty records. `identity`, plain data, is all that the codes depend on.

        Raises ConfigError where the file cannot be made or opened, is damaged, or holds codes of something else.
        """
        self.path = path
        self._row = np.dtype([("codes", "<u2", grid), ("check", "<u4")])
        header = {"format": FORMAT, **identity, "slots": slots, "frames": frames, "grid": grid}
        size = HEADER + slots * frames * self._row.itemsize
        if path.parent.exists() and not path.parent.is_dir():
            raise ConfigError(f"tokenizer.cache: {path.parent} is a file; name a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another rank or run may be making it
                if not path.exists():
                    _make(path, json.dumps(header), size)
            self._file = path.open("r+b", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"tokenizer.cache: cannot open {path} ({size / 1e9:.3g} GB): {error.strerror}; make room, "
                "name a folder that can be written, or lower data.views"
            ) from error
        try:
            _check(path, header, self._file.read(HEADER), os.fstat(self._file.fileno()).st_size, size)
            self._rows: np.ndarray | None = np.memmap(self._file, self._row, "r", HEADER, (slots * frames,))
        except BaseException:
            self._file.close()
            raise

    def read(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) record numbers -> codes (n, h, w) uint16, and (n,) bool: which of them are there and whole."""
        assert self._rows is not None, "the store is closed"
        rows = np.asarray(self._rows)[records]
        return rows["codes"], rows["check"] == _checksums(records, rows["codes"])

    def write(self, records: np.ndarray, codes: np.ndarray) -> None:
        """Keep (n, h, w) codes below 65536 under (n,) record numbers. OSError where the disk does not take them."""
        rows = np.empty(len(records), self._row)
        rows["codes"] = codes
        rows["check"] = _checksums(records, rows["codes"])
        for run in np.split(np.arange(len(records)), np.flatnonzero(np.diff(records) != 1) + 1):
            if len(run):
                left, at = rows[run].tobytes(), HEADER + int(records[run[0]]) * self._row.itemsize
                while left:
                    done = os.pwrite(self._file.fileno(), left, at)
                    left, at = left[done:], at + done

    def close(self) -> None:
        """Idempotent."""
        self._rows = None
        self._file.close()


def _make(path: Path, header: str, size: int) -> None:
    """A file of `size` bytes, zeros but for the header; it appears whole or not at all."""
    part = path.with_suffix(".part")
    try:
        with part.open("w+b", buffering=0) as file:  # readable: glibc's stand-in for fallocate, on NFS say, reads
            file.write(header.encode().ljust(HEADER))
            os.posix_fallocate(file.fileno(), 0, size)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check(path: Path, header: dict[str, Any], block: bytes, size: int, expected: int) -> None:
    """Raise ConfigError where a file of `size` bytes that starts with `block` is not the store of `header`."""
    header = json.loads(json.dumps(header))  # as it comes out of a file
    try:
        found = json.loads(block)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"tokenizer.cache: {path} does not start as a token store does ({FORMAT!r}); "
            "delete it, or name another folder"
        ) from error
    differs = [
        f"{key} was {found.get(key)!r}, is {header.get(key)!r}"
        for key in {**found, **header}
        if found.get(key) != header.get(key)
    ]
    if differs:
        raise ConfigError(
            f"tokenizer.cache: {path} holds the codes of other views or of another tokenizer: {'; '.join(differs)}. "
            "Name another folder, delete the file, or give the configuration it was made with"
        )
    if size != expected:
        raise ConfigError(f"tokenizer.cache: {path} has {size} bytes, not {expected}: it was cut short; delete it")


def _checksums(records: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(n,) uint32, never 0, of (n,) record numbers and (n, h, w) little-endian uint16 codes."""
    numbers = records.astype("<i8")
    sums = (zlib.crc32(row, zlib.crc32(number)) or 1 for number, row in zip(numbers, codes))
    return np.fromiter(sums, np.uint32, len(codes))


class Held(NamedTuple):
    """What a store has of n frames that are needed."""

    records: np.ndarray
    """(n,) int64: their record numbers."""
    known: np.ndarray
    """(n,) bool: the codes are there."""
    codes: np.ndarray
    """(k, h, w) int64: the codes of the k known frames."""


class TokenCache:
    """The stores of a run's streams, and the codes that are on their way from the device to them."""

    def __init__(self, stores: Mapping[str, TokenStore], frames: Mapping[str, int]) -> None:
        """`frames`: those of a view, by stream."""
        self.stores, self.frames = stores, frames
        self._underway: deque[tuple[dict[str, np.ndarray], Tensor, torch.cuda.Event | None]] = deque()
        self._taken = True
        self._needed = self._known = 0

    @classmethod
    def open(
        cls,
        config: Config,
        tokenizer: Tokenizer,
        digest: str,
        device: torch.device,
        views: dict[str, tuple[dict[str, Any], int]],
    ) -> TokenCache:
        """The cache in the folder `config.tokenizer.cache`.

        `digest` is the tokenizer's; `views` holds, by stream, all that decides the pixels of its views, as plain data,
        and how many views there are. Raises ConfigError as `TokenStore`, and where the codes do not fit in 16 bits.
        """
        if tokenizer.vocab_size > 1 << 16:
            raise ConfigError(
                f"tokenizer.cache keeps codes in 16 bits, but the tokenizer has {tokenizer.vocab_size} of them: "
                "leave it empty"
            )
        side = config.data.crop // 2 // tokenizer.downsample
        frames = {"clips": config.data.frames, "images": 1}
        same = {"digest of the tokenizer": digest, **tokenizer.implementations, "device": device.type}
        with ExitStack() as stack:
            stores = {}
            for stream, (decides, slots) in views.items():
                path = Path(config.tokenizer.cache) / f"{stream}.tokens"
                identity = {"stream": stream, **decides, **same}
                stores[stream] = TokenStore(path, identity, slots, frames[stream], (side, side))
                stack.callback(stores[stream].close)
            stack.pop_all()
        return cls(stores, frames)

    def find(self, stream: str, slots: Tensor | None, numbers: np.ndarray) -> Held:
        """Look up frames `numbers` (n,) of a batch of views `slots` (B,): b * T + t is frame t of view b. On the host.

        Raises ValueError where the batch has no `slots` or has them elsewhere, IndexError for a view that the store
        does not have.
        """
        if slots is None or slots.device.type != "cpu":
            raise ValueError(f"a token cache needs the numbers of the batch's {stream} views, on the CPU")
        sample, frame = np.divmod(numbers, self.frames[stream])
        records = slots.numpy()[sample] * self.frames[stream] + frame
        codes, known = self.stores[stream].read(records)
        self._needed += len(known)
        self._known += int(known.sum())
        return Held(records, known, codes[known].astype(np.int64))

    def add(self, records: dict[str, np.ndarray], codes: Tensor) -> None:
        """Keep `codes` (n, h, w) int64, on any device: those of `records`, stream by stream.

        Waits for nothing: codes on a GPU are copied beside its work, and written by a later call or by `flush`.
        """
        if self._taken and len(codes):
            arrived = None
            if codes.device.type == "cuda":
                host = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True)
                codes = host.copy_(codes, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
            self._underway.append((records, codes, arrived))
        while self._underway and ((event := self._underway[0][2]) is None or event.query()):
            self._write_next()

    def flush(self) -> None:
        """Wait for the codes that are under way, and write them."""
        while self._underway:
            if event := self._underway[0][2]:
                event.synchronize()
            self._write_next()

    def _write_next(self) -> None:
        """Write the oldest codes under way, which have arrived; where the disk takes no more, warn and stop."""
        records, codes, _ = self._underway.popleft()
        parts = codes.split([len(numbers) for numbers in records.values()])
        try:
            for (stream, numbers), part in zip(records.items(), parts):
                self.stores[stream].write(numbers, part.numpy())
        except OSError as error:
            self._taken = False
            self._underway.clear()
            _log.warning(
                "tokenizer.cache: %s cannot be written (%s): the run goes on with the codes that are there, "
                "and tokenises the other frames each time",
                self.stores[stream].path,
                error.strerror,
            )

    def share(self) -> float:
        """Frames found over frames needed, since the last call; 1 where none was needed."""
        share = self._known / self._needed if self._needed else 1.0
        self._needed = self._known = 0
        return share

    def close(self) -> None:
        """Idempotent. Codes still under way are dropped: `flush` comes before."""
        self._underway.clear()
        for store in self.stores.values():
            store.close()
