"""What files there are, what is in them, and what is wrong with them: every file is probed once.

A manifest is a `.jsonl` file: a header line (version, kind, root), then one line a file, sorted by path. Files whose
size and modification time are unchanged are not probed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from bevt.data import DataError
from bevt.data.processes import context, cores, initialize

Kind = Literal["clips", "images"]
Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""

EXTENSIONS: dict[str, tuple[str, ...]] = {
    "clips": (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"),
    "images": (".jpg", ".jpeg", ".png", ".webp", ".bmp"),
}

SPARSE_KEYS = 250
"""Key frames further apart than this (x264's default) make seeking slow."""

MOST_NAMED = 20
"""Unreadable files of one source that the log names; the others are counted."""

VERSION = 1

_KEY_SPACING = 12
"""Key frames closer than this to the last one kept are left out of `Entry.keys`: seeking would gain nothing."""

_EXACT_PACKETS = {"h264", "hevc", "vp9", "av1"}
"""Codecs of which one packet of an MP4 or Matroska file is one shown frame (VP8 hides some, AVI splits some)."""

_log = logging.getLogger("bevt.data")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. An image has 1 frame and no rate; a file with an `error` has nothing but its name, size and time."""

    path: str
    """Relative to the manifest's root, with forward slashes; or absolute."""
    bytes: int
    mtime_ns: int
    error: str | None = None
    """Why the file cannot be used; None: it can."""
    label: str | int | None = None
    """The number in a list file, or the name of the parent folder; None for a file at the root."""
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


@dataclass(frozen=True)
class Manifest:
    """The files of one source, sorted by path."""

    kind: Kind
    root: str
    """Absolute folder that the paths are relative to."""
    entries: tuple[Entry, ...]

    def readable(self) -> list[Entry]:
        """The entries without an error, in order."""
        return [entry for entry in self.entries if entry.error is None]

    def locate(self, entry: Entry) -> str:
        """The path of the file on this machine."""
        return os.path.join(self.root, entry.path)

    def fingerprint(self) -> str:
        """16 hex digits of the names and sizes of all files: what a sampler's order depends on."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.path}\0{entry.bytes}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the manifest, all or nothing. A manifest inside its own root can be moved together with it."""
        path = Path(path)
        root = "." if path.resolve().parent == Path(self.root).resolve() else self.root
        header = {"bevt_manifest": VERSION, "kind": self.kind, "root": root}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(header) + "\n")
                file.writelines(_dump(entry) for entry in self.entries)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest. Raises DataError where the file is missing, is no manifest, or is of another version."""
        path = Path(path)
        try:
            with open(path, encoding="utf-8") as file:
                header = json.loads(next(file))
                if header["bevt_manifest"] != VERSION:
                    version = header["bevt_manifest"]
                    raise DataError(f"{path} is a manifest of version {version}, not {VERSION}: index the files again")
                entries = tuple(_parse(line) for line in file)
        except OSError as error:
            raise DataError(f"cannot read the manifest {path} ({error.strerror})") from error
        except (StopIteration, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a manifest written by `bevt data index`") from error
        return cls(header["kind"], str(path.resolve().parent / header["root"]), entries)


@dataclass(frozen=True)
class Problem:
    """Something that `check` found."""

    severity: Literal["error", "warning", "note"]
    path: str
    what: str
    advice: str


def probe_source(path: str, kind: Kind, *, progress: Progress | None = None) -> Manifest:
    """The manifest of what a configuration names: a folder, a manifest (`.jsonl`), or a list of `path label` lines.

    Folders and lists are indexed on the fly; the result is kept in `.bevt_manifest_<kind>.jsonl` inside the folder (for
    a list: `.<name>.bevt_manifest_<kind>.jsonl` beside it), or in the user's cache folder where that is not writable.
    Raises DataError as `index`.
    """
    if path.endswith(".jsonl"):
        manifest = Manifest.load(path)
        if manifest.kind != kind:
            raise DataError(f"{path} lists {manifest.kind}, not {kind}")
        return manifest
    return index(path, kind, cache=cache_path(Path(path), kind), progress=progress)


def open_source(path: str, kind: Kind) -> Manifest:
    """`probe_source` for use: unreadable files are named in the log; DataError where no file is readable."""
    manifest = probe_source(path, kind)
    bad = [entry for entry in manifest.entries if entry.error]
    if len(bad) == len(manifest.entries):
        reasons = "\n".join(f"  {entry.path}: {entry.error}" for entry in bad[:5])
        more = f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(f"none of the {len(bad)} {kind} in {path} can be read:\n{reasons}{more}")
    for entry in bad[:MOST_NAMED]:
        _log.warning("%s: %s", manifest.locate(entry), entry.error)
    if bad:
        more = f", {len(bad) - MOST_NAMED} more than are named here" if len(bad) > MOST_NAMED else ""
        _log.warning(
            "%s: %d of %d files cannot be read%s (see `bevt data check`)", path, len(bad), len(manifest.entries), more
        )
    return manifest


def index(
    path: str,
    kind: Kind,
    *,
    cache: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Probe every file of a folder (all levels; hidden ones left out) or of a list file.

    `cache` names a manifest: unchanged files are taken from it, and it is rewritten at the end; what an interrupted run
    has probed is found again. `workers` processes (default: one a core). A file that cannot be used is an entry with an
    `error`, never an exception. Raises DataError where the path does not exist or holds no file of the kind.
    """
    source = Path(path)
    files: Sequence[tuple[str, str | int | None]]
    if source.is_dir():
        root, files = source.resolve(), _walk(source, EXTENSIONS[kind])
        if not files:
            raise DataError(f"no {kind} in the folder {path}: looked for {' '.join(EXTENSIONS[kind])}")
    elif source.is_file():
        root, files = source.resolve().parent, _read_list(source)
    else:
        raise DataError(
            f"{path} does not exist: give a folder of {kind}, a manifest (.jsonl) or a list of `path label` lines"
        )

    partial = Path(f"{cache}.partial") if cache else None
    known = _known(Path(cache), kind) if cache else {}
    entries, todo = [], []
    for name, label in files:
        try:
            status = os.stat(root / name)
        except OSError as error:
            entries.append(Entry(name, 0, 0, f"cannot be opened ({error.strerror})", label))
            continue
        fresh = Entry(name, status.st_size, status.st_mtime_ns, label=label)
        old = known.get(name)
        if old and (old.bytes, old.mtime_ns) == (fresh.bytes, fresh.mtime_ns):
            entries.append(replace(old, label=label))
        else:
            todo.append(fresh)
    if todo:
        log = open(partial, "a", encoding="utf-8") if partial else None  # noqa: SIM115
        try:
            for entry in _probe_all(str(root), kind, todo, workers or cores()):
                entries.append(entry)
                if log:
                    log.write(_dump(entry))
                    log.flush()
                if progress:
                    progress(len(entries), len(files))
        finally:
            if log:
                log.close()
    manifest = Manifest(kind, str(root), tuple(sorted(entries, key=lambda entry: entry.path)))
    if cache and (todo or len(known) != len(entries)):
        manifest.save(cache)
    if partial:
        partial.unlink(missing_ok=True)
    return manifest


