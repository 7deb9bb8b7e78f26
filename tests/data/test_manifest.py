"""Indexing: what is remembered, what is done again, and what it costs where there are many files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bevt.config import DataConfig
from bevt.data import DataError, manifest, probe
from bevt.data.entry import Entry, Kind
from bevt.data.manifest import Manifest, index, open_source
from bevt.data.sampling import Sampler

pytest.importorskip("av", reason="PyAV is not installed: pip install av")


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
    real = probe.probe

    def spy(root: str, kind: Kind, entry: Entry) -> Entry:
        probed.append(entry.path)
        return real(root, kind, entry)

    monkeypatch.setattr(manifest, "probe", spy)
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
    real = probe.probe

    def crash(root: str, kind: Kind, entry: Entry) -> Entry:
        if entry.path == "0001.webm":
            raise KeyboardInterrupt
        return real(root, kind, entry)

    monkeypatch.setattr(manifest, "probe", crash)
    with pytest.raises(KeyboardInterrupt):
        index(str(clips), "clips", cache=cache)
    with open(f"{cache}.partial3", "a") as file:
        file.write('{"path": "00')

    def only_the_rest(root: str, kind: Kind, entry: Entry) -> Entry:
        assert entry.path == "0001.webm"
        return real(root, kind, entry)

    monkeypatch.setattr(manifest, "probe", only_the_rest)
    assert [entry.error for entry in index(str(clips), "clips", cache=cache).entries] == [None, None]
    assert not Path(f"{cache}.partial3").exists()


def test_unwritable_folder_uses_the_user_cache(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says where, once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert open_source(str(clips), "clips") == open_source(str(clips), "clips")
    (kept,) = (tmp_path / "cache" / "bevt").glob("manifest_clips_*.jsonl")
    assert caplog.text.count(f"its manifest is kept in {kept}") == 1
    assert not (clips / ".bevt_manifest_clips.jsonl").exists()


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


@pytest.fixture
def made() -> Manifest:
    """Three thousand entries, two of them unreadable, one with every field, without files."""
    common = dict(label="ä", width=340, height=256, frames=300, keys=((0, 0), (12, 6)), pixel_format="yuv420p")
    entries = [
        Entry(f"ä/{i:05}.mp4", 100 + i, 10**18 + i, format=("h264", "vp9")[i % 2], **common)  # type: ignore[arg-type]
        for i in range(3000)
    ]
    entries[7] = replace(entries[7], error="cut off")
    entries[8] = replace(entries[8], shard="a.tar", offset=512, start=3, end=9, timing=(-2, 512.5), turns=3)
    entries[2999] = replace(entries[2999], error="not a video")
    return Manifest("clips", "/videos", tuple(entries), "listing", {"a.tar": [1, 2, None]})


def test_a_loaded_manifest_is_the_one_that_was_saved(made: Manifest, tmp_path: Path) -> None:
    """Entries by number, from the end, by slice and in turn; what the header holds; and equality both ways."""
    made.save(tmp_path / "m.jsonl")
    loaded = Manifest.load(tmp_path / "m.jsonl")
    assert loaded == made
    assert made == loaded
    assert (loaded.listing, loaded.shards) == (made.listing, made.shards)
    assert (len(loaded.entries), loaded.entries[8], loaded.entries[-1]) == (3000, made.entries[8], made.entries[-1])
    assert loaded.entries[np.int64(5)] == made.entries[5]
    assert loaded.entries[5:11:2] == made.entries[5:11:2]
    with pytest.raises(IndexError):
        loaded.entries[3000]
    assert loaded.unreadable.tolist() == made.unreadable.tolist() == [7, 2999]
    assert loaded.formats == made.formats == (("h264", "yuv420p"), ("vp9", "yuv420p"))
    assert loaded != replace(made, entries=(*made.entries[:5], replace(made.entries[5], bytes=0), *made.entries[6:]))
    assert loaded != replace(made, entries=made.entries[:-1])


def test_the_fingerprint_never_changes(made: Manifest, tmp_path: Path) -> None:
    """Saved runs are resumed by it: names and sizes, each ended by a zero byte; where there are any, ranges too."""
    ranges = {entry.path: f"{entry.start}\0{entry.end}\0" for entry in made.entries if entry.end}
    assert ranges
    names = "".join(f"{entry.path}\0{entry.bytes}\0{ranges.get(entry.path, '')}" for entry in made.entries)
    expected = hashlib.sha256(names.encode()).hexdigest()[:16]
    made.save(tmp_path / "m.jsonl")
    assert made.fingerprint() == Manifest.load(tmp_path / "m.jsonl").fingerprint() == expected


def test_loading_parses_no_entry(made: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a sampler, before its first request, nor what a resumed run compares."""
    made.save(tmp_path / "m.jsonl")
    parsed: list[bytes] = []
    real = manifest.parse

    def spy(line: bytes) -> Entry:
        parsed.append(line)
        return real(line)

    monkeypatch.setattr(manifest, "parse", spy)
    loaded = Manifest.load(tmp_path / "m.jsonl")
    sampler = Sampler(loaded, DataConfig(), "clips", 0)
    assert (len(sampler), sampler.readable, len(loaded.fingerprint())) == (3000, 2998, 16)
    assert parsed == []
    sampler.request(0)
    assert len(parsed) == 1


