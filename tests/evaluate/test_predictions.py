"""The dump of a test and its scores, which a slow loop in plain Python counts again."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rich.console import Console

from bevt.config import UserError
from bevt.data import DataError
from bevt.evaluate.predictions import METADATA, Predictions, merge
from bevt.evaluate.scores import ClassScore, confusion, per_class, scores, table

WITHOUT = "needs pyarrow: pip install pyarrow"


def made(n: int = 7, clips: int = 2, crops: int = 3, k: int = 8, labels: Any = None, seed: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    outputs = random.dirichlet(np.ones(k), (n, clips, crops)).astype(np.float32)
    labels = random.integers(-1, k, n) if labels is None else np.array(labels, np.int64)
    names = tuple(f"/data/{i}.mp4" for i in range(n))
    return Predictions(names, labels, outputs, tuple(f"class {i}" for i in range(k)), {"recipe": "ssv2"})


def of(outputs: list[list[float]], labels: list[int], classes: tuple[str, ...] | None = None) -> Predictions:
    """One view a file."""
    array = np.array(outputs, np.float32)[:, None, None]
    names = classes or tuple("abcdefghij"[: array.shape[-1]])
    return Predictions(tuple(map(str, range(len(labels)))), np.array(labels), array, names, {})


def same(left: Predictions, right: Predictions) -> bool:
    assert left.probabilities.dtype == right.probabilities.dtype
    arrays_alike = all(
        getattr(left, name).tobytes() == getattr(right, name).tobytes() for name in ("labels", "probabilities")
    )
    rest_alike = (left.files, left.classes, left.about) == (right.files, right.classes, right.about)
    return arrays_alike and rest_alike and left.probabilities.shape == right.probabilities.shape


@st.composite
def any_predictions(draw: st.DrawFn) -> Predictions:
    """Few levels, eighths, which are exact in every sum: ties are frequent."""
    n, k = draw(st.integers(1, 12)), draw(st.integers(2, 9))
    shape = n, draw(st.integers(1, 2)), draw(st.integers(1, 2)), k
    outputs = draw(arrays(np.float32, shape, elements=st.integers(0, 8).map(lambda eighths: eighths / 8)))
    labels = draw(arrays(np.int64, n, elements=st.integers(-1, k - 1)))
    labels[0] = max(labels[0], 0)
    return Predictions(tuple(map(str, range(n))), labels, outputs, tuple("abcdefghi"[:k]), {})


@settings(max_examples=60, deadline=None)
@given(any_predictions())
def test_scores_are_those_of_a_slow_loop(predictions: Predictions) -> None:
    k = len(predictions.classes)
    right: dict[int, list[bool]] = {}
    top5, pairs = [], np.zeros((k, k), int)
    for label, views in zip(predictions.labels.tolist(), predictions.probabilities.tolist()):
        if label < 0:
            continue
        flat = [view for clip in views for view in clip]
        means = [sum(view[i] for view in flat) / len(flat) for i in range(k)]
        order = sorted(range(k), key=lambda i: (-means[i], i))
        right.setdefault(label, []).append(order[0] == label)
        top5.append(label in order[:5])
        pairs[label, order[0]] += 1
    found = scores(predictions)
    every = [one for of_class in right.values() for one in of_class]
    assert found.top1 == pytest.approx(sum(every) / len(every))
    assert found.top5 == (pytest.approx(sum(top5) / len(top5)) if k > 5 else None)
    assert found.mean_class == pytest.approx(sum(sum(r) / len(r) for r in right.values()) / len(right))
    assert (found.files, found.unlabelled) == (len(every), len(predictions.files) - len(every))
    assert found.missing == tuple(name for i, name in enumerate(predictions.classes) if i not in right)
    np.testing.assert_array_equal(confusion(predictions), pairs)


def test_views_are_averaged_after_the_softmax() -> None:
    """Two weak votes for b lose against a sure one for a."""
    outputs = np.array([[[[1, 0], [0.4, 0.6], [0.4, 0.6]]]], np.float32)
    predictions = Predictions(("0",), np.array([0]), outputs, ("a", "b"), {})
    np.testing.assert_allclose(predictions.video_level(), [[0.6, 0.4]], rtol=1e-7)
    assert predictions.video_level().dtype == np.float64
    assert scores(predictions).top1 == 1


def test_of_equal_probabilities_the_lower_class_comes_first() -> None:
    predictions = of([[1 / 8] * 8] * 4, [0, 4, 5, 7])
    found = scores(predictions)
    assert (found.top1, found.top5) == (0.25, 0.5)
    assert confusion(predictions)[:, 0].tolist() == [1, 0, 0, 0, 1, 1, 0, 1]


def test_rows_of_classes_name_the_wrong_answer_and_begin_with_the_worst() -> None:
    a, b, c = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    predictions = of([a, a, b, b, c, c, a, c], [0, 0, 1, 1, 1, 1, 1, -1])
    assert per_class(predictions) == [ClassScore("b", 5, 0.4, "c", 0.4), ClassScore("a", 2, 1.0, "", 0.0)]


def test_table_shows_names_with_brackets() -> None:
    """As rich's markup, `[something]` would be gone."""
    rows = per_class(of([[0, 1], [1, 0]], [0, 0], ("Pushing [something]", "Lifting [bold]")))
    console = Console(width=100)
    with console.capture() as text:
        console.print(table(rows))
    assert re.search(r"Pushing \[something\] +2 +50.0 % +Lifting \[bold\] +50.0 %", text.get())