def check(manifest: Manifest, span: int = 0) -> list[Problem]:
    """What is wrong with the files, worst first, and what to do about it. Reads files only to compare equal sizes.

    `span`: source frames that a clip covers, (frames - 1) * stride + 1; shorter videos are noted. 0: not checked.
    """
    problems = []
    for entry in manifest.entries:

        def add(severity: Literal["error", "warning", "note"], what: str, advice: str, path: str = entry.path) -> None:
            problems.append(Problem(severity, path, what, advice))

        if entry.error:
            add("error", entry.error, "fetch or encode the file again; until then training reads another in its place")
            continue
        if entry.variable_rate:
            add(
                "warning",
                "variable frame rate: equal strides are not equal times",
                "re-encode at a constant rate (ffmpeg -fps_mode cfr) if timing matters",
            )
        if entry.key_interval > SPARSE_KEYS:
            add(
                "warning",
                f"up to {entry.key_interval} frames between key frames: a late clip decodes all of them",
                f"re-encode with a key frame every {SPARSE_KEYS} frames or fewer (ffmpeg -g 48)",
            )
        if manifest.kind == "clips" and entry.frames < span:
            add("note", f"{entry.frames} frames, a clip spans {span}", "it loops; a smaller data.stride avoids that")
        if entry.width % 2 or entry.height % 2:
            add(
                "note",
                f"odd size {entry.width}x{entry.height}",
                "some decoders refuse it; crop a pixel when re-encoding",
            )
    for first, *others in _duplicates(manifest):
        for other in others:
            problems.append(Problem("warning", other, f"the same bytes as {first}", "keep one of them"))
    order = ("error", "warning", "note")
    return sorted(problems, key=lambda problem: (order.index(problem.severity), problem.path))


