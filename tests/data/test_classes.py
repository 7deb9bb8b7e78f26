"""Labels of files as numbers of classes, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bevt.data import DataError
from bevt.data.classes import class_numbers, found_classes, read_classes, without_files
from bevt.data.entry import Entry
from bevt.data.manifest import Manifest


def manifest(labels: Sequence[str | int | None], **kwargs: bool) -> Manifest:
    """Videos with these labels."""
    entries = tuple(Entry(f"{i}.mp4", 1, 1, label=label, **kwargs) for i, label in enumerate(labels))  # type: ignore[arg-type]
    return Manifest("clips", "/videos", entries)


def test_numbers_are_classes_as_they_are() -> None:
    source = manifest([2, 0, 1, 2])
    assert found_classes(source, "list") == ("0", "1", "2")
    assert class_numbers(source, "list", ("0", "1", "2"), numbered=True).tolist() == [2, 0, 1, 2]


def test_names_are_classes_in_alphabetical_order() -> None:
    source = manifest(["run", "jump", "walk", "jump"])
    assert found_classes(source, "list") == ("jump", "run", "walk")
    assert class_numbers(source, "list", ("jump", "run", "walk"), numbered=False).tolist() == [1, 0, 2, 0]


def test_unreadable_files_have_classes_too() -> None:
    source = Manifest(
        "clips", "/videos", (Entry("0.mp4", 1, 1, error="cut off", label="b"), Entry("1.mp4", 1, 1, label="a"))
    )
    assert class_numbers(source, "list", found_classes(source, "list"), numbered=False).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], r"labels go up to 3, but no file has class 2; .*--head.classes"),
        ([1, 2, 3], r"no file has class 0 \(classes count from 0, not from 1\)"),
        ([0, 10**9], r"list: labels go up to 1000000000, but no file has class 1 and 999999998 more"),
        ([0, -1], r"the label -1 is below 0"),
        ([0, "run"], r"some labels are numbers, others names \('run'\)"),
        ([0, None, 1, None], r"2 of 4 files have no label, 1.mp4 the first"),
        ([0, 0], r"all files have the label '0'"),
    ],
)
def test_labels_that_make_no_classes(labels: list[str | int | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        found_classes(manifest(labels), "list")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 4, 1, 7], r"2 files have a label that is none of the 4 classes \(0 to 3\): 1.mp4 has 4"),
        (["b", "x"], r"1 files have a label that is none of the 4 classes \('a' to 'd'\): 1.mp4 has 'x'"),
        ([-1, 0], r"0.mp4 has -1"),
    ],
)
def test_labels_that_are_none_of_the_classes(labels: list[str | int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_numbers(manifest(labels), "list", ("a", "b", "c", "d"), numbered=True)


def test_a_label_in_an_archive_that_is_none() -> None:
    with pytest.raises(DataError, match="neither a number nor a text"):
        found_classes(manifest([None], mislabelled=True), "list")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "swim, fast\nrun\nwalk\n\n"),
        ("map.csv", 'id,name\n0,"swim, fast"\n1,run\n2,walk\n'),
        ("map.csv", '2,walk\n0,"swim, fast"\n1,run\n'),
        ("labels.json", json.dumps({"run": "1", "swim, fast": "0", "walk": 2})),
    ],
)
def test_files_of_names(tmp_path: Path, name: str, text: str) -> None:
    """Lists, Kinetics' map with and without its header, Something-Something's json."""
    (tmp_path / name).write_text(text)
    assert read_classes(str(tmp_path / name)) == ("swim, fast", "run", "walk")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "run\nwalk\nrun\n", "names 'run' twice"),
        ("a.csv", "0,run\n2,walk\n", "are not 0, 1, 2"),
        ("a.json", "[1]", "is not {name: number}"),
        ("a.json", '{"run": "x"}', "is not {name: number}"),
        ("a.txt", "run\n", "names 1 classes"),
        ("a.txt", "run\n\nwalk\n", "line 2 of .*a.txt is empty"),
    ],
)
def test_files_that_name_no_classes(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(str(tmp_path / name))


def test_no_file_of_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"head.classes: .*none.txt cannot be read"):
        read_classes(str(tmp_path / "none.txt"))


def test_classes_without_files_are_named() -> None:
    assert without_files(np.array([0, 2]), ("a", "b", "c", "d")) == "2 of 4 classes: 'b', 'd'"
    assert without_files(np.array([0, 1]), ("a", "b")) == ""


def test_numbers_say_nothing_where_classes_are_known_by_name() -> None:
    with pytest.raises(
        DataError, match=r"list: labels are numbers \(0\), but the classes are known by names \('a', ...\)"
    ):
        class_numbers(manifest([0, 1]), "list", ("a", "b"), numbered=False)
