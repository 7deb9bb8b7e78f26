"""What files there are and what is in them: every file is probed once, and what was found is kept.

A manifest is a `.jsonl` file: a header line, then one line a file, sorted by path. The header holds whatever would need
a pass over all lines, so that loading one of a million files parses none of them: an entry is parsed when it is asked
for, out of a file that all processes of a machine map. Files whose size and modification time are unchanged are not
probed again; where nothing has changed, indexing a folder again lists it and does nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from bevt.data import DataError
from bevt.data.entry import EXTENSIONS, Entry, Kind, dump, located, parse
from bevt.data.files import File
from bevt.data.probe import passing, probe, probe_all
from bevt.data.processes import cores
from bevt.data.sources import Found, find, members

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""

MOST_NAMED = 20
"""Unreadable files of one source that the log names; the others are counted."""

VERSION = 3

_BLOCK = 1 << 22
"""Bytes that are checked and split into lines at a time."""

_log = logging.getLogger("bevt.data")


class _Lines(Sequence[Entry]):
    """The entries of a manifest file, parsed one at a time; 8 bytes of memory an entry and process."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Map the file and find its lines. Raises DataError where they are not those that the header was made of."""
        digest = hashlib.sha256(_blank(header))
        with open(path, "rb") as file:
            position = len(file.readline())
            starts = [np.array([position])]  # of every line, and the end of the last one
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            while block := file.read(_BLOCK):  # not through the map: its pages would count as this process's memory
                digest.update(block)
                starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
                position += len(block)
        self._starts = np.concatenate(starts)
        if digest.hexdigest() != header["digest"] or len(self) != header["entries"]:
            raise DataError(
                f"the manifest {path} is cut off, or was edited after `bevt data index` wrote it: index "
                "the files again; to use only some of them, give a list of `path label` lines"
            )
        self.unreadable = np.array(header["unreadable"], np.int64)
        self.formats = tuple((name, pixels) for name, pixels in header["formats"])
        self.fingerprint: str = header["fingerprint"]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | Sequence[Entry]:
        number = range(len(self))[index]
        if isinstance(number, range):
            return tuple(self[i] for i in number)
        return parse(self._bytes[self._starts[number] : self._starts[number + 1]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Manifest:
    """The files of one source, sorted by path."""

    kind: Kind
    root: str
    """Absolute folder that the paths are relative to."""
    entries: Sequence[Entry]
    """A tuple, or the lines of a file, each parsed (15 to 60 microseconds) whenever it is asked for."""
    listing: str = field(default="", compare=False, repr=False)
    """Digest of what `find` found when this was made."""
    shards: dict[str, list[Any]] = field(default_factory=dict, compare=False, repr=False)
    """Size, time and label of every tar archive, by path."""

    @functools.cached_property
    def unreadable(self) -> np.ndarray:
        """(n,) int64, rising: the numbers of the entries with an error."""
        if isinstance(self.entries, _Lines):
            return self.entries.unreadable
        return np.array([i for i, entry in enumerate(self.entries) if entry.error is not None], np.int64)

    @functools.cached_property
    def formats(self) -> tuple[tuple[str, str], ...]:
        """Every (format, pixel format) that a readable entry has, in order."""
        if isinstance(self.entries, _Lines):
            return self.entries.formats
        return tuple(sorted({(entry.format, entry.pixel_format) for entry in self.entries if entry.error is None}))

    def locate(self, entry: Entry) -> str:
        """What the file is called: its path on this machine, or `archive.tar/member`."""
        return os.path.join(self.root, entry.path)

    def file(self, entry: Entry) -> File:
        """Where its bytes are."""
        return located(self.root, entry)

    def fingerprint(self) -> str:
        """16 hex digits of the names, sizes and ranges of all samples: what a sampler's requests depend on."""
        if isinstance(self.entries, _Lines):
            return self.entries.fingerprint
        return _digest(map(_identity, self.entries))[:16]

    def save(self, path: str | Path) -> None:
        """Write the manifest, all or nothing. A manifest inside its own root can be moved together with it."""
        path = Path(path)
        header = {
            "bevt_manifest": VERSION,
            "kind": self.kind,
            "root": "." if path.resolve().parent == Path(self.root).resolve() else self.root,
            "entries": len(self.entries),
            "unreadable": self.unreadable.tolist(),
            "formats": self.formats,
            "fingerprint": self.fingerprint(),
            "listing": self.listing,
            "shards": self.shards,
        }
        digest = hashlib.sha256(_blank(header))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(_blank(header) + b"\n")
                for entry in self.entries:
                    line = dump(entry)
                    digest.update(line)
                    file.write(line)
                file.seek(0)
                file.write(json.dumps({**header, "digest": digest.hexdigest()}).encode())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Map a manifest. Raises DataError where the file is missing, is no manifest, is of another version, or is
        not what was written.
        """
        path = Path(path)
        try:
            with open(path, "rb") as file:
                header = json.loads(file.readline())
            if header["bevt_manifest"] != VERSION:
                version = header["bevt_manifest"]
                raise DataError(f"{path} is a manifest of version {version}, not {VERSION}: index the files again")
            root = str(path.resolve().parent / header["root"])
            return cls(header["kind"], root, _Lines(path, header), header["listing"], header["shards"])
        except OSError as error:
            raise DataError(f"cannot read the manifest {path} ({error.strerror})") from error
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is not a manifest written by `bevt data index`") from error


def probe_source(path: str, kind: Kind, *, progress: Progress | None = None, kept: bool = False) -> Manifest:
    """The manifest of what a configuration names: a manifest (`.jsonl`), anything that `bevt.data.sources` reads, or
    the embedded dataset (`shapes.located`).

    What is no manifest is indexed on the fly; the result is kept in `.bevt_manifest_<kind>.jsonl` inside the folder
    (for a file: `.<name>.bevt_manifest_<kind>.jsonl` beside it), or in the user's cache folder where that is not
    writable. With `kept`, a manifest that is there is taken as it is: another process has just made it. Raises
    DataError as `index`.
    """
    if path.startswith("shapes:"):
        from bevt.data import shapes  # here: it renders pictures, for which a GPU machine need not have the packages

        path = shapes.located(path, kind)
    if path.endswith(".jsonl"):
        manifest = Manifest.load(path)
        if manifest.kind != kind:
            raise DataError(f"{path} lists {manifest.kind}, not {kind}")
        return manifest
    cache = cache_path(Path(path), kind)
    if kept and (found := _kept(cache, kind)) is not None:
        return found
    return index(path, kind, cache=cache, progress=progress)


def open_source(path: str, kind: Kind, *, kept: bool = False) -> Manifest:
    """`probe_source` for use: unreadable files are named in the log; DataError where no file is readable."""
    manifest = probe_source(path, kind, kept=kept)
    bad, total = len(manifest.unreadable), len(manifest.entries)
    if bad == total:
        reasons = "\n".join(f"  {entry.path}: {entry.error}" for entry in manifest.entries[:5])
        more = f"\n  ... and {bad - 5} more" if bad > 5 else ""
        raise DataError(f"none of the {bad} {kind} in {path} can be read:\n{reasons}{more}")
    for number in manifest.unreadable[:MOST_NAMED]:
        entry = manifest.entries[number]
        _log.warning("%s: %s", manifest.locate(entry), entry.error)
    if bad:
        more = f", {bad - MOST_NAMED} more than are named here" if bad > MOST_NAMED else ""
        _log.warning("%s: %d of %d files cannot be read%s (see `bevt data check`)", path, bad, total, more)
    return manifest


def index(
    path: str,
    kind: Kind,
    *,
    cache: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Probe every file of a source: a folder, list, annotation file or tar archive (`bevt.data.sources`).

    `cache` names a manifest: unchanged files are taken from it, and it is rewritten at the end; what an interrupted run
    has probed is found again. `workers` processes (default: one a core). A file that cannot be used is an entry with an
    `error`, never an exception. Raises DataError where the path does not exist, holds no file of the kind, or is a list
    with a malformed line.
    """
    partial = Path(f"{cache}.partial{VERSION}") if cache else None
    for written in (Path(cache), partial) if cache and partial else ():
        if written.is_dir():
            raise DataError(f"{written} cannot be written, a folder lies there: remove it, or name another manifest")
    root, found = find(path, kind)
    listing = _digest(f"{tuple(item)!r}\n" for item in found)
    old = _kept(Path(cache), kind) if cache else None
    same = old is not None and (old.listing, old.root) == (listing, str(root))
    if old is not None and same and not any(passing(old.entries[number]) for number in old.unreadable.tolist()):
        return old

    entries, todo, shards = _compare(root, kind, found, old, partial)
    if not entries and not todo:
        raise DataError(f"no {kind} in {path}: looked for {' '.join(EXTENSIONS[kind])}, in its tar archives too")
    total = len(entries) + len(todo)
    if todo:
        with _writing(partial, "nothing"):
            log = open(partial, "ab", buffering=0) if partial else None  # noqa: SIM115
        try:
            if log and log.tell():
                with _writing(partial, "what was found before"):
                    log.write(b"\n")  # what a killed run has torn ends here
            for entry in probe_all(str(root), kind, todo, workers or cores(), probe):
                entries.append(entry)
                if log:
                    with _writing(partial, f"the work on {len(entries) - 1} of {total} files"):
                        log.write(dump(entry))
                if progress:
                    progress(len(entries), total)
        except KeyboardInterrupt:
            if log:
                _log.warning("%d of %d files are done and kept: indexing goes on from there", len(entries), total)
            raise
        finally:
            if log:
                log.close()
    entries.sort(key=lambda entry: (entry.path, entry.start, entry.end))
    manifest = Manifest(kind, str(root), tuple(entries), listing, shards)
    if cache:
        with _writing(cache, "what was found"):
            manifest.save(cache)
        manifest = Manifest.load(cache)  # which needs a hundredth of the memory
    if partial:
        partial.unlink(missing_ok=True)
    return manifest


@contextlib.contextmanager
def _writing(path: Path | str | None, kept: str) -> Iterator[None]:
    """An OSError of the block is a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}): make room there, or name another place with `bevt data "
            f"index --out`; {kept} is kept, and indexing again goes on from there"
        ) from error


def cache_path(source: Path, kind: Kind) -> Path:
    """Where the manifest of a folder or a file is kept."""
    if source.is_dir():
        folder, name = source, f".bevt_manifest_{kind}.jsonl"
    else:
        folder, name = source.parent, f".{source.name}.bevt_manifest_{kind}.jsonl"
    if os.access(folder, os.W_OK):
        return folder / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bevt"
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"manifest_{kind}_{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]}.jsonl"
    _say_where(folder, path)
    return path


@functools.cache  # once a process and folder
def _say_where(folder: Path, path: Path) -> None:
    _log.warning("%s is not writable: its manifest is kept in %s", folder, path)


def _blank(header: dict[str, Any]) -> bytes:
    """The header's line while its digest, which is over this and all other lines, is not known."""
    return json.dumps({**header, "digest": "0" * 64}).encode()


def _identity(entry: Entry) -> str:
    part = f"{entry.start}\0{entry.end}\0" if entry.start or entry.end else ""
    return f"{entry.path}\0{entry.bytes}\0{part}"


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _kept(cache: Path, kind: Kind) -> Manifest | None:
    """The manifest of an earlier run, where there is one that can be used."""
    if not cache.exists():
        return None
    try:
        manifest = Manifest.load(cache)
    except DataError as error:
        _log.warning("%s; the files are probed again", error)
        return None
    return manifest if manifest.kind == kind else None


def _compare(
    root: Path, kind: Kind, found: list[Found], old: Manifest | None, partial: Path | None
) -> tuple[list[Entry], list[Entry], dict[str, list[Any]]]:
    """(entries that need no probing, entries that do, `Manifest.shards`)."""
    known: dict[tuple[str, int, int], Entry] = {}
    by_shard: dict[str, list[Entry]] = defaultdict(list)
    for entry in old.entries if old is not None else ():
        known[entry.path, entry.start, entry.end] = entry
        by_shard[entry.shard or entry.path].append(entry)
    if partial and partial.exists():  # what an interrupted run has probed; a line may be torn
        for line in partial.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                entry = parse(line)
                known[entry.path, entry.start, entry.end] = entry

    entries, todo, shards = [], [], {}
    for item in found:
        if item.archive and not item.error:
            shards[item.path] = [item.bytes, item.mtime_ns, item.label]
            if old is not None and old.shards.get(item.path) == shards[item.path]:
                entries += by_shard[item.path]
                continue
            fresh = members(root, item, kind)
        else:
            fresh = [item.entry()]
        for new in fresh:
            before = known.get((new.path, new.start, new.end))
            if new.error:
                entries.append(new)
            elif (
                before
                and not passing(before)
                and (before.bytes, before.mtime_ns, before.offset) == (new.bytes, new.mtime_ns, new.offset)
            ):
                entries.append(replace(before, label=new.label, mislabelled=new.mislabelled))
            else:
                todo.append(new)
    return entries, todo, shards
