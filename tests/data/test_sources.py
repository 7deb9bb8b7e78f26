"""What files a folder, a list, an annotation file or a tar archive names."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bevt.data import DataError, manifest, shapes
from bevt.data.entry import Entry
from bevt.data.manifest import Manifest, index, open_source
from bevt.data.sources import find, guess_kind

KINETICS = "label,youtube_id,time_start,time_end,split,is_cc"


def _rows(source: Path) -> list[tuple[str, str | int | None, str | None]]:
    """(path, label, error) of every file."""
    return [(found.path, found.label, found.error) for found in find(str(source), "clips")[1]]


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.mark.parametrize("separator", [" ", ",", "\t", " , "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_list(tmp_path: Path, separator: str, end: str) -> None:
    """`path label` lines, relative to the list's folder; a file that is not there has an error that says where."""
    _touch(tmp_path, "clips/a.mp4", "clips/my clip, 2.mp4", "clips/ü 雪.mp4", "clips/no label.mp4")
    names = ("clips/a.mp4", "clips/my clip, 2.mp4", "clips/ü 雪.mp4", "clips/gone.mp4")
    lines = [f"{name}{separator}{7 + i}" for i, name in enumerate(names)]
    listing = tmp_path / "train.txt"
    listing.write_bytes(("\ufeff" + end.join([*lines, "", "clips/no label.mp4", lines[0]])).encode())
    assert _rows(listing) == [
        ("clips/a.mp4", 7, None),
        ("clips/gone.mp4", 10, f"not there: looked for {tmp_path}/clips/gone.mp4"),
        ("clips/my clip, 2.mp4", 8, None),
        ("clips/no label.mp4", None, None),
        ("clips/ü 雪.mp4", 9, None),
    ]


def test_list_with_quotes(tmp_path: Path) -> None:
    """As spreadsheets write names with commas and quotes."""
    _touch(tmp_path, 'a, "b".mp4')
    (tmp_path / "train.csv").write_text('"a, ""b"".mp4",3\n')
    assert _rows(tmp_path / "train.csv") == [('a, "b".mp4', 3, None)]


def test_a_first_line_without_its_file_is_no_header(tmp_path: Path) -> None:
    """A label makes it a row like any other."""
    (tmp_path / "train.txt").write_text("some video 120 3\n")
    assert _rows(tmp_path / "train.txt") == [
        ("some video 120", 3, f"not there: looked for {tmp_path / 'some video 120'}")
    ]


def test_a_video_in_place_of_a_list(tmp_path: Path) -> None:
    """Its first bytes tell: 4 GB are not read for it."""
    with open(tmp_path / "a.mp4", "wb") as file:
        file.truncate(1 << 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"a\.mp4 is neither a folder"):
        find(str(tmp_path / "a.mp4"), "clips")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


