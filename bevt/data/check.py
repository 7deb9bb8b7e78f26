"""What is wrong with the files of a manifest, and what to do about it."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bevt.data.entry import Entry
from bevt.data.files import CLOSED, File, ReadError
from bevt.data.manifest import Manifest
from bevt.data.probe import OUTSIDE, decode, probe_all
from bevt.data.processes import cores
from bevt.data.sources import COMPRESSED, CUT, MISSING

SPARSE_KEYS = 250
"""Key frames further apart than this (x264's default) make seeking slow."""

_BLOCK = 1 << 20
_BEGINNING = 1 << 12


class Category(NamedTuple):
    """A kind of problem. An `error` keeps a file from being used, a `warning` costs time or quality."""

    severity: Literal["error", "warning", "note"]
    advice: str
    begins: str = ""
    """How the `Entry.error` of such a file begins."""


CATEGORIES = {
    "unreadable": Category("error", "fetch or encode it again; until then training reads another in its place"),
    "truncated": Category("error", "fetch it again; until then training reads another in its place", CUT),
    "not accessible": Category("error", "let this user read it, or mend the link or the disk", CLOSED),
    "compressed archive": Category("error", "decompress it to .tar (gunzip, zstd -d)", COMPRESSED),
    "wrong range": Category("error", "correct the list, or fetch the video that it was written for", OUTSIDE),
    "changed": Category("error", "index the source again (`bevt data index`)"),
    "listed but missing": Category("error", "fetch it, or take it off the list", MISSING),
    "bad label": Category("warning", "pretraining needs none; mend the file: a number, a text, or json with a label"),
    "variable rate": Category("warning", "equal strides are not equal times: re-encode (ffmpeg -fps_mode cfr)"),
    "sparse key frames": Category("warning", "a late clip decodes all frames before it: re-encode (ffmpeg -g 48)"),
    "duplicates": Category("warning", "keep one of them"),
    "too short": Category("note", "the clip loops; a smaller data.stride avoids that"),
    "odd sizes": Category("note", "some decoders refuse them; crop a pixel when re-encoding"),
}
"""By name, worst first."""


@dataclass(frozen=True)
class Problem:
    """Something that `check` found."""

    category: str
    """A key of CATEGORIES."""
    path: str
    what: str


def check(
    manifest: Manifest, span: int = 0, *, whole: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """What is wrong with the files, worst first. Reads only files that have the size of another one.

    `span`: source frames that a clip covers, (frames - 1) * stride + 1; shorter videos are noted. 0: not checked.
    `whole`: every file is decoded to its end, where indexing decodes both ends of a video; `progress` gets (files done,
    files in all).
    """
    problems, there = [], []
    by_size: dict[Hashable, list[int]] = defaultdict(list)
    for number, entry in enumerate(manifest.entries):
        found = [Problem(category, entry.path, what) for category, what in _problems(manifest, entry, span)]
        problems += found
        if entry.error is None:
            by_size[entry.bytes].append(number)
            if all(CATEGORIES[problem.category].severity != "error" for problem in found):
                there.append(entry)
    if whole:
        once = list({manifest.file(entry): entry for entry in there}.values())  # a file may have several ranges
        for done, entry in enumerate(probe_all(manifest.root, manifest.kind, once, cores(), decode), 1):
            if entry.error is not None:
                problems.append(Problem(_category(entry.error), entry.path, entry.error))
            if progress:
                progress(done, len(once))
    problems += _duplicates(manifest, [group for group in by_size.values() if len(group) > 1])
    order = list(CATEGORIES)
    return sorted(problems, key=lambda problem: (order.index(problem.category), problem.path))


def changed(manifest: Manifest, entry: Entry) -> tuple[str, str] | None:
    """(category, what) where the file is not the one that was indexed: gone, or of another size or time."""
    try:
        status = os.stat(manifest.file(entry).path)
    except OSError as error:
        return "listed but missing", f"since it was indexed: {error.strerror}"
    resized = not entry.shard and status.st_size != entry.bytes  # the size of a member is not that of its archive
    if resized or status.st_mtime_ns != entry.mtime_ns:
        return "changed", "it has another size or time than when it was indexed"
    return None


def _category(error: str) -> str:
    """That of an `Entry.error`."""
    begun = (name for name, category in CATEGORIES.items() if category.begins and error.startswith(category.begins))
    return next(begun, "unreadable")


def _problems(manifest: Manifest, entry: Entry, span: int) -> Iterator[tuple[str, str]]:
    """(category, what) of what the entry alone shows, and of whether its file is still that one."""
    if entry.error is not None:
        yield _category(entry.error), entry.error
        return
    if (problem := changed(manifest, entry)) is not None:
        yield problem
        return
    if entry.mislabelled:
        yield "bad label", "the .cls or .json beside it holds neither a number nor a text"
    if entry.variable_rate:
        yield "variable rate", "the time from frame to frame varies by more than a tenth"
    if entry.key_interval > SPARSE_KEYS:
        yield "sparse key frames", f"up to {entry.key_interval} frames between key frames, {SPARSE_KEYS} are usual"
    if manifest.kind == "clips" and entry.length() < span:
        yield "too short", f"{entry.length()} frames, a clip spans {span}"
    if entry.width % 2 or entry.height % 2:
        yield "odd sizes", f"odd size {entry.width}x{entry.height}"


def _duplicates(manifest: Manifest, groups: list[list[int]]) -> Iterator[Problem]:
    """Files with the same bytes, of groups with the same size; and those that went away since they were indexed.

    The first 4 KiB are compared before all are: pictures of one size are common (in ImageNet, most are not alone).
    """
    for group in groups:
        entries = [manifest.entries[number] for number in group]
        paths = {manifest.file(entry): entry.path for entry in entries}  # several ranges of one file count once
        same = [list(paths)]
        for compared in (_beginning, _whole):
            by_key: dict[Hashable, list[File]] = defaultdict(list)
            for place, alike in enumerate(same):
                for file in alike:
                    try:
                        by_key[place, compared(file)].append(file)
                    except ReadError as error:
                        yield Problem("listed but missing", paths[file], f"since it was indexed: {error.reason}")
            same = [alike for alike in by_key.values() if len(alike) > 1]
        for alike in same:
            first, *others = (paths[file] for file in alike)
            yield from (Problem("duplicates", path, f"the same bytes as {first}") for path in others)


def _beginning(file: File) -> bytes:
    return file.read(_BEGINNING)


def _whole(file: File) -> bytes:
    """A digest of all bytes, without holding them."""
    digest = hashlib.sha256()
    try:
        with open(file.path, "rb") as stream:
            stream.seek(file.offset)
            left = file.size or -1
            while left and (block := stream.read(_BLOCK if left < 0 else min(left, _BLOCK))):
                digest.update(block)
                left -= len(block) if left > 0 else 0
    except OSError as error:
        raise ReadError(file.name, f"{CLOSED} ({error.strerror})") from error
    return digest.digest()
