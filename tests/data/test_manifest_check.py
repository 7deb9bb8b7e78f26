"""What `bevt data check` finds, and how it says it."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bevt.cli import main
from bevt.data.check import CATEGORIES, Problem, check
from bevt.data.entry import Entry
from bevt.data.manifest import Manifest, index


def _good(path: str, **differs: Any) -> Entry:
    """A healthy video, of 4 bytes unless said otherwise."""
    return Entry(path, **{"bytes": 4, "mtime_ns": 0, "width": 340, "height": 256, "frames": 300, **differs})


def _indexed(root: Path, *entries: Entry) -> Manifest:
    """The entries with their files' times; files that are not there are made, of the sizes that the entries say."""
    found = []
    for entry in entries:
        if entry.error is None:
            path = root / (entry.shard or entry.path)
            if not path.exists():
                path.write_bytes(bytes(entry.bytes))
            entry = replace(entry, mtime_ns=path.stat().st_mtime_ns)
        found.append(entry)
    return Manifest("clips", str(root), tuple(found))


def test_every_category_is_found(tmp_path: Path) -> None:
    """One file for each, and a healthy one that is not mentioned."""
    for name, content in (("a.mp4", b"same"), ("b.mp4", b"same"), ("c.mp4", b"else")):
        (tmp_path / name).write_bytes(content)
    manifest = _indexed(
        tmp_path,
        *(_good(name, key_interval=12) for name in ("a.mp4", "b.mp4", "c.mp4")),
        Entry("d.mp4", 5, 0, "not a video"),
        _good("e.mp4", bytes=6, variable_rate=True),
        _good("q.mp4", bytes=13, mislabelled=True),
        _good("f.mp4", bytes=7, key_interval=251),
        _good("g.mp4", bytes=8, frames=100),
        _good("h.mp4", bytes=9, width=341),
        _good("i.mp4", bytes=10, start=100, end=220),
        Entry("j.mp4", 5, 0, "cut off: a packet is incomplete"),
        Entry("k.mp4", 5, 0, "not there: looked for it"),
        Entry("n.mp4", 5, 0, "cannot be opened (Permission denied)"),
        Entry("o.tgz", 5, 0, "a compressed archive, whose members"),
        Entry("p.mp4", 5, 0, "its list says frames 5 to 9, but it has 4"),
        _good("l.mp4", bytes=11),
        _good("m.mp4", bytes=12),
    )
    (tmp_path / "l.mp4").write_bytes(b"longer than it was")
    (tmp_path / "m.mp4").unlink()
    problems = check(manifest, span=121)
    assert [(problem.category, problem.path, problem.what) for problem in problems] == [
        ("unreadable", "d.mp4", "not a video"),
        ("truncated", "j.mp4", "cut off: a packet is incomplete"),
        ("not accessible", "n.mp4", "cannot be opened (Permission denied)"),
        ("compressed archive", "o.tgz", "a compressed archive, whose members"),
        ("wrong range", "p.mp4", "its list says frames 5 to 9, but it has 4"),
        ("changed", "l.mp4", "it has another size or time than when it was indexed"),
        ("listed but missing", "k.mp4", "not there: looked for it"),
        ("listed but missing", "m.mp4", "since it was indexed: No such file or directory"),
        ("bad label", "q.mp4", "the .cls or .json beside it holds neither a number nor a text"),
        ("variable rate", "e.mp4", "the time from frame to frame varies by more than a tenth"),
        ("sparse key frames", "f.mp4", "up to 251 frames between key frames, 250 are usual"),
        ("duplicates", "b.mp4", "the same bytes as a.mp4"),
        ("too short", "g.mp4", "100 frames, a clip spans 121"),
        ("too short", "i.mp4", "120 frames, a clip spans 121"),
        ("odd sizes", "h.mp4", "odd size 341x256"),
    ]
    assert {problem.category for problem in problems} == set(CATEGORIES)