def test_list_with_two_labels_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.mp4 1\nb.mp4 1\n\na.mp4 2\n")
    with pytest.raises(DataError, match=r"train\.txt gives a\.mp4 two labels: 1 \(line 1\) and 2 \(line 4\)"):
        find(str(tmp_path / "train.txt"), "clips")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a.mp4 1\n ,3\n", r"a\.txt, line 2: ',3' is not `path label`"),
        ("a.txt", '"a.mp4" "b.mp4" 3', r"a\.txt, line 1: .* is not `path label`"),
        ("a.txt", "a.mp4 1\nb c.webm 1.5\n", r"a\.txt, line 2: the label '1\.5' is not a whole number"),
        (
            "a.txt",
            "a.mp4 120 5\n",
            r"a\.txt, line 1: 'a\.mp4 120 5' is not `path label`: a file and a whole number, with",
        ),
        ("a.txt", "a.mp4;5\n", r"a\.txt, line 1: 'a\.mp4;5' is not `path label`"),
        ("a.txt", "a.mp4,cat\n", r"a\.txt, line 1: the label 'cat' is not a whole number"),
        ("a.txt", "s.tar\t1?\n", r"a\.txt, line 1: the label '1\?' is not a whole number"),
        ("a.txt", f"a.jpg {'1' * 26}\n", r"a\.txt, line 1: the label '1{26}' is not a whole number of at most 18"),
        ("a.csv", "path,label\na.mp4,1\n", r"a\.csv, line 1: 'path,label' is not `path label` .* a header, delete it"),
        ("a.txt", "\n \n", r"the list .*a\.txt is empty"),
        ("a.csv", "label,youtube_id,split\n", r"a\.csv, line 1: no column time_start; the header of a Kinetics csv is"),
        (
            "a.csv",
            f"{KINETICS}\nrun,abc,1,11,train,0\nrun,abc,x,11,train,0\n",
            r"a\.csv, line 3: 'run,abc,x,11,train,0'",
        ),
        (
            "a.csv",
            f'{KINETICS}\n"run,abc,1,11,train,0\n',
            r"a\.csv, line 2: 'run,abc,1,11,train,0\\n' is not label,you",
        ),
        ("a.csv", f"{KINETICS}\nrun,abc,1,11,train\n", r"a\.csv, line 2: .* is not label,youtube_id,time_start"),
        ("a.json", '[\n{"id": "1"},\n', r"a\.json is not JSON, line 3"),
        ("a.json", '{"1": 2}', r"a\.json is not a list of videos: SSv2 has"),
        ("a.json", '[{"id": "1"}, {"name": 1}]', r"a\.json, item 2: .* neither the `id` of SSv2 nor the `vid_name`"),
        ("a.json", '[{"id": "1", "template": "X [y]"}]', r"neither labels\.json nor something-.* lies beside it"),
        (
            "a.json",
            '[{"vid_name": "a", "label": 1, "start_frame": 5, "end_frame": 5}]',
            r"item 1: .* `end_frame` above",
        ),
        ("a.json", '[{"vid_name": "a", "label": "x", "start_frame": 0, "end_frame": 5}]', r"item 1: .* whole numbers"),
        ("a.bin", "\x00\x01", "neither a folder, a tar archive"),
    ],
)
def test_malformed_sources(tmp_path: Path, name: str, content: str, message: str) -> None:
    """File, line and what was expected."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        find(str(tmp_path / name), "clips")


def test_kinetics(tmp_path: Path) -> None:
    """Both ways of naming files, at any depth; quoted labels; what is missing or ambiguous is an error of its entry."""
    _touch(tmp_path, "v/swim, fast/-abc_000010_000020.mp4", "v/x y/def.webm", "v/1/two.mp4", "v/2/two.mkv", "other.mp4")
    rows = ['"swim, fast",-abc,10,20,train,0', "it's,def,1,11,train,1", "run,gone,0,10,train,0", "run,two,0,10,train,0"]
    (tmp_path / "train.csv").write_bytes(("\ufeff" + "\r\n".join([KINETICS, *rows, ""])).encode())
    assert _rows(tmp_path / "train.csv") == [
        ("gone_000000_000010", "run", f"not there: looked for gone_000000_000010.* and gone.* below {tmp_path}"),
        ("two", "run", "found twice, as v/1/two.mp4 and v/2/two.mkv: keep one of them"),
        ("v/swim, fast/-abc_000010_000020.mp4", "swim, fast", None),
        ("v/x y/def.webm", "it's", None),
    ]
    assert guess_kind(str(tmp_path / "train.csv")) == "clips"
    with pytest.raises(DataError, match=r"train\.csv lists videos, not images"):
        find(str(tmp_path / "train.csv"), "images")


def test_kinetics_test_set(tmp_path: Path) -> None:
    """No labels, as they are held out."""
    _touch(tmp_path, "abc_000010_000020.mp4")
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\nabc,10,20,test\n")
    assert _rows(tmp_path / "test.csv") == [("abc_000010_000020.mp4", None, None)]


@pytest.mark.parametrize("labels", ["labels.json", "something-something-v2-labels.json"])
def test_something_something(tmp_path: Path, labels: str) -> None:
    """Numbers of the templates without brackets."""
    _touch(tmp_path, "videos/7.webm", "videos/8.mp4")
    (tmp_path / labels).write_text(json.dumps({"Holding something": "0", "Putting something, somewhere": "41"}))
    rows = [
        {"id": "7", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
        {"id": 8, "label": "putting it there", "template": "Putting [something], [somewhere]"},
        {"id": "9", "label": "holding a pen", "template": "Holding [something]"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert _rows(tmp_path / "train.json") == [
        ("9", 0, f"not there: looked for 9.* below {tmp_path}"),
        ("videos/7.webm", 0, None),
        ("videos/8.mp4", 41, None),
    ]
    rows[1]["template"] = "Throwing [something]"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"item 2: the template 'Throwing something' is not among the labels"):
        find(str(tmp_path / "train.json"), "clips")


def test_something_something_test_set(tmp_path: Path) -> None:
    """Ids alone need no labels file."""
    _touch(tmp_path, "7.webm")
    (tmp_path / "test.json").write_text('[{"id": "7"}]')
    assert _rows(tmp_path / "test.json") == [("7.webm", None, None)]
    assert guess_kind(str(tmp_path / "test.json")) == "clips"


def test_diving48(dataset: shapes.ShapesPaths, tmp_path: Path) -> None:
    """Ranges of frames, end exclusive; one that lies outside its file (40 frames) is that entry's error."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    (tmp_path / "rgb").mkdir()
    for name in ("0000.mp4", "0002.mp4"):
        shutil.copy(Path(dataset.train_clips) / name, tmp_path / "rgb")
    rows = [("0000", 3, 5, 25), ("0000", 3, 25, 40), ("0002", 4, 0, 41), ("0002", 4, 40, 41), ("0004", 5, 0, 9)]
    keys = ("vid_name", "label", "start_frame", "end_frame")
    (tmp_path / "V2_train.json").write_text(json.dumps([dict(zip(keys, row)) for row in rows]))
    found = index(str(tmp_path / "V2_train.json"), "clips", workers=1).entries
    assert [(entry.path, entry.label, entry.start, entry.end, entry.error) for entry in found] == [
        ("0004", 5, 0, 9, f"not there: looked for 0004.* below {tmp_path}"),
        ("rgb/0000.mp4", 3, 5, 25, None),
        ("rgb/0000.mp4", 3, 25, 40, None),
        ("rgb/0002.mp4", 4, 0, 41, "its list says frames 0 to 41, but it has 40"),
        ("rgb/0002.mp4", 4, 40, 41, "its list says frames 40 to 41, but it has 40"),
    ]
    assert [entry.length() for entry in found[1:3]] == [20, 15]


