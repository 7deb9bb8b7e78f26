"""What a test leaves: the softmax output of every view of every file, kept as one parquet file (the dump).

Letters: N files, K classes. Reading and writing need pyarrow, which is an extra.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bevt.config import UserError
from bevt.data import DataError

METADATA = b"bevt_predictions"
"""Key of the schema's metadata; its value is JSON: `shape`, `classes`, `about`."""
GROUP = 1 << 21
"""Probabilities of a row group, 8 MiB, of which reading holds one beside the array."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """The outputs of one test. Raises ValueError, naming the field, where they do not belong together."""

    files: tuple[str, ...]
    """(N,) names, no two alike."""
    labels: np.ndarray
    """(N,) int64 class numbers; -1: not known."""
    probabilities: np.ndarray
    """(N, clips, crops, K) float32 softmax outputs."""
    classes: tuple[str, ...]
    """(K,) names."""
    about: dict[str, str]
    """Recipe, checkpoint and whatever else a reader needs."""

    def __post_init__(self) -> None:
        n, k = len(self.files), len(self.classes)
        shape = self.probabilities.shape
        if len(set(self.files)) < n:
            raise ValueError(f"files has {Counter(self.files).most_common(1)[0][0]} more than once")
        if self.labels.shape != (n,) or self.labels.dtype != np.int64:
            raise ValueError(f"labels must be ({n},) int64, got {self.labels.shape} {self.labels.dtype}")
        if wrong := self.labels[(self.labels < -1) | (self.labels >= k)].tolist():
            raise ValueError(f"labels must be -1 (not known) to {k - 1}, got {wrong[0]}")
        if (
            len(shape) != 4
            or (shape[0], shape[3]) != (n, k)
            or 0 in shape[1:]
            or self.probabilities.dtype != np.float32
        ):
            got = f"{shape} {self.probabilities.dtype}"
            raise ValueError(f"probabilities must be ({n}, clips, crops, {k}) float32, at least one view, got {got}")
        low, high = self.probabilities.min(initial=0), self.probabilities.max(initial=1)
        if not (low >= 0 and high <= 1 + 1e-5):  # also where they are NaN; and softmax may round up
            bad = ~((self.probabilities >= 0) & (self.probabilities <= 1 + 1e-5)).all((1, 2, 3))
            raise ValueError(f"probabilities must be 0 to 1; those of {self.files[bad.argmax()]} are NaN or beyond")

    def video_level(self) -> np.ndarray:
        """(N, K) float64: the mean of each file's softmax outputs over its views."""
        return self.probabilities.mean((1, 2), dtype=np.float64)

    def save(self, path: Path) -> None:
        """Write the dump, all or nothing; its folder is made where it is missing.

        A row a view, in order: file (string), label (int64), clip, crop (int32), probabilities (K float32). What is
        not Unicode in a file's name is written as `\\udcff`. Raises UserError without pyarrow, DataError where the
        system does not write the file.
        """
        arrow, parquet = require_parquet()
        n, clips, crops, k = self.probabilities.shape
        file, clip, crop = np.unravel_index(np.arange(n * clips * crops), (n, clips, crops))
        names = arrow.array([name.encode("utf-8", "backslashreplace").decode() for name in self.files], arrow.string())
        schema = _schema(arrow, k)
        header = {"shape": self.probabilities.shape, "classes": self.classes, "about": self.about}
        columns = [
            names.take(arrow.array(file)),
            arrow.array(self.labels[file]),
            arrow.array(clip.astype(np.int32)),
            arrow.array(crop.astype(np.int32)),
            arrow.FixedSizeListArray.from_arrays(
                arrow.array(self.probabilities.reshape(-1)), type=schema.field("probabilities").type
            ),
        ]
        table = arrow.table(columns, schema.with_metadata({METADATA: json.dumps(header)}))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Only names repeat: looking for doubles among probabilities costs time and memory.
                group = max(1, GROUP // k)
                parquet.write_table(
                    table, temporary, row_group_size=group, use_dictionary=["file"], write_page_checksum=True
                )
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error}): make room there, or name another place") from error

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read a dump, its rows in any order; bit for bit what was saved.

        Raises UserError without pyarrow, DataError where there is no such file, or it is not parquet, damaged, no dump,
        or lacks files or views.
        """
        arrow, parquet = require_parquet()
        if not path.is_file():
            raise DataError(f"no predictions {path}: name the .parquet file that `bevt test` wrote")
        try:
            with parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
                return cls(*_read(arrow, file))
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read as parquet ({error}): name the file that `bevt test` wrote; a damaged one has "
                "to be made anew"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not what `bevt test` wrote: {error}") from error


def require_parquet() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; UserError where it is missing: ask before a test, not after it."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            "a dump of predictions needs pyarrow, which is not installed: pip install 'bevt[parquet]', or "
            "pip install pyarrow"
        ) from error
    return pyarrow, parquet


def merge(parts: Sequence[Predictions], files: Sequence[str]) -> Predictions:
    """The predictions of one test's processes as one, in the order of `files`: the manifest's, all that were tested.

    Who tested what does not matter (process r of W: files r, r + W, ...), nor does the order of the parts; `about` is
    the first one's. Raises ValueError where a file is in no part, in several, or not among `files`, and where the parts
    differ in classes or views.
    """
    held = Counter(name for part in parts for name in part.files)
    for what, names in (
        ("in no part", set(files) - held.keys()),
        ("in several parts", {name for name, times in held.items() if times > 1}),
        ("not among those of the test", held.keys() - set(files)),
    ):
        if names:
            raise ValueError(f"{len(names)} files are {what}, such as {min(names)}")
    first = parts[0]
    views = first.probabilities.shape[1:]
    place = {name: i for i, name in enumerate(files)}
    labels, probabilities = np.empty(len(files), np.int64), np.empty((len(files), *views), np.float32)
    for part in parts:
        if part.classes != first.classes or part.probabilities.shape[1:] != views:
            raise ValueError("the parts differ in classes or views: they are not of one test")
        places = [place[name] for name in part.files]
        labels[places], probabilities[places] = part.labels, part.probabilities
    return Predictions(tuple(files), labels, probabilities, first.classes, first.about)


def _schema(arrow: Any, k: int) -> Any:
    """Columns of a dump; none may be null."""
    element = arrow.field("element", arrow.float32(), nullable=False)
    types = {
        "file": arrow.string(),
        "label": arrow.int64(),
        "clip": arrow.int32(),
        "crop": arrow.int32(),
        "probabilities": arrow.list_(element, k),
    }
    return arrow.schema([arrow.field(name, kind, nullable=False) for name, kind in types.items()])


def _read(arrow: Any, file: Any) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, tuple[str, ...], dict[str, str]]:
    """The fields of `Predictions` out of an open parquet file; ValueError where they are not there."""
    metadata = file.schema_arrow.metadata or {}
    if METADATA not in metadata:
        raise ValueError("a parquet file without its metadata")
    header = json.loads(metadata[METADATA])
    n, clips, crops, k = header["shape"]
    if not file.schema_arrow.equals(_schema(arrow, k)):
        raise ValueError("its columns have other names or types")
    keys = file.read(columns=["file", "label", "clip", "crop"])
    names = keys["file"].combine_chunks().dictionary_encode()
    files = tuple(names.dictionary.to_pylist())
    number, label, clip, crop = (
        column.to_numpy() for column in (names.indices, keys["label"], keys["clip"], keys["crop"])
    )
    if len(files) != n:
        raise ValueError(f"it has {len(files)} files of {n}")
    if not ((clip >= 0) & (clip < clips) & (crop >= 0) & (crop < crops)).all():
        raise ValueError(f"it has views beyond {clips} clips and {crops} crops")
    row = (number * clips + clip) * crops + crop
    times = np.bincount(row, minlength=n * clips * crops).reshape(n, clips * crops)
    if (times != 1).any():
        name = files[(times != 1).any(1).argmax()]
        raise ValueError(f"of the {clips} x {crops} views of {name} some are missing or there twice")
    labels = np.empty(n, np.int64)
    labels[number] = label
    if (labels[number] != label).any():
        raise ValueError(f"{files[number[(labels[number] != label).argmax()]]} has several labels")
    probabilities = np.empty((len(row), k), np.float32)
    done = 0
    for batch in file.iter_batches(max(1, GROUP // k), columns=["probabilities"]):
        rows = row[done : done + batch.num_rows]
        probabilities[rows] = batch.column(0).flatten().to_numpy().reshape(-1, k)
        done += batch.num_rows
    return files, labels, probabilities.reshape(n, clips, crops, k), tuple(header["classes"]), header["about"]
