"""What is found in a file, and what is refused before it costs memory or time."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bevt.data import probe, pyav
from bevt.data.entry import Entry, Kind
from bevt.data.manifest import index

av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")


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


def test_many_files_in_parallel(clips: Path) -> None:
    """Two processes find what one finds."""
    for i in range(10):
        shutil.copy(clips / "0001.webm", clips / f"copy{i}.webm")
    assert index(str(clips), "clips", workers=2) == index(str(clips), "clips", workers=1)


def _cut(source: Path, target: Path, share: float) -> None:
    raw = source.read_bytes()
    target.write_bytes(raw[: int(len(raw) * share)])


def _encode(path: Path, codec: str, *, stamps: Iterable[int] = range(30), rate: int = 25) -> None:
    """A small video whose frames have the timestamps `stamps`, in units of 1 / rate seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 5 * number % 256, np.uint8), "rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, rate)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.mp4", "libx264", 25), ("b.mkv", "libx264", 30), ("c.webm", "libvpx-vp9", 24), ("d.mp4", "libx264", 60)],
)
def test_timing_numbers_every_frame(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    """Also in Matroska, whose timestamps are whole milliseconds and so not evenly spaced."""
    _encode(tmp_path / name, codec, rate=rate)
    (entry,) = index(str(tmp_path), "clips", workers=1).entries
    assert entry.timing is not None
    first, ticks = entry.timing
    with av.open(str(tmp_path / name)) as container:
        numbers = [round((frame.pts - first) / ticks) for frame in container.decode(video=0)]
    assert numbers == list(range(30))


def test_timing_is_not_claimed_where_it_would_miscount(tmp_path: Path, real_clips: Path) -> None:
    """A pause in the middle, of five frames or of one; containers and codecs whose timestamps cannot be relied on."""
    _encode(tmp_path / "pause.mp4", "libx264", stamps=[*range(15), *range(20, 35)])
    _encode(tmp_path / "steady.avi", "mjpeg")
    _encode(tmp_path / "steady.webm", "libvpx")
    shutil.copy(real_clips / "short_32_frames_h264.mp4", tmp_path)
    entries = index(str(tmp_path), "clips", workers=1).entries
    assert {entry.path: (entry.frames, entry.timing) for entry in entries} == {
        "pause.mp4": (30, None),
        "steady.avi": (30, None),
        "steady.webm": (30, None),
        "short_32_frames_h264.mp4": (32, None),
    }


def test_turns_of_a_phones_video(clips: Path) -> None:
    """The display matrix of the MP4: 90 degrees clockwise is three quarter turns counter-clockwise."""
    raw = bytearray((clips / "0000.mp4").read_bytes())
    at = raw.index(b"tkhd") + 4 + 40  # version 0: the matrix is 40 bytes into the box's body
    one, minus = (int(v * 65536).to_bytes(4, "big", signed=True) for v in (1, -1))
    raw[at : at + 8], raw[at + 12 : at + 20] = bytes(4) + one, minus + bytes(4)
    (clips / "turned.mp4").write_bytes(raw)
    found = {entry.path: (entry.turns, entry.width, entry.height) for entry in index(str(clips), "clips").entries}
    assert found == {"0000.mp4": (0, 128, 112), "0001.webm": (0, 128, 112), "turned.mp4": (3, 112, 128)}


def _png(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds one row of nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_declare_a_huge_size(tmp_path: Path) -> None:
    """8192 x 8192 is tried (and found cut off), what is above is refused without decoding."""
    small = tmp_path / "jpeg.jpg"
    Image.effect_noise((64, 48), 30).save(small)
    raw = bytearray(small.read_bytes())
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = struct.pack(">HH", 60000, 60000)
    small.write_bytes(raw)
    for side in (8192, 8193, 60000):
        (tmp_path / f"{side}.png").write_bytes(_png(side, side))
    errors = {entry.path: str(entry.error) for entry in index(str(tmp_path), "images", workers=1).entries}
    assert errors.pop("8192.png").startswith("cannot be decoded")
    assert errors.pop("8193.png") == "its header declares 8193x8193, more than 64 megapixels"
    for name, error in errors.items():  # Pillow itself refuses above 179 megapixels, on opening
        assert error.startswith("its header cannot be read (Image size (3600000000 pixels)"), (name, error)


def test_videos_that_declare_a_huge_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the container, or by a frame that is larger than the container says."""
    with av.open(str(tmp_path / "grows.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, size in enumerate([(64, 48), (64, 48), (96, 64)]):
            jpeg = io.BytesIO()
            Image.new("RGB", size).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base = Fraction(1, 25)
            container.mux(packet)

    def error() -> str | None:
        return index(str(tmp_path), "clips", workers=1).entries[0].error

    assert error() is None
    monkeypatch.setattr(pyav, "MOST_PIXELS", 64 * 48)
    assert str(error()).startswith("frame 2 cannot be decoded")
    monkeypatch.setattr(probe, "MOST_PIXELS", 64 * 48 - 1)
    assert str(error()).startswith("its header declares 64x48, more than")


def test_videos_without_end(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on packets ends the reading of a container that has ever more of them."""
    monkeypatch.setattr(probe, "MOST_FRAMES", 39)
    errors = [entry.error for entry in index(str(clips), "clips", workers=1).entries]
    assert errors == ["more than 39 packets"] * 2


def test_damage_anywhere_is_an_entry(clips: Path, tmp_path: Path) -> None:
    """Cuts, flipped bytes and zeroed blocks at 120 random places, no exception; a cut that matters is noticed."""
    draw = random.Random(0)
    for source in sorted(clips.iterdir()):
        raw = source.read_bytes()
        for i in range(60):
            harmed, at = bytearray(raw), draw.randrange(8, len(raw) - 8)
            if i % 3 == 0:
                harmed = harmed[:at]
            elif i % 3 == 1:
                harmed[at] ^= 1 << draw.randrange(8)
            else:
                harmed[at : at + 64] = bytes(len(harmed[at : at + 64]))
            (clips / f"{'cut' if i % 3 == 0 else 'harmed'}{i}{source.suffix}").write_bytes(harmed)
    entries = index(str(clips), "clips", workers=1).entries
    assert len(entries) == 122
    assert {entry.error for entry in entries if entry.path.startswith("0")} == {None}
    # What ends an MP4 of FFmpeg's is a note on FFmpeg's version: the pictures are all there.
    assert {entry.frames for entry in entries if entry.path.startswith("cut") and not entry.error} <= {40}


def _dies(root: str, kind: Kind, entry: Entry) -> Entry:
    """In place of `probe`: what a decoder does that crashes."""
    if "deadly" in entry.path:
        os._exit(139)
    return Entry(entry.path, 1, 1, frames=1)


def test_a_file_that_kills_its_process() -> None:
    """It alone gets an error; every other file is probed, once."""
    names = [f"{'deadly' if i in (3, 30) else 'fine'}{i:02}.mp4" for i in range(40)]
    entries = list(probe.probe_all("/videos", "clips", [Entry(name, 1, 1) for name in names], 2, _dies))
    assert sorted(entry.path for entry in entries) == sorted(names)
    assert {entry.path: entry.error for entry in entries if entry.error} == dict.fromkeys(
        ("deadly03.mp4", "deadly30.mp4"), "the process that probed it died: the decoder crashed, or memory ran out"
    )


def _waits(root: str, kind: Kind, entry: Entry) -> Entry:
    """In place of `probe`: the first time, one file keeps its process busy for ever, and says which one that is."""
    note = Path(root) / "process"
    if entry.path == "slow.mp4" and not note.exists():
        note.write_text(str(os.getpid()))
        time.sleep(600)
    return Entry(entry.path, 1, 1, frames=1)


@pytest.mark.timeout(60)
def test_an_idle_process_that_dies(tmp_path: Path) -> None:
    """As the kernel kills one when memory runs out: it held the lock of the queue, for which the others wait."""
    names = ["slow.mp4", *(f"{i}.mp4" for i in range(8))]
    before = set(multiprocessing.active_children())
    running = probe.probe_all(str(tmp_path), "clips", [Entry(name, 1, 1) for name in names], 2, _waits)
    found = [next(running).path for _ in range(8)]
    while not (tmp_path / "process").exists() or not (tmp_path / "process").read_text():
        time.sleep(0.05)
    busy = int((tmp_path / "process").read_text())
    (idle,) = (child for child in multiprocessing.active_children() if child not in before and child.pid != busy)
    time.sleep(0.2)  # it waits for work by now
    assert idle.pid is not None
    os.kill(idle.pid, signal.SIGKILL)
    found += [entry.path for entry in running]
    assert sorted(found) == sorted(names)


def test_a_strip_is_refused(tmp_path: Path) -> None:
    """Its short side at 256 pixels would make the long one endless; 100 to 1 is still taken."""
    Image.new("RGB", (100, 1)).save(tmp_path / "a.png")
    Image.new("RGB", (1, 101)).save(tmp_path / "b.png")
    errors = [entry.error for entry in index(str(tmp_path), "images", workers=1).entries]
    assert errors == [None, "its sides, 1x101, are more than 100 to 1"]