def test_folder_with_links(tmp_path: Path) -> None:
    """Links to folders are followed, each folder once, so that a loop ends; hidden names and pipes are no files."""
    _touch(tmp_path, "in/a/1.mp4", "in/.hidden.mp4", "in/.b/2.mp4", "out/3.MP4", "in/a/notes.txt")
    (tmp_path / "in/a/loop").symlink_to(tmp_path / "in")
    for name in ("z", "linked", "m"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "out")
    (tmp_path / "in/broken.mp4").symlink_to(tmp_path / "nowhere.mp4")
    os.mkfifo(tmp_path / "in/pipe.mp4")
    assert _rows(tmp_path / "in") == [
        ("a/1.mp4", "a", None),
        ("broken.mp4", None, f"not there: looked for {tmp_path}/in/broken.mp4"),
        ("linked/3.MP4", "linked", None),
        ("pipe.mp4", None, "neither a file nor a link to one"),
    ]


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, bytes]:
    """Members of an archive: three samples, labelled by text, by json and not at all, and one whose json is torn."""
    contents = {}
    for i, name in enumerate(("a/1.jpg", "a/2.input.png", "3 ü.jpg", "a/4.jpeg")):
        stream = io.BytesIO()
        Image.effect_noise((40 + i, 30), 50).save(stream, "PNG" if name.endswith("png") else "JPEG")
        contents[name] = stream.getvalue()
    return {
        "a/1.cls": b"12\n",
        **contents,
        "a/2.json": b'{"label": "cat", "size": 3}',
        "a/4.json": b'{"label": ',
        "a/4.txt": b"a caption",
        "a/._1.jpg": b"what macOS adds",
    }


def _tar(path: Path, members: Mapping[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "much/" * 30])
def test_archive(tmp_path: Path, pictures: dict[str, bytes], layout: int, prefix: str) -> None:
    """Bytes at the places that the manifest says, labels from beside, in every tar format, long names too."""
    _tar(tmp_path / "s.tar", {prefix + name: content for name, content in pictures.items()}, format=layout)
    found = index(str(tmp_path / "s.tar"), "images", workers=1)
    inside = prefix.removeprefix("./")
    assert [(entry.path, entry.label, entry.width, entry.shard) for entry in found.entries] == [
        (f"s.tar/{inside}{name}", label, width, "s.tar")
        for name, label, width in sorted(
            (
                ("3 ü.jpg", "much" if "much" in prefix else None, 42),
                ("a/1.jpg", 12, 40),
                ("a/2.input.png", "cat", 41),
                ("a/4.jpeg", None, 43),
            )
        )
    ]
    assert [entry.path for entry in found.entries if entry.mislabelled] == [f"s.tar/{inside}a/4.jpeg"]
    for entry in found.entries:
        assert found.file(entry).read() == pictures[entry.path.removeprefix("s.tar/").removeprefix(inside)]
        assert entry.bytes == len(found.file(entry).read())


