"""What files a source names: folders, lists, the annotation files of data sets, tar archives. Nothing is decoded here.

Read as they are, and told apart by content:

- A folder, all levels, links followed; what begins with a dot is left out. A file's label is its folder's name.
- `path label` lines (also `path,label`, tab, quoted as csv; the label is a whole number and may be missing), relative
  to the list's folder. A path may be a tar archive; its label goes to members without one.
- Kinetics csv (400, 600, 700): a header with `youtube_id`, `time_start`, `time_end` and, but for test sets, `label`
  (the README beside DeepMind's annotations). The file of a row is `{id}_{start:06d}_{end:06d}.*`, as the data set's
  crawler names it, or `{id}.*`, anywhere below the csv's folder.
- Something-Something V2 json: [{"id", "template", ...}], files `{id}.*` anywhere below. The label is the number that
  `labels.json` or `something-something-v2-labels.json` beside it gives the template without brackets (the data set's
  own instructions). A test set has ids alone.
- Diving48 json: [{"vid_name", "label", "start_frame", "end_frame"}], files `{vid_name}.*` anywhere below. Frames count
  from 0 and `end_frame` is taken as exclusive, which its authors do not say: it is then the number of frames of a file
  whose `start_frame` is 0, as public conversion scripts take it.
- Tar archives, uncompressed, as WebDataset writes them (webdataset.github.io): members with the same name up to the
  first dot of its last part are one sample; `.cls` (text) or `.json` (its `label`) beside a video or image labels it,
  else the folder in the archive. Where those are no number and no text, the sample has no label (`Entry.mislabelled`).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from bevt.data import DataError
from bevt.data.entry import EXTENSIONS, Entry, Kind
from bevt.data.files import CLOSED

Label = str | int | None

ARCHIVE = ".tar"

MISSING = "not there"
"""How the error of a listed file that does not exist begins."""

CUT = "cut off"
"""How the error of a file begins that ends too early."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
"""First bytes of gzip, bzip2, xz, zstd, lz4."""
COMPRESSED = "a compressed archive"
"""How the error of one begins."""
_ADVICE = f"{COMPRESSED}, whose members cannot be found by their place: decompress it (gunzip, zstd -d) to .tar"

_LINK = "a link, or another thing without bytes of its own, in the archive: pack the file itself"

_LABELS = ("labels.json", "something-something-v2-labels.json")

_NUMBER = r"-?\d{1,18}"
_NAMED = (*EXTENSIONS["clips"], *EXTENSIONS["images"], ARCHIVE, *_COMPRESSED)
"""What the names of files end in."""

_MOST_LABEL = 1 << 20
"""Bytes of a label file in an archive that are read; what is longer is no label."""


class Found(NamedTuple):
    """One file on disk: a video, an image or a tar archive. With an `error` it is known to be of no use."""

    path: str
    """As `Entry.path`."""
    bytes: int = 0
    mtime_ns: int = 0
    label: Label = None
    start: int = 0
    end: int = 0
    error: str | None = None

    @property
    def archive(self) -> bool:
        """It is a tar archive, with the samples inside."""
        return self.path.lower().endswith(ARCHIVE)

    def entry(self) -> Entry:
        """What is known of it before it is opened."""
        return Entry(self.path, self.bytes, self.mtime_ns, self.error, self.label, start=self.start, end=self.end)


def find(source: str, kind: Kind | None) -> tuple[Path, list[Found]]:
    """(folder that the paths are relative to, the files in order of path) of a source; `kind` None: of either kind.

    A file that is not there, or an archive that is compressed, has an error. Raises DataError where the source does not
    exist, holds nothing of the kind, or a line of it is malformed: that names file, line and what was expected.
    """
    path = Path(source)
    extensions = EXTENSIONS[kind] if kind else sum(EXTENSIONS.values(), ())
    if path.is_dir():
        found = sorted(_walk(path, (*extensions, ARCHIVE, *_COMPRESSED)), key=_order)
        if not found:
            what = kind or "clips or images"
            raise DataError(f"no {what} in the folder {path}: looked for {' '.join((*extensions, ARCHIVE))}")
        return path.resolve(), found
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: give a folder, a tar archive, a manifest (.jsonl) or a list of `path label` lines"
        )
    root = path.resolve().parent
    if _is_archive(path.name):
        return root, [_stat(root, path.name)]
    rows = list(_rows(path, kind))
    if not rows:
        raise DataError(f"the list {path} is empty")
    return root, sorted(_checked(path, rows), key=_order)