def test_duplicates_are_compared_to_the_end(tmp_path: Path) -> None:
    """Equal sizes and equal beginnings are not enough; a file's ranges count once; archives take part."""
    content = bytes(5000)
    for name, raw in (("a.mp4", content), ("b.mp4", content[:-1] + b"x"), ("c.mp4", content)):
        (tmp_path / name).write_bytes(raw)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        member = tarfile.TarInfo("d.mp4")
        member.size = 5000
        tar.addfile(member, io.BytesIO(content[:-1] + b"x"))
    manifest = _indexed(
        tmp_path,
        _good("a.mp4", bytes=5000, end=10),
        _good("a.mp4", bytes=5000, start=10, end=20),
        _good("b.mp4", bytes=5000),
        _good("c.mp4", bytes=5000),
        _good("s.tar/d.mp4", bytes=5000, shard="s.tar", offset=512),
    )
    assert check(manifest) == [
        Problem("duplicates", "c.mp4", "the same bytes as a.mp4"),
        Problem("duplicates", "s.tar/d.mp4", "the same bytes as b.mp4"),
    ]


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    assert isinstance(done.value.code, int)
    return done.value.code, capsys.readouterr().out


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kinds of problems with their numbers, then at most `--most` files of each; status 1, or 0 where all is well."""
    from PIL import Image

    for i in range(4):
        Image.effect_noise((64, 48), 30 + i).save(tmp_path / f"{i}.jpg")
    status, out = _run(capsys, "data", "check", tmp_path)
    assert (status, out.splitlines()[-1]) == (0, "4 images: 0 cannot be used, 0 other remarks")
    for i in range(3):
        (tmp_path / f"bad {i}.jpg").write_text("text")
    Image.effect_noise((63, 48), 30).save(tmp_path / "odd.jpg")
    status, out = _run(capsys, "data", "check", tmp_path, "--most", 2)
    assert (status, out.splitlines()[-1]) == (1, "8 images: 3 cannot be used, 1 other remarks")
    assert "  bad 0.jpg: not an image that Pillow recognises\n  bad 1.jpg: not an" in out
    assert "bad 2.jpg" not in out
    assert "  ... and 1 more (--most)\n" in out
    table = {line.split("  ")[0].strip(): line.split() for line in out.splitlines()[-5:]}
    assert table["unreadable"][1:3] == ["3", "error"]
    assert table["odd sizes"][2:4] == ["1", "note"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "{}", "--most", -3], "--most must not be below 0, got -3"),
        (["check", "{}", "--span", -5], "--span must not be below 0, got -5"),
        (["index", "{}", "--most", -1], "--most must not be below 0, got -1"),
        (["check", ""], "SOURCE is empty: name a folder"),
    ],
)
def test_arguments_out_of_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[object], message: str
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["data", *(str(word).format(tmp_path) for word in words)])
    assert (done.value.code, message in capsys.readouterr().err) == (2, True)


def test_damage_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What both ends do not show is found by `--whole`, in processes: frame 45 of 90, key frames 30 apart."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    draw = np.random.default_rng(0)
    with av.open(str(tmp_path / "0.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "30", "bf": "0", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        for _ in range(90):
            pixels = draw.integers(0, 256, (80, 96, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "0.mp4")) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][45]
        begin, end = packet.pos + packet.size // 4, packet.pos + packet.size
    content = bytearray((tmp_path / "0.mp4").read_bytes())
    for i in range(1, 9):
        (tmp_path / f"{i}.mp4").write_bytes(content)
    content[begin:end] = bytes(end - begin)
    (tmp_path / "4.mp4").write_bytes(content)
    assert _run(capsys, "data", "check", tmp_path, "--span", 0)[0] == 0
    status, out = _run(capsys, "data", "check", tmp_path, "--span", 0, "--whole")
    assert status == 1
    assert out.count("  4.mp4: frame 45 ") == 1
    assert out.splitlines()[-1] == "9 clips: 1 cannot be used, 7 other remarks"


def test_the_index_command_on_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kind guessed from its members; the kept manifest is what pretraining finds."""
    from PIL import Image

    Image.effect_noise((64, 48), 30).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "x/a.png")
        tar.add(__file__, "x/b.jpg")
    status, out = _run(capsys, "data", "index", tmp_path / "s.tar")
    assert (status, out.splitlines()[-1]) == (0, "1 readable images, 1 unreadable")
    assert "s.tar/x/b.jpg: not an image that Pillow recognises" in out
    kept = Manifest.load(tmp_path / ".s.tar.bevt_manifest_images.jsonl")
    assert kept == index(str(tmp_path / "s.tar"), "images", workers=1)