def test_links_in_an_archive_are_named(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """A member without bytes of its own is an entry with an error; links to other things, and folders, are nothing."""
    path = _tar(tmp_path / "s.tar", pictures)
    with tarfile.open(path, "a") as tar:
        for name, kind in {"a/9.jpg": "1", "b.png": "2", "c.txt": "2", "d.jpg": "5"}.items():  # hard, symbolic, folder
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind.encode(), "" if kind == "5" else "a/1.jpg"
            tar.addfile(member)
    entries = index(str(path), "images", workers=1).entries
    assert {entry.path: entry.error for entry in entries if entry.error} == dict.fromkeys(
        ("s.tar/a/9.jpg", "s.tar/b.png"),
        "a link, or another thing without bytes of its own, in the archive: pack the file itself",
    )
    assert len(entries) == 6


def test_a_list_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a.mp4 1")

    def closed(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(DataError, match=r"the list .*a\.txt cannot be opened \(Permission denied\)"):
        find(str(tmp_path / "a.txt"), "clips")


def test_archive_of_videos_beside_files(dataset: shapes.ShapesPaths, tmp_path: Path) -> None:
    """A member is probed as the file would be."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    names = ("0000.mp4", "0001.webm")
    for name in names:
        shutil.copy(Path(dataset.train_clips) / name, tmp_path)
    _tar(tmp_path / "s.tar", {f"in/{name}": (tmp_path / name).read_bytes() for name in names})
    loose_and_members = index(str(tmp_path), "clips", workers=1)
    assert [entry.path for entry in loose_and_members.entries] == [*names, *(f"s.tar/in/{name}" for name in names)]
    facts = [(entry.frames, entry.keys, entry.timing, entry.format, entry.error) for entry in loose_and_members.entries]
    assert facts[:2] == facts[2:]
    assert facts[0][0] == 40
    assert guess_kind(str(tmp_path / "s.tar")) == "clips"


def test_list_of_archives(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """A label in the list is for members without one of their own."""
    _tar(tmp_path / "0.tar", {"x.jpg": pictures["a/1.jpg"], "y.jpg": pictures["a/1.jpg"], "y.cls": b"9"})
    _tar(tmp_path / "1.tar", {"x.jpg": pictures["a/1.jpg"]})
    (tmp_path / "shards.txt").write_text("0.tar 4\n1.tar\n2.tar\n")
    found = index(str(tmp_path / "shards.txt"), "images", workers=1).entries
    assert [(entry.path, entry.label, entry.error) for entry in found] == [
        ("0.tar/x.jpg", 4, None),
        ("0.tar/y.jpg", 9, None),
        ("1.tar/x.jpg", None, None),
        ("2.tar", None, f"not there: looked for {tmp_path}/2.tar"),
    ]


@pytest.mark.parametrize("harm", ["in a member", "in a header", "at the end mark", "garbage", "no tar", "empty"])
def test_damaged_archive(tmp_path: Path, pictures: dict[str, bytes], harm: str) -> None:
    """What lies before the damage is used; the archive is named once, as an entry with an error."""
    path = _tar(tmp_path / "s.tar", {f"{i}.jpg": pictures["a/1.jpg"] for i in range(4)})
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
        last = tar.getmembers()[3]
    raw = bytearray(path.read_bytes())
    end = last.offset_data + -(-last.size // 512) * 512
    raw = {
        "in a member": raw[: third.offset_data + 100],
        "in a header": raw[: third.offset + 100],
        "at the end mark": raw[:end],
        "garbage": raw[: third.offset] + b"x" * 512 + raw[third.offset + 512 :],
        "no tar": bytearray(b"text " * 500),
        "empty": bytearray(),
    }[harm]
    path.write_bytes(raw)
    found = index(str(path), "images", workers=1).entries
    assert [entry.path for entry in found if entry.error] == ["s.tar"]
    wanted = {"at the end mark": 4, "no tar": 0, "empty": 0}.get(harm, 2)
    assert [entry.path for entry in found if not entry.error] == [f"s.tar/{i}.jpg" for i in range(wanted)]
    error = str(found[0].error)
    assert error.startswith("the file is empty" if harm == "empty" else "cut off or damaged"), error


def test_an_empty_member(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """It is not taken for what comes after it."""
    _tar(tmp_path / "s.tar", {"a.jpg": b"", "b.jpg": pictures["a/1.jpg"]})
    found = index(str(tmp_path / "s.tar"), "images", workers=1).entries
    assert [entry.error for entry in found] == ["the file is empty (0 bytes)", None]


def test_compressed_archives_are_refused(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    """By name or by content, with what to do; beside good files each is an entry with an error."""
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(__file__, "x.jpg")
    shutil.copy(tmp_path / "a.tar.gz", tmp_path / "b.tar")
    (tmp_path / "c.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    for name in ("a.tar.gz", "b.tar", "c.tar.zst"):
        with pytest.raises(DataError, match=rf"{name}: a compressed archive, .* decompress it \(gunzip, zstd -d\)"):
            open_source(str(tmp_path / name), "images")
    (tmp_path / "d.jpg").write_bytes(pictures["a/1.jpg"])
    found = index(str(tmp_path), "images", workers=1)
    assert [found.entries[number].path for number in found.unreadable] == ["a.tar.gz", "b.tar", "c.tar.zst"]


def test_archive_without_anything_of_the_kind(tmp_path: Path) -> None:
    _tar(tmp_path / "s.tar", {"a.txt": b"text"})
    with pytest.raises(DataError, match=r"no images in .*s\.tar: looked for \.jpg"):
        index(str(tmp_path / "s.tar"), "images")
    with pytest.raises(DataError, match=r"no clips or images in .*s\.tar"):
        guess_kind(str(tmp_path / "s.tar"))


def test_unchanged_archives_are_not_read_again(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second archive is read, the first is not; after a touch it is, and its members are still known."""
    _tar(tmp_path / "0.tar", {"x.jpg": pictures["a/1.jpg"], "torn.jpg": b"\xff\xd8"})
    raw = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(raw[:-9000])
    cache = tmp_path / "m.jsonl"
    first = index(str(tmp_path), "images", cache=cache, workers=1)
    read: list[str] = []
    real = manifest.members

    def spy(root: Path, archive: Any, kind: Any) -> list[Entry]:
        read.append(archive.path)
        return real(root, archive, kind)

    monkeypatch.setattr(manifest, "members", spy)
    _tar(tmp_path / "1.tar", {"y.jpg": pictures["a/1.jpg"]})
    second = index(str(tmp_path), "images", cache=cache, workers=1)
    assert read == ["1.tar"]
    assert [entry for entry in second.entries if entry.path.startswith("0.tar")] == list(first.entries)
    assert Manifest.load(cache) == second
    os.utime(tmp_path / "0.tar", ns=(1, 1))
    assert len(index(str(tmp_path), "images", cache=cache, workers=1).entries) == len(second.entries)
    assert read == ["1.tar", "0.tar"]


def test_a_link_to_itself_hides_nothing(tmp_path: Path) -> None:
    """It has an error; the files beside it are found."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"x")
    (tmp_path / "a" / "self").symlink_to("self")
    _, found = find(str(tmp_path), "images")
    assert [item.path for item in found] == ["a/self", "a/x.jpg"]
    assert str(found[0].error).startswith("cannot be opened (Too many levels")
    assert found[1].error is None


def test_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One inside is an entry with an error; the source itself is an error."""
    (tmp_path / "a").mkdir()
    (tmp_path / "x.jpg").write_bytes(b"x")
    real = os.scandir

    def refuse(path: str) -> object:
        if path == os.path.realpath(closed):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    closed = tmp_path / "a"
    _, found = find(str(tmp_path), "images")
    assert [(item.path, item.error) for item in found] == [
        ("a", "a folder that cannot be listed (Permission denied)"),
        ("x.jpg", None),
    ]
    closed = tmp_path
    with pytest.raises(DataError, match=r"the folder .* cannot be listed \(Permission denied\)"):
        find(str(tmp_path), "images")


def test_the_kind_of_an_archive_that_cannot_be_read(tmp_path: Path) -> None:
    """Something is returned, so that indexing can say what is wrong with it."""
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    assert guess_kind(str(tmp_path)) == guess_kind(str(tmp_path / "a.tar.gz")) == "clips"
    with pytest.raises(DataError, match="a compressed archive"):
        open_source(str(tmp_path), "clips")