def _order(found: Found) -> tuple[str, int, int]:
    return found.path, found.start, found.end


def _is_archive(name: str) -> bool:
    """A tar archive, compressed or not, by its name."""
    return name.lower().endswith((ARCHIVE, *_COMPRESSED))


def guess_kind(source: str) -> Kind:
    """`clips` or `images`: what a source holds more of, by extension. DataError where it holds neither."""
    path, kinds = Path(source), get_args(Kind)
    if path.is_file() and not _is_archive(path.name) and _read(path)[1] != "lines":
        return "clips"  # even where none of the files is there to tell by its extension
    root, found = find(source, None)
    names = [item.path for item in found]
    archives = [item for item in found if item.archive and not item.error]
    broken = any(item.error for item in found if _is_archive(item.path))
    for archive in archives[:1]:  # one speaks for all: reading the headers of thousands takes minutes
        inside = [entry for kind in kinds for entry in members(root, archive, kind)]
        names += [entry.path for entry in inside if not entry.error]
        broken = broken or any(entry.error for entry in inside)
    counts = {kind: sum(name.lower().endswith(EXTENSIONS[kind]) for name in names) for kind in kinds}
    if not any(counts.values()):
        if broken:  # an archive, compressed or damaged: indexing says which
            return "clips"
        first = f", none of whose files ({names[0]!r} the first) is called like one" if names else ""
        raise DataError(
            f"no clips or images in {source}{first}: looked for {' '.join(sum(EXTENSIONS.values(), ()))}; if files "
            "of other names are meant, say --kind clips or --kind images"
        )
    return max(kinds, key=lambda kind: counts[kind])


def members(root: Path, archive: Found, kind: Kind) -> list[Entry]:
    """The videos or images in a tar archive, found by reading its headers.

    One that is cut off or damaged gives what lies before that, and is itself an entry with an error.
    """
    found: list[tuple[str, str, str, int, int]] = []
    odd: list[str] = []
    labels: dict[tuple[str, str], bytes] = {}
    size, seen, error = archive.bytes, -1, None
    try:
        with open(root / archive.path, "rb") as file:
            if file.read(8).startswith(_MAGIC):
                raise _Unusable(_ADVICE)
            if not size:
                raise _Unusable("the file is empty (0 bytes)")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte each, not needed again
                    if member.size < 0 or member.offset_data <= seen or member.offset_data + member.size > size:
                        raise _Unusable(f"{CUT} or damaged at {member.name}")
                    seen = member.offset_data
                    folder, name = os.path.split(member.name.removeprefix("./"))
                    if name.startswith("."):
                        continue
                    if not member.isreg() or member.issparse():
                        if name.lower().endswith(EXTENSIONS[kind]) and not member.isdir():
                            odd.append(f"{archive.path}/{os.path.join(folder, name)}")
                        continue
                    stem, _, extension = name.lower().rpartition(".")
                    key = os.path.join(folder, name.partition(".")[0])
                    if f".{extension}" in EXTENSIONS[kind] and stem:
                        found.append((key, folder, os.path.join(folder, name), member.offset_data, member.size))
                    elif extension in ("cls", "json"):
                        content = tar.extractfile(member)
                        labels[key, extension] = content.read(_MOST_LABEL) if content else b""
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0") or tar.offset >= size:  # tarfile takes both for the end
                    raise _Unusable(f"{CUT} or damaged: it has no end mark after {len(found)} {kind}")
    except _Unusable as problem:
        error = str(problem)
    except OSError as problem:
        error = f"{CLOSED} ({problem.strerror})"
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as problem:  # what hostile headers lead to
        error = f"{CUT} or damaged after {len(found)} {kind} ({problem})"
    entries = [] if error is None else [archive._replace(error=error).entry()]
    entries += [Entry(name, 0, archive.mtime_ns, _LINK, shard=archive.path) for name in odd]
    for key, folder, name, offset, length in found:
        wrong = None if length else "the file is empty (0 bytes)"  # which `File` would take for the rest of the archive
        mislabelled = False
        try:
            label = _label(labels, key)
            if label is None:
                label = archive.label if archive.label is not None else os.path.basename(folder) or None
        except (ValueError, RecursionError):
            label, mislabelled = None, True
        entries.append(
            Entry(
                f"{archive.path}/{name}",
                length,
                archive.mtime_ns,
                wrong,
                label,
                shard=archive.path,
                offset=offset,
                mislabelled=mislabelled,
            )
        )
    return entries