def test_scores_as_text() -> None:
    text = str(scores(made(k=24, n=4, labels=[0, 1, 2, -1])))
    assert re.search(r"^top-1 .* %, top-5 .* %, mean of the classes .* %, of 3 files\n1 files have no label", text)
    assert text.endswith("21 classes have no file: " + ", ".join(f"class {i}" for i in range(3, 13)) + " and 11 more")
    assert "top-5" not in str(scores(made(k=5)))


@pytest.mark.parametrize("score", [scores, per_class, confusion])
def test_files_without_any_label_cannot_be_scored(score: Any) -> None:
    with pytest.raises(DataError, match="none of the 7 files has a label"):
        score(made(labels=[-1] * 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ("a", "a")}, "files has a more than once"),
        ({"labels": np.array([0, 1, 2])}, r"labels must be \(2,\) int64, got \(3,\)"),
        ({"labels": np.array([0, 1], np.int32)}, "labels must be .* int32"),
        ({"labels": np.array([0, 4])}, "labels must be -1 .* to 3, got 4"),
        ({"labels": np.array([-2, 0])}, "labels must be -1 .* to 3, got -2"),
        ({"classes": ("a", "b", "c")}, r"probabilities must be \(2, clips, crops, 3\)"),
        ({"probabilities": np.zeros((2, 3, 4), np.float32)}, r"probabilities must be .* got \(2, 3, 4\)"),
        ({"probabilities": np.zeros((2, 0, 1, 4), np.float32)}, "probabilities must be .* at least one view"),
        ({"probabilities": np.zeros((2, 1, 1, 4))}, "probabilities must be .* float64"),
        ({"probabilities": np.array([[[[0.0] * 4]], [[[np.nan] * 4]]], np.float32)}, "1.mp4 are NaN or beyond"),
        ({"probabilities": np.array([[[[0.0] * 4]], [[[-3.0] * 4]]], np.float32)}, "1.mp4 are NaN or beyond"),
        ({"probabilities": np.array([[[[5.0] * 4]], [[[0.0] * 4]]], np.float32)}, "0.mp4 are NaN or beyond"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(made(n=2, k=4, labels=[0, 1]), **change)


def part(whole: Predictions, rank: int, world: int) -> Predictions:
    own = slice(rank, None, world)
    return replace(
        whole, files=whole.files[own], labels=whole.labels[own], probabilities=whole.probabilities[own].copy()
    )


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_parts_become_the_whole_in_its_order(world: int) -> None:
    whole = made()
    parts = [part(whole, rank, world) for rank in reversed(range(world))]
    assert same(merge(parts, whole.files), whole)


@pytest.mark.parametrize(
    ("ranks", "extra", "message"),
    [
        ([0, 1], 0, "2 files are in no part, such as /data/2.mp4"),
        ([0, 1, 2], 1, "1 files are in no part, such as unseen"),
        ([0, 1, 1, 2], 0, "2 files are in several parts, such as /data/1.mp4"),
        ([0, 1, 2], -1, "1 files are not among those of the test, such as /data/6.mp4"),
    ],
)
def test_a_file_that_is_not_in_exactly_one_part_is_named(ranks: list[int], extra: int, message: str) -> None:
    whole = made()
    files = (*whole.files, "unseen")[: 7 + extra]
    with pytest.raises(ValueError, match=message):
        merge([part(whole, rank, 3) for rank in ranks], files)


def test_parts_of_different_tests_are_refused() -> None:
    whole = made()
    other = replace(part(whole, 1, 2), classes=tuple("abcdefgh"))
    with pytest.raises(ValueError, match="differ in classes or views"):
        merge([part(whole, 0, 2), other], whole.files)


@settings(max_examples=20, deadline=None)
@given(any_predictions(), st.dictionaries(st.text(), st.text(), max_size=3))
def test_a_dump_is_read_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory, predictions: Predictions, about: dict[str, str]
) -> None:
    pytest.importorskip("pyarrow", reason=WITHOUT)
    path = tmp_path_factory.mktemp("dump") / "new" / "test.parquet"
    predictions = replace(predictions, about=about)
    predictions.save(path)
    assert same(Predictions.load(path), predictions)
    assert [file.name for file in path.parent.iterdir()] == ["test.parquet"]


def test_others_can_read_a_dump(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason=WITHOUT)
    predictions = made()
    predictions.save(tmp_path / "test.parquet")
    rows = parquet.read_table(tmp_path / "test.parquet").to_pylist()
    assert len(rows) == 7 * 2 * 3
    row = rows[3 * 6 + 1 * 3 + 2]
    assert (row["file"], row["label"]) == (predictions.files[3], predictions.labels[3])
    assert (row["clip"], row["crop"]) == (1, 2)
    assert row["probabilities"] == predictions.probabilities[3, 1, 2].tolist()