def _walk(folder: Path, extensions: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """(relative path, label) of every file with one of the extensions, links to folders followed, each folder once."""
    found: list[tuple[str, str | None]] = []
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(here).relative_to(folder)
        label = relative.name or None
        for name in files:
            if name.lower().endswith(extensions) and not name.startswith("."):
                found.append(((relative / name).as_posix(), label))
    return sorted(found)


def _read_list(path: Path) -> list[tuple[str, int | None]]:
    """(path, label) of every line `path label`, `path,label` or `path`; paths are relative to the list's folder."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is neither a folder, a manifest (.jsonl) nor a list of `path label` lines") from error
    found: dict[str, int | None] = {}
    for line in filter(None, map(str.strip, lines)):
        match = re.fullmatch(r"(.*\S)[\s,]+(-?\d+)", line)
        name, label = (match[1].rstrip(","), int(match[2])) if match else (line, None)
        found[name] = label
    if not found:
        raise DataError(f"the list {path} is empty")
    return sorted(found.items())


def guess_kind(source: str) -> Kind:
    """`clips` or `images`: what a folder or list holds more of, by extension. DataError where it holds neither."""
    path = Path(source)
    if path.is_dir():
        every = tuple(extension for extensions in EXTENSIONS.values() for extension in extensions)
        names = [name for name, _ in _walk(path, every)]
    elif path.is_file():
        names = [name for name, _ in _read_list(path)]
    else:
        raise DataError(f"{source} does not exist: give a folder, a manifest (.jsonl) or a list of `path label` lines")
    kinds: tuple[Kind, ...] = ("clips", "images")
    counts = {kind: sum(name.lower().endswith(EXTENSIONS[kind]) for name in names) for kind in kinds}
    if not any(counts.values()):
        raise DataError(f"no clips or images in {source}: looked for {' '.join(sum(EXTENSIONS.values(), ()))}")
    return max(kinds, key=lambda kind: counts[kind])


def cache_path(source: Path, kind: Kind) -> Path:
    """Where the manifest of a folder or list is kept."""
    if source.is_dir():
        folder, name = source, f".bevt_manifest_{kind}.jsonl"
    else:
        folder, name = source.parent, f".{source.name}.bevt_manifest_{kind}.jsonl"
    if os.access(folder, os.W_OK):
        return folder / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bevt"
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"manifest_{kind}_{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]}.jsonl"
    _log.warning("%s is not writable: its manifest is kept in %s", folder, path)
    return path


def _known(cache: Path, kind: Kind) -> dict[str, Entry]:
    """Entries of an earlier run, by path: those of the finished manifest, then those of an interrupted one."""
    known: dict[str, Entry] = {}
    if cache.exists():
        try:
            manifest = Manifest.load(cache)
        except DataError as error:
            _log.warning("%s; the files are probed again", error)
        else:
            known = {entry.path: entry for entry in manifest.entries} if manifest.kind == kind else {}
    partial = Path(f"{cache}.partial")
    if partial.exists():
        for line in partial.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("}\n"):  # the last one may be torn
                entry = _parse(line)
                known[entry.path] = entry
    return known


def _dump(entry: Entry) -> str:
    """One line of a manifest: what differs from the defaults."""
    plain = {
        field.name: value
        for field in dataclasses.fields(entry)
        if (value := getattr(entry, field.name)) != field.default
    }
    return json.dumps(plain, default=str) + "\n"


def _parse(line: str) -> Entry:
    plain = json.loads(line)
    if "fps" in plain:
        plain["fps"] = Fraction(plain["fps"])
    if "keys" in plain:
        plain["keys"] = tuple((number, stamp) for number, stamp in plain["keys"])
    return Entry(**plain)


def _duplicates(manifest: Manifest) -> Iterator[list[str]]:
    """Groups of files with the same bytes."""
    by_size = defaultdict(list)
    for entry in manifest.readable():
        by_size[entry.bytes].append(entry)
    for group in by_size.values():
        if len(group) == 1:
            continue
        by_hash = defaultdict(list)
        for entry in group:
            digest = hashlib.sha256()
            with open(manifest.locate(entry), "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            by_hash[digest.digest()].append(entry.path)
        yield from (paths for paths in by_hash.values() if len(paths) > 1)


def _probe_all(root: str, kind: Kind, entries: list[Entry], workers: int) -> Iterator[Entry]:
    """Probed entries, in any order."""
    if workers == 1 or len(entries) < 8:  # starting processes costs more than a few files
        yield from (_probe(root, kind, entry) for entry in entries)
        return
    size = max(1, min(64, len(entries) // (4 * workers)))
    chunks = [entries[i : i + size] for i in range(0, len(entries), size)]
    with ProcessPoolExecutor(min(workers, len(chunks)), mp_context=context(), initializer=initialize) as pool:
        try:
            for future in as_completed([pool.submit(_probe_some, root, kind, chunk) for chunk in chunks]):
                yield from future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"a process that probed files in {root} died: out of memory, or a file that crashes the decoder; "
                "`bevt data index` continues where this stopped, and with one worker shows the file it stops at"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _probe_some(root: str, kind: Kind, entries: list[Entry]) -> list[Entry]:
    return [_probe(root, kind, entry) for entry in entries]


def _probe(root: str, kind: Kind, entry: Entry) -> Entry:
    """The entry with what is in the file, or with the error."""
    from bevt.data.pyav import ReadError

    try:
        facts = (_probe_clip if kind == "clips" else _probe_image)(os.path.join(root, entry.path))
    except ReadError as error:
        return replace(entry, error=error.reason)
    return replace(entry, **facts)


def _probe_image(path: str) -> dict[str, Any]:
    from bevt.data.pyav import open_image, upright

    with open_image(path) as image:
        facts = {"format": image.format or "", "pixel_format": image.mode}
        width, height = upright(path, image).size  # decodes everything: a cut-off file has a healthy header
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


def _packets(path: str, container: Any, *streams: Any) -> list[_Packet]:
    """The packets of the streams, in file order. Raises ReadError."""
    from bevt.data.pyav import ReadError, library

    packets = []
    try:
        for packet in container.demux(*streams):
            if packet.size:
                end = (packet.pts + (packet.duration or 0)) * packet.time_base if packet.pts is not None else 0
                packets.append(
                    _Packet(packet.pts, float(end), packet.is_keyframe, packet.is_discard, not packet.is_corrupt)
                )
    except library().error.FFmpegError as error:
        raise ReadError(path, f"cut off or damaged: packet {len(packets)} cannot be read ({error.strerror})") from error
    return packets


def _reject_truncated(path: str, container: Any, stream: Any, packets: list[_Packet]) -> None:
    """Raise ReadError where the file ends before what its header declares."""
    from bevt.data.pyav import ReadError, open_video

    if any(not packet.whole for packet in packets):
        raise ReadError(path, "cut off: a packet is incomplete")
    is_mp4, declared, count = container.format.name.startswith("mov,"), stream.frames, len(packets)
    if is_mp4 and count < declared:  # the sample table is exact, but an edit list may hide samples
        whole, video = open_video(path, ignore_editlist="1")
        with whole:
            count = len(_packets(path, whole, video))
    # The counts in AVI and FLV headers are a few frames off in healthy files (UCF-101).
    if count < (declared if is_mp4 else 0.95 * declared):
        raise ReadError(path, f"cut off: {count} of the {declared} frames that its header declares")
    seconds = (container.duration or 0) / 1e6
    if not declared and max(packet.end for packet in packets) < 0.95 * seconds - 0.5:
        every, _ = open_video(path)  # the sound may be longer than the pictures
        with every:
            end = max(packet.end for packet in _packets(path, every)) - (every.start_time or 0) / 1e6
        if end < 0.95 * seconds - 0.5:
            raise ReadError(path, f"cut off: it ends at {end:.1f} of the {seconds:.1f} seconds its header declares")


def _probe_clip(path: str) -> dict[str, Any]:
    """Count packets, then make sure of the ends: decode the first frame, and from the last key frame to the last.

    Where one packet need not be one frame, or the end does not come out as the packets promise, the whole file is
    decoded and counted, and no key frame is trusted.
    """
    from bevt.data.pyav import ReadError, open_video, turns

    container, stream = open_video(path)
    with container:
        packets = _packets(path, container, stream)
        if not packets:
            raise ReadError(path, "no frame can be found in it: empty or cut off")
        _reject_truncated(path, container, stream, packets)
        codec, container_name, tick = stream.codec_context.name, container.format.name, float(stream.time_base)
        pixel_format, fps = stream.codec_context.pix_fmt or "", stream.average_rate
    shown = [packet for packet in packets if not packet.hidden]
    stamps = sorted(packet.stamp for packet in shown if packet.stamp is not None)
    keys: list[tuple[int, int]] = []
    if codec in _EXACT_PACKETS and container_name.startswith(("mov,", "matroska,")) and len(set(stamps)) == len(shown):
        place = {stamp: number for number, stamp in enumerate(stamps)}
        keys = sorted(
            (place[packet.stamp], packet.stamp) for packet in shown if packet.key and packet.stamp is not None
        )

    frames, first = _decode(path, None, 1)
    if first is None:
        raise ReadError(path, "none of its frames can be decoded")
    height, width = (first.height, first.width) if turns(first) % 2 == 0 else (first.width, first.height)
    frames = _decode(path, keys[-1])[0] if keys and keys[0][0] == 0 else 0
    if frames != len(shown):
        frames, keys = _decode(path, None)[0], []

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
    }


def _decode(path: str, seek: tuple[int, int] | None, most: float = math.inf) -> tuple[int, Any]:
    """(number after the last frame decoded from `seek` on, that frame); at most `most` frames. Raises ReadError."""
    from bevt.data.pyav import frames_from, open_video

    end, frame = 0, None
    container, stream = open_video(path)
    with container, contextlib.closing(frames_from(path, container, stream, seek)) as frames:
        for number, frame in frames:  # noqa: B007
            end = number + 1
            if end >= most:
                break
    return end, frame