class _Unusable(Exception):
    """What is wrong with an archive."""


def _label(labels: dict[tuple[str, str], bytes], key: str) -> Label:
    """The label that lies beside a member. Raises ValueError or RecursionError where it is none."""
    if (key, "cls") in labels:
        text = labels[key, "cls"].decode().strip()
        return int(text) if re.fullmatch(_NUMBER, text) else text or None
    content = json.loads(labels.get((key, "json"), b"null"))
    label = content.get("label") if isinstance(content, dict) else None
    if label is not None and (not isinstance(label, str | int) or label is True or label is False):
        raise ValueError(label)
    return label


def _walk(folder: Path, extensions: tuple[str, ...]) -> list[Found]:
    """Every file with one of the extensions, links to folders followed, each folder once.

    A folder that cannot be listed, or a link that leads nowhere, is one with an error. Raises DataError for `folder`.
    """
    found, folders, seen = [], [""], set()
    while folders:
        below = folders.pop()
        label = os.path.basename(below) or None
        if (real := os.path.realpath(folder / below)) in seen:
            continue
        seen.add(real)
        inside = []
        try:
            with os.scandir(real) as listing:
                for item in listing:
                    if item.name.startswith("."):
                        continue
                    name = f"{below}/{item.name}" if below else item.name
                    try:
                        is_folder = item.is_dir()
                    except OSError as error:  # a link to itself
                        found.append(Found(name, error=f"{CLOSED} ({error.strerror})"))
                        continue
                    if is_folder:
                        inside.append(name)
                    elif item.name.lower().endswith(extensions):
                        found.append(_found(name, item, label))
        except OSError as error:
            if not below:
                raise DataError(f"the folder {folder} cannot be listed ({error.strerror})") from error
            found.append(Found(below, error=f"a folder that cannot be listed ({error.strerror})"))
        folders += sorted(inside, reverse=True)  # depth first: of two links to a folder the first one names its files
    return found


def _stat(root: Path, name: str, label: Label = None, start: int = 0, end: int = 0) -> Found:
    return _found(name, root / name, label, start, end)


def _found(name: str, item: os.DirEntry[str] | Path, label: Label, start: int = 0, end: int = 0) -> Found:
    """The file with its size and time, or with the reason why it has none."""
    try:
        status = item.stat()
    except FileNotFoundError:
        return Found(name, 0, 0, label, start, end, f"{MISSING}: looked for {os.fspath(item)}")
    except OSError as error:
        return Found(name, 0, 0, label, start, end, f"{CLOSED} ({error.strerror})")
    wrong = None
    if not stat.S_ISREG(status.st_mode):  # a pipe would block whoever opens it
        wrong = "neither a file nor a link to one"
    elif name.lower().endswith(_COMPRESSED):
        wrong = _ADVICE
    return Found(name, status.st_size, status.st_mtime_ns, label, start, end, wrong)


class _Row(NamedTuple):
    """One line of a list."""

    where: str
    """`line 7` or `item 7`."""
    found: Found


