"""Indexing: what is in a folder, what is wrong with it, and what is remembered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from bevt.data import DataError, manifest, shapes
from bevt.data.manifest import Entry, Manifest, check, index, open_source

pytest.importorskip("av", reason="PyAV is not installed: pip install av")


@pytest.fixture
def clips(dataset: shapes.ShapesPaths, tmp_path: Path) -> Path:
    """A folder of its own with two good videos: 0000.mp4 and 0001.webm."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("0000.mp4", "0001.webm"):
        shutil.copy(Path(dataset.train_clips) / name, folder)
    return folder


def test_facts_of_the_real_clips(real_clips: Path) -> None:
    """Frames, rate, size, codec and key frames of H.264 in MP4 and MPEG-4 in AVI."""
    facts = {
        entry.path: (entry.frames, entry.fps, entry.width, entry.height, entry.format, entry.key_interval, entry.error)
        for entry in index(str(real_clips), "clips").entries
    }
    assert facts == {
        "kinetics_like_340x256_h264.mp4": (300, Fraction(30), 340, 256, "h264", 235, None),
        "ntsc_426x240_h264.mp4": (300, Fraction(30000, 1001), 426, 240, "h264", 250, None),
        "short_32_frames_h264.mp4": (32, Fraction(30), 340, 256, "h264", 32, None),
        "ucf_like_320x240_mpeg4.avi": (164, Fraction(25), 320, 240, "mpeg4", 164, None),
    }


def test_uneven_frame_times_are_found(real_clips: Path) -> None:
    """One gap of the short clip is twice the others."""
    uneven = [entry.path for entry in index(str(real_clips), "clips").entries if entry.variable_rate]
    assert uneven == ["short_32_frames_h264.mp4"]


def test_bad_videos_carry_their_reason(clips: Path, real_clips: Path) -> None:
    """Text, nothing, cut before and inside the index, a cut AVI, a cut WebM: each is an entry with an error."""
    (clips / "text.mp4").write_text("no video at all")
    (clips / "zero.mp4").touch()
    _cut(real_clips / "ntsc_426x240_h264.mp4", clips / "half.mp4", 0.5)
    _cut(real_clips / "ntsc_426x240_h264.mp4", clips / "last.mp4", 0.995)
    _cut(real_clips / "ucf_like_320x240_mpeg4.avi", clips / "half.avi", 0.5)
    _cut(clips / "0001.webm", clips / "half.webm", 0.5)
    errors = {entry.path: entry.error for entry in index(str(clips), "clips", workers=1).entries}
    assert errors.pop("0000.mp4") is None
    assert errors.pop("0001.webm") is None
    assert errors["text.mp4"] == "not a video that FFmpeg recognises"
    assert errors["zero.mp4"] == "the file is empty (0 bytes)"
    for name in ("half.mp4", "half.avi", "half.webm"):
        assert errors[name] is not None, name
        assert errors[name].startswith("cut off"), errors[name]
    assert errors["last.mp4"] is not None