def test_a_name_that_is_not_unicode_does_not_lose_a_test(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason=WITHOUT)
    predictions = made(n=1)
    replace(predictions, files=(b"caf\xe9.mp4".decode("utf-8", "surrogateescape"),)).save(tmp_path / "test.parquet")
    assert Predictions.load(tmp_path / "test.parquet").files == (r"caf\udce9.mp4",)


PEAK = """
import pathlib, re, sys
import pyarrow.parquet
from bevt.evaluate.predictions import Predictions

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
array = Predictions.load(pathlib.Path(sys.argv[1])).probabilities
print((peak() - before) / array.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: the peak is read in /proc")
def test_reading_takes_less_than_twice_the_array(tmp_path: Path) -> None:
    """240 MB of probabilities, in a process of its own: 1.4 times; in one row group, which is read whole, 2.4 times."""
    pytest.importorskip("pyarrow", reason=WITHOUT)
    outputs = np.random.default_rng(0).random((5000, 4, 3, 1000), np.float32)
    names = tuple(map(str, range(5000)))
    Predictions(names, np.zeros(5000, np.int64), outputs, names[:1000], {}).save(tmp_path / "test.parquet")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "test.parquet")]
    assert 1 < float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 2


def test_rows_in_another_order_are_the_same_dump(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason=WITHOUT)
    predictions = made()
    predictions.save(tmp_path / "test.parquet")
    rows = parquet.read_table(tmp_path / "test.parquet")
    order = np.random.default_rng(0).permutation(len(rows))
    order = np.concatenate([[0, *range(6, 42, 6)], order[order % 6 != 0]])  # the files stay in order
    parquet.write_table(rows.take(order), tmp_path / "test.parquet")
    assert same(Predictions.load(tmp_path / "test.parquet"), predictions)


def without_metadata(rows: Any) -> Any:
    return rows.replace_schema_metadata(None)


def without_shape(rows: Any) -> Any:
    return rows.replace_schema_metadata({METADATA: json.dumps({"classes": []})})


def with_value(column: str, value: Any) -> Any:
    """A change of one column of the second row."""

    def change(rows: Any) -> Any:
        import pyarrow

        values = rows[column].to_pylist()
        values[1] = value
        field = rows.schema.field(column)
        index = rows.schema.get_field_index(column)
        return rows.set_column(index, field, pyarrow.array(values, field.type))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_metadata, "not what `bevt test` wrote: a parquet file without its metadata"),
        (without_shape, "not what `bevt test` wrote: 'shape'"),
        (lambda rows: rows.drop_columns(["crop"]), "its columns have other names or types"),
        (lambda rows: rows.slice(0, 36), "it has 6 files of 7"),
        (lambda rows: rows.slice(1), r"of the 2 x 3 views of /data/0.mp4 some are missing or there twice"),
        (with_value("crop", 0), "views of /data/0.mp4 some are missing or there twice"),
        (with_value("clip", 2), "views beyond 2 clips and 3 crops"),
        (with_value("crop", -1), "views beyond 2 clips and 3 crops"),
        (with_value("label", 7), "/data/0.mp4 has several labels"),
        (with_value("probabilities", [float("nan")] * 8), "/data/0.mp4 are NaN or beyond"),
    ],
)
def test_a_parquet_file_that_is_no_whole_dump_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason=WITHOUT)
    path = tmp_path / "test.parquet"
    made(labels=range(7)).save(path)
    parquet.write_table(change(parquet.read_table(path)), path)
    with pytest.raises(DataError, match=message) as error:
        Predictions.load(path)
    assert str(path) in str(error.value)


def test_what_is_no_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason=WITHOUT)
    with pytest.raises(DataError, match=r"no predictions .*nowhere\.parquet: name the"):
        Predictions.load(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n" * 10)
    with pytest.raises(DataError, match=r"text\.parquet cannot be read as parquet"):
        Predictions.load(tmp_path / "text.parquet")


def test_a_flipped_bit_of_a_probability_is_noticed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason=WITHOUT)
    path, predictions = tmp_path / "test.parquet", made(n=100)
    predictions.save(path)
    content = bytearray(path.read_bytes())
    needle = predictions.probabilities[50, 0, 0].tobytes()
    content[content.index(needle) + 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        Predictions.load(path)


def test_a_full_disk_leaves_the_dump_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason=WITHOUT)
    path, before = tmp_path / "test.parquet", made()
    before.save(path)

    def full(table: Any, where: Path, **_: Any) -> None:
        where.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(DataError, match=r"test\.parquet cannot be written .*No space left"):
        made(seed=1).save(path)
    assert same(Predictions.load(path), before)
    assert [file.name for file in tmp_path.iterdir()] == ["test.parquet"]


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason=WITHOUT)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"test\.parquet cannot be written"):
        made().save(tmp_path / "file" / "test.parquet")


@pytest.mark.parametrize("work", [lambda path: made().save(path), Predictions.load], ids=["save", "load"])
def test_without_pyarrow_the_error_says_how_to_get_it(
    work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'bevt\[parquet\]'"):
        work(tmp_path / "test.parquet")