def _checked(path: Path, rows: Iterable[_Row]) -> list[Found]:
    """The files, each once. Raises DataError where one has two labels."""
    first: dict[tuple[str, int, int], _Row] = {}
    for row in rows:
        file = row.found
        other = first.setdefault((file.path, file.start, file.end), row)
        if other.found.label != file.label:
            raise DataError(
                f"{path} gives {file.path} two labels: {other.found.label!r} ({other.where}) and {file.label!r} "
                f"({row.where}); keep one of the two"
            )
    return [row.found for row in first.values()]


def _read(path: Path) -> tuple[str, Literal["lines", "kinetics", "json"]]:
    """The text of a list or an annotation file, and what it is."""
    try:
        with open(path, "rb") as file:
            binary = b"\0" in file.read(4096)  # not all of a large video
        text = "" if binary else path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"the list {path} cannot be opened ({error.strerror})") from error
    except UnicodeDecodeError:
        binary = True
    if binary:
        raise DataError(
            f"{path} is neither a folder, a tar archive, a manifest (.jsonl), a list of `path label` lines in UTF-8, a "
            "Kinetics csv nor an SSv2 or Diving48 json"
        )
    if path.suffix.lower() == ".json":
        return text, "json"
    return text, "kinetics" if "youtube_id" in _columns(text) else "lines"


def _columns(text: str) -> list[str]:
    """The first line, as names of columns."""
    return [name.strip(' \t\r"').lower() for name in text.partition("\n")[0].split(",")]


def _rows(path: Path, kind: Kind | None) -> Iterator[_Row]:
    """The rows of a list or an annotation file."""
    text, form = _read(path)
    if kind == "images" and form != "lines":
        raise DataError(f"{path} lists videos, not images")
    yield from {"lines": _lines, "kinetics": _kinetics, "json": _json}[form](path, text)


def _lines(path: Path, text: str) -> Iterator[_Row]:
    """`path label`, `path,label`, `path<tab>label` or `path`."""
    root = path.resolve().parent
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        line = line.strip()
        if not line:
            continue
        match = re.fullmatch(rf'(.*?)\s*[\s,]\s*("?)({_NUMBER})\2', line)
        name, label = (match[1], int(match[3])) if match else (line, None)
        if name.startswith('"'):
            try:
                (name,) = next(csv.reader([name], strict=True))
            except (csv.Error, ValueError):  # not one cell, or a quote too many
                name = ""
        if not name or "\0" in name:
            raise DataError(f"{path}, line {number}: {line!r} is not `path label` (a file, then a whole number)")
        name = "/".join(part for part in name.split("/") if part != ".")
        found = _stat(root, name, label)
        if found.error and not name.lower().endswith(_NAMED):  # what there is may be called anything
            _refuse(path, number, line, name, header=number == 1 and label is None)
        yield _Row(f"line {number}", found)


def _refuse(path: Path, number: int, line: str, name: str, header: bool) -> None:
    """Raise DataError where a line names a file that is not there because it has another form than `path label`."""
    match = re.fullmatch(r"(.*\S)\s*[\s,;]\s*(\S*)", name)
    if match and match[1].rstrip('",;').lower().endswith(_NAMED):
        if re.fullmatch(_NUMBER, match[2]):
            raise DataError(
                f"{path}, line {number}: {line!r} is not `path label`: a file and a whole number, with blanks, a tab "
                "or a comma between them, and nothing more"
            )
        raise DataError(f"{path}, line {number}: the label {match[2]!r} is not a whole number of at most 18 digits")
    if match and header:
        raise DataError(
            f"{path}, line 1: {line!r} is not `path label` (a file, then a whole number); if it is a header, delete it"
        )