def test_cut_file_with_its_index_in_front(clips: Path) -> None:
    """An MP4 laid out for streaming opens and decodes from its start though its end is missing."""
    import av

    with (
        av.open(str(clips / "0000.mp4")) as source,
        av.open(str(clips / "front.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    _cut(clips / "front.mp4", clips / "cut.mp4", 0.8)
    errors = {entry.path: entry.error for entry in index(str(clips), "clips", workers=1).entries}
    assert errors["front.mp4"] is None
    assert str(errors["cut.mp4"]).startswith("cut off")


def test_images(tmp_path: Path) -> None:
    """Upright size; a cut JPEG has a healthy header and is found by decoding."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "cat").mkdir()
    Image.effect_noise((60, 40), 50).save(tmp_path / "cat" / "turned.jpg", exif=exif)
    _cut(tmp_path / "cat" / "turned.jpg", tmp_path / "cut.jpg", 0.7)
    turned, cut = index(str(tmp_path), "images").entries
    assert (turned.path, turned.label, turned.width, turned.height, turned.format) == (
        "cat/turned.jpg",
        "cat",
        40,
        60,
        "JPEG",
    )
    assert cut.label is None
    assert str(cut.error).startswith("cannot be decoded")


def test_round_trip(clips: Path, tmp_path: Path) -> None:
    """Every field survives; a manifest inside its folder moves with it, one elsewhere keeps pointing there."""
    made = index(str(clips), "clips", workers=1)
    made.save(clips / "m.jsonl")
    made.save(tmp_path / "m.jsonl")
    assert Manifest.load(tmp_path / "m.jsonl") == made
    moved = clips.rename(tmp_path / "moved")
    loaded = Manifest.load(moved / "m.jsonl")
    assert loaded.entries == made.entries
    assert Path(loaded.locate(loaded.entries[0])).exists()


def test_unchanged_files_are_not_probed_again(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of a folder serves everything but what is new or has changed."""
    open_source(str(clips), "clips")
    assert (clips / ".bevt_manifest_clips.jsonl").exists()
    probed: list[str] = []
    real = manifest._probe

    def spy(root: str, kind: manifest.Kind, entry: Entry) -> Entry:
        probed.append(entry.path)
        return real(root, kind, entry)

    monkeypatch.setattr(manifest, "_probe", spy)
    open_source(str(clips), "clips")
    assert probed == []
    shutil.copy(clips / "0001.webm", clips / "new.webm")
    os.utime(clips / "0000.mp4", ns=(1, 1))
    assert len(open_source(str(clips), "clips").entries) == 3
    assert sorted(probed) == ["0000.mp4", "new.webm"]
    (clips / "new.webm").unlink()
    assert len(open_source(str(clips), "clips").entries) == 2


def test_interrupted_indexing_is_resumed(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was probed before a crash is not probed again; a line torn by it does no harm."""
    cache = tmp_path / "cache.jsonl"
    real = manifest._probe

    def crash(root: str, kind: manifest.Kind, entry: Entry) -> Entry:
        if entry.path == "0001.webm":
            raise KeyboardInterrupt
        return real(root, kind, entry)

    monkeypatch.setattr(manifest, "_probe", crash)
    with pytest.raises(KeyboardInterrupt):
        index(str(clips), "clips", cache=cache)
    with open(f"{cache}.partial", "a") as file:
        file.write('{"path": "00')

    def only_the_rest(root: str, kind: manifest.Kind, entry: Entry) -> Entry:
        assert entry.path == "0001.webm"
        return real(root, kind, entry)

    monkeypatch.setattr(manifest, "_probe", only_the_rest)
    assert [entry.error for entry in index(str(clips), "clips", cache=cache).entries] == [None, None]
    assert not Path(f"{cache}.partial").exists()


def test_unwritable_folder_uses_the_user_cache(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says where."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    open_source(str(clips), "clips")
    (kept,) = (tmp_path / "cache" / "bevt").glob("manifest_clips_*.jsonl")
    assert f"its manifest is kept in {kept}" in caplog.text
    assert not (clips / ".bevt_manifest_clips.jsonl").exists()


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_list_file(clips: Path, separator: str) -> None:
    """`path label` lines, relative to the list's folder; a file that is not there is an entry with an error."""
    listing = clips.parent / "train.txt"
    listing.write_text(f"clips/0001.webm{separator}7\nclips/gone.mp4{separator}3\n\nclips/0000.mp4\n")
    entries = open_source(str(listing), "clips").entries
    assert [(entry.path, entry.label, entry.error) for entry in entries] == [
        ("clips/0000.mp4", None, None),
        ("clips/0001.webm", 7, None),
        ("clips/gone.mp4", 3, "cannot be opened (No such file or directory)"),
    ]


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    """Missing, empty, all unreadable, no manifest: each says so."""
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_source(str(tmp_path / "nowhere"), "clips")
    with pytest.raises(DataError, match=r"no clips in the folder .* looked for \.mp4 \.avi"):
        open_source(str(tmp_path), "clips")
    (tmp_path / "a.mp4").write_text("text")
    with pytest.raises(DataError, match=r"none of the 1 clips .*\n  a\.mp4: not a video"):
        open_source(str(tmp_path), "clips")
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="is not a manifest"):
        open_source(str(tmp_path / "a.jsonl"), "clips")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="neither a folder"):
        open_source(str(tmp_path / "binary.bin"), "clips")


def test_unreadable_files_are_named_in_the_log(clips: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twenty of them with the reason; then how many there are."""
    for i in range(22):
        (clips / f"bad{i:02}.mp4").touch()
    open_source(str(clips), "clips")
    named = [line for line in caplog.messages if line.endswith(".mp4: the file is empty (0 bytes)")]
    assert named == [f"{clips}/bad{i:02}.mp4: the file is empty (0 bytes)" for i in range(20)]
    assert caplog.messages[20] == (
        f"{clips}: 22 of 24 files cannot be read, 2 more than are named here (see `bevt data check`)"
    )


def test_manifest_of_the_other_kind(clips: Path) -> None:
    """A manifest of videos does not serve the image stream."""
    index(str(clips), "clips", cache=clips / "m.jsonl")
    with pytest.raises(DataError, match="lists clips, not images"):
        open_source(str(clips / "m.jsonl"), "images")


def test_check_finds_each_problem(tmp_path: Path) -> None:
    """One file for each, and a healthy one that is not mentioned."""
    for name, content in (("a.mp4", b"same"), ("b.mp4", b"same"), ("c.mp4", b"else")):
        (tmp_path / name).write_bytes(content)
    good = dict(bytes=4, mtime_ns=0, width=340, height=256, frames=300, key_interval=12)
    entries = (
        Entry(path="a.mp4", **good),  # type: ignore[arg-type]
        Entry(path="b.mp4", **good),  # type: ignore[arg-type]
        Entry(path="c.mp4", **good),  # type: ignore[arg-type]
        Entry("d.mp4", 5, 0, error="not a video"),
        Entry(path="e.mp4", **{**good, "bytes": 6, "variable_rate": True}),  # type: ignore[arg-type]
        Entry(path="f.mp4", **{**good, "bytes": 7, "key_interval": 251}),  # type: ignore[arg-type]
        Entry(path="g.mp4", **{**good, "bytes": 8, "frames": 100}),  # type: ignore[arg-type]
        Entry(path="h.mp4", **{**good, "bytes": 9, "width": 341}),  # type: ignore[arg-type]
    )
    problems = check(Manifest("clips", str(tmp_path), entries), span=121)
    assert [(problem.severity, problem.path, problem.what.split(":")[0]) for problem in problems] == [
        ("error", "d.mp4", "not a video"),
        ("warning", "b.mp4", "the same bytes as a.mp4"),
        ("warning", "e.mp4", "variable frame rate"),
        ("warning", "f.mp4", "up to 251 frames between key frames"),
        ("note", "g.mp4", "100 frames, a clip spans 121"),
        ("note", "h.mp4", "odd size 341x256"),
    ]


def test_many_files_in_parallel(clips: Path) -> None:
    """Two processes find what one finds."""
    for i in range(10):
        shutil.copy(clips / "0001.webm", clips / f"copy{i}.webm")
    assert index(str(clips), "clips", workers=2) == index(str(clips), "clips", workers=1)


def test_imports_without_pyav() -> None:
    """Every module imports where PyAV is missing; reading a video then says what to install."""
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from bevt.data import augment, build, manifest, pyav, sampling, shapes\n"
        "try:\n    pyav.open_video('a.mp4')\n"
        "except manifest.DataError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "pip install av" in done.stdout


def _cut(source: Path, target: Path, share: float) -> None:
    raw = source.read_bytes()
    target.write_bytes(raw[: int(len(raw) * share)])