@pytest.mark.parametrize("harm", ["cut", "edit", "drop", "kind", "root"])
def test_a_manifest_that_was_tampered_with(made: Manifest, tmp_path: Path, harm: str) -> None:
    """Cut inside a line, one digit changed, a line taken out, a header that says another kind or folder: an error that
    says what to do.
    """
    path = tmp_path / "m.jsonl"
    made.save(path)
    lines = path.read_bytes().splitlines(keepends=True)
    if harm == "cut":
        lines[-1] = lines[-1][:20]
    elif harm == "edit":
        lines[9] = lines[9].replace(b"300", b"301")
    elif harm == "drop":
        del lines[9]
    else:
        key = harm.encode()
        lines[0] = re.sub(b'"' + key + b'": "[^"]*"', b'"' + key + b'": "images"', lines[0])
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"m\.jsonl is cut off, or was edited.*index the files again"):
        Manifest.load(path)


def test_a_manifest_of_version_1(clips: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Named explicitly it is an error; one that was kept for a folder is made anew, and the log says so."""
    old = clips / ".bevt_manifest_clips.jsonl"
    old.write_text(json.dumps({"bevt_manifest": 1, "kind": "clips", "root": "."}) + "\n")
    with pytest.raises(DataError, match="version 1, not 3: index the files again"):
        open_source(str(old), "clips")
    assert len(open_source(str(clips), "clips").entries) == 2
    assert "version 1, not 3: index the files again; the files are probed again" in caplog.text
    assert Manifest.load(old).unreadable.tolist() == []


def test_a_folder_where_the_manifest_goes(clips: Path) -> None:
    """Said before anything is probed."""
    for name in ("m.jsonl", "m.jsonl.partial3"):
        (clips / name).mkdir()
        with pytest.raises(
            DataError, match=rf"{name} cannot be written, a folder lies there: remove it, or name another"
        ):
            index(str(clips), "clips", cache=clips / "m.jsonl")
        (clips / name).rmdir()


def test_a_manifest_that_is_hostile_json(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"m\.jsonl is not a manifest written by"):
        Manifest.load(tmp_path / "m.jsonl")


def test_a_disk_that_takes_no_manifest(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found is kept, and not looked at again."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", full)
        with pytest.raises(DataError, match=r"m\.jsonl cannot be written \(No space .*: make room .* is kept"):
            index(str(clips), "clips", cache=clips / "m.jsonl", workers=1)
    monkeypatch.setattr(manifest, "probe", full)
    assert len(index(str(clips), "clips", cache=clips / "m.jsonl", workers=1).entries) == 2


def test_a_disk_that_takes_no_more_lines(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are limited to the size of one line: the second is refused, the first is kept."""
    with monkeypatch.context() as patch:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        real, lines = manifest.dump, []

        def dump(entry: Entry) -> bytes:
            lines.append(real(entry))
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(lines[0]), limits[1]))
            return lines[-1]

        patch.setattr(manifest, "dump", dump)
        try:
            with pytest.raises(
                DataError, match=r"m\.jsonl\.partial3 cannot be written \(File too large\): make .* the work on 1 of 2"
            ):
                index(str(clips), "clips", cache=clips / "m.jsonl", workers=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    probed: list[str] = []
    real_probe = probe.probe
    monkeypatch.setattr(manifest, "probe", lambda *asked: probed.append(asked[2].path) or real_probe(*asked))
    assert len(index(str(clips), "clips", cache=clips / "m.jsonl", workers=1).entries) == 2
    assert len(probed) == 1


def test_an_unchanged_folder_is_only_listed(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No entry is parsed, nothing probed, nothing written."""
    cache = clips / "m.jsonl"
    first = index(str(clips), "clips", cache=cache)
    written = cache.stat().st_mtime_ns

    def forbidden(*_: object) -> None:
        raise AssertionError("an entry was parsed or probed")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "parse", forbidden)
        patch.setattr(manifest, "probe", forbidden)
        again = index(str(clips), "clips", cache=cache)
    assert again == first
    assert cache.stat().st_mtime_ns == written


def test_a_hundred_thousand_entries_load_in_a_second(tmp_path: Path) -> None:
    """The fastest of three loads, of videos with four key frames; it takes 0.05 s on an idle core."""
    keys = ((0, 0), (90, 46080), (180, 92160), (270, 138240))
    entries = tuple(
        Entry(f"cats/{i:06}.mp4", 2 * 10**6 + i, 10**18 + i, label="cats", width=340, height=256, frames=300, keys=keys)
        for i in range(100_000)
    )
    Manifest("clips", "/videos", entries).save(tmp_path / "m.jsonl")
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        loaded = Manifest.load(tmp_path / "m.jsonl")
        seconds.append(time.perf_counter() - begin)
    assert loaded.entries[99_999] == entries[-1]
    assert min(seconds) < 1