def _kinetics(path: Path, text: str) -> Iterator[_Row]:
    expected, columns = "label,youtube_id,time_start,time_end,...", _columns(text)
    if missing := [name for name in ("youtube_id", "time_start", "time_end") if name not in columns]:
        raise DataError(f"{path}, line 1: no column {missing[0]}; the header of a Kinetics csv is {expected}")
    files = _Stems(path)
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        next(reader)
        for cells in filter(any, reader):
            where, row = f"line {reader.line_num}", dict(zip(columns, map(str.strip, cells)))
            video, start, end = row.get("youtube_id"), row.get("time_start", ""), row.get("time_end", "")
            if len(cells) != len(columns) or not video or not (start.isdecimal() and end.isdecimal()):
                given = ",".join(cells)[:120]
                raise DataError(f"{path}, {where}: {given!r} is not {','.join(columns)}, the times in whole seconds")
            names = (f"{video}_{int(start):06d}_{int(end):06d}", video)
            yield _Row(where, files.find(names, row.get("label") or None))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not csv ({error}); expected {expected}") from error


def _json(path: Path, text: str) -> Iterator[_Row]:
    """Something-Something V2 or Diving48."""
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON, line {error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(items, list):
        raise DataError(
            f"{path} is not a list of videos: SSv2 has [{{'id', 'template', ...}}], Diving48 [{{'vid_name', 'label', "
            "'start_frame', 'end_frame'}]"
        )
    files, numbers = _Stems(path), None
    for number, item in enumerate(items, 1):
        where = f"item {number}"
        if isinstance(item, dict) and "vid_name" in item:
            yield _Row(where, _diving(path, where, item, files))
        elif isinstance(item, dict) and isinstance(item.get("id"), str | int):
            label = None
            if "template" in item:
                numbers = _ssv2_labels(path) if numbers is None else numbers
                template = str(item["template"]).replace("[", "").replace("]", "")
                if template not in numbers:
                    raise DataError(f"{path}, {where}: the template {template!r} is not among the labels beside it")
                label = numbers[template]
            yield _Row(where, files.find((str(item["id"]),), label))
        else:
            raise DataError(
                f"{path}, {where}: {str(item)[:80]!r} has neither the `id` of SSv2 nor the `vid_name` of Diving48"
            )


def _diving(path: Path, where: str, item: dict[str, Any], files: _Stems) -> Found:
    label, start, end = (item.get(name) for name in ("label", "start_frame", "end_frame"))
    numbers = all(type(value) is int for value in (label, start, end))
    if not numbers or not isinstance(item["vid_name"], str) or not 0 <= start < end:  # type: ignore[operator]
        raise DataError(
            f"{path}, {where}: {str(item)[:120]!r} is not a text `vid_name` with whole numbers `label`, `start_frame` "
            "and `end_frame` above it"
        )
    return files.find((item["vid_name"],), label, start, end)  # type: ignore[arg-type]


def _ssv2_labels(path: Path) -> dict[str, int]:
    """Template without brackets -> number."""
    for name in _LABELS:
        if (beside := path.parent / name).exists():
            try:
                return {template: int(number) for template, number in json.loads(beside.read_bytes()).items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise DataError(f"{beside} is not {{template: number}} ({error})") from error
    raise DataError(
        f"{path} names templates, and neither {' nor '.join(_LABELS)} lies beside it to say their numbers: it is part "
        "of the annotations' download"
    )


class _Stems:
    """The videos below an annotation file, by name without extension."""

    def __init__(self, path: Path) -> None:
        self._root = path.resolve().parent
        self._files: dict[str, list[Found]] = {}
        for found in _walk(self._root, EXTENSIONS["clips"]):
            self._files.setdefault(os.path.splitext(os.path.basename(found.path))[0], []).append(found)

    def find(self, stems: tuple[str, ...], label: Label, start: int = 0, end: int = 0) -> Found:
        """The file with the first of the names that is there, labelled; or the first name with an error."""
        for stem in stems:
            if files := self._files.get(stem):
                if len(files) > 1:
                    names = " and ".join(file.path for file in sorted(files)[:2])
                    return Found(stem, 0, 0, label, start, end, f"found twice, as {names}: keep one of them")
                return files[0]._replace(label=label, start=start, end=end)
        names = " and ".join(f"{stem}.*" for stem in stems)
        return Found(stems[0], 0, 0, label, start, end, f"{MISSING}: looked for {names} below {self._root}")
