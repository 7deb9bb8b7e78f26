"""Damaged files on purpose: a seeded generator of what disks, downloads and people leave behind."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FRAMES = 16
"""Frames of every good video; a key frame every eighth."""

VIDEOS = {
    "h264.mp4": ("libx264", {"preset": "veryfast"}, {}),
    "front.mp4": ("libx264", {"preset": "veryfast"}, {"movflags": "faststart"}),
    "h264.mkv": ("libx264", {"preset": "veryfast"}, {}),
    "h264.ts": ("libx264", {"preset": "veryfast"}, {}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "vp9.mp4": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "vp8.webm": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "mpeg4.avi": ("mpeg4", {}, {}),
    "mpeg4.mov": ("mpeg4", {}, {}),
    "mjpeg.avi": ("mjpeg", {}, {}),
    "mpeg2.mpg": ("mpeg2video", {}, {}),
    "flv1.flv": ("flv", {}, {}),
    "wmv2.wmv": ("wmv2", {}, {}),
}
"""Good videos by name: encoder, its options, the container's."""

IMAGES = {"jpeg.jpg": {}, "progressive.jpg": {"progressive": True}, "png.png": {}, "webp.webp": {}, "bmp.bmp": {}}
"""Good images by name: options of Pillow's writer."""


def videos(sources: Sequence[Path], folder: Path, names: Sequence[str] = tuple(VIDEOS)) -> list[Path]:
    """The first FRAMES frames of the sources, in turn, in the containers and codecs `names`."""
    made = []
    for i, name in enumerate(names):
        codec, options, container = VIDEOS[name]
        path = folder / name
        with av.open(str(sources[i % len(sources)])) as read, av.open(str(path), "w", options=container) as write:
            video = read.streams.video[0]
            stream = write.add_stream(codec, rate=25, options={"g": "8", "b": "400k", **options})
            stream.width, stream.height = video.width, video.height
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.thread_count = 1
            for number, frame in zip(range(FRAMES), read.decode(video), strict=False):
                frame = frame.reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, 25), 0
                write.mux(stream.encode(frame))
            write.mux(stream.encode())
        made.append(path)
    return made


def images(sources: Sequence[Path], folder: Path) -> list[Path]:
    """The sources, in turn, in every format of IMAGES."""
    made = []
    for i, (name, options) in enumerate(IMAGES.items()):
        with Image.open(sources[i % len(sources)]) as image:
            image.save(folder / name, **options)
        made.append(folder / name)
    return made


Harm = Callable[[bytes, random.Random], bytes]
"""(a good file's bytes, random numbers) -> a bad one's."""


def cut(raw: bytes, draw: random.Random) -> bytes:
    """The file ends anywhere."""
    return raw[: draw.randrange(1, len(raw))]


def flip(raw: bytes, draw: random.Random) -> bytes:
    """Bits turn over, up to 32 of them anywhere."""
    harmed = bytearray(raw)
    for _ in range(draw.choice((1, 2, 8, 32))):
        harmed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return bytes(harmed)


def hole(raw: bytes, draw: random.Random) -> bytes:
    """A block of a disk or a download never arrived: zeros."""
    at, size = draw.randrange(len(raw)), draw.choice((64, 512, 4096))
    return raw[:at] + bytes(min(size, len(raw) - at)) + raw[at + size :]


def empty(raw: bytes, draw: random.Random) -> bytes:
    """Zero length."""
    return b""


def text(raw: bytes, draw: random.Random) -> bytes:
    """What a server answers instead of the file."""
    return b"<html><body>404 Not Found</body></html>\n" * draw.randrange(1, 200)


def noise(raw: bytes, draw: random.Random) -> bytes:
    """As many bytes, all of them random."""
    return draw.randbytes(len(raw))


def huge(raw: bytes, draw: random.Random) -> bytes:
    """The header declares a picture that would take gigabytes, where it is one of those known here."""
    harmed, side = bytearray(raw), draw.choice((20000, 40000, 65500))
    if raw[:8] == b"\x89PNG\r\n\x1a\n":
        harmed[16:24] = struct.pack(">II", side, side)
        harmed[29:33] = struct.pack(">I", zlib.crc32(harmed[12:29]))
    elif raw[:2] == b"BM":
        harmed[18:26] = struct.pack("<ii", side, side)
    elif raw[:2] == b"\xff\xd8":
        at = max(raw.find(b"\xff\xc0"), raw.find(b"\xff\xc2")) + 5
        harmed[at : at + 4] = struct.pack(">HH", side, side)
    elif raw[:4] == b"\x1a\x45\xdf\xa3":  # Matroska: PixelWidth and PixelHeight, two bytes each or one
        for name in (b"\xb0", b"\xba"):
            for width in (1, 2):
                at = raw.find(name + bytes([0x80 | width]), 0, 1000)
                if at >= 0:
                    harmed[at + 2 : at + 2 + width] = side.to_bytes(2, "big")[:width]
    else:
        for name in (b"avc1", b"vp09", b"mp4v"):  # the sample entry of an MP4
            at = raw.find(name, raw.find(b"stsd"))
            if at >= 0:
                harmed[at + 28 : at + 32] = struct.pack(">HH", side, side)
    return bytes(harmed)


HARMS: tuple[Harm, ...] = (cut, flip, hole, empty, text, noise, huge)
_OFTEN = (cut, flip, hole)


def harm(good: Sequence[Path], folder: Path, count: int, seed: int) -> dict[Path, str]:
    """Write `count` harmed copies of good files, of every kind; path -> kind. Half of them are `_OFTEN`."""
    draw, made = random.Random(seed), {}
    for i in range(count):
        source = good[i % len(good)]
        how = draw.choice(HARMS if i % 2 else _OFTEN)
        path = folder / f"{how.__name__}_{i:03}_{source.name}"
        path.write_bytes(how(source.read_bytes(), draw))
        made[path] = how.__name__
    return made


def oddities(good_videos: Sequence[Path], good_images: Sequence[Path], folder: Path) -> dict[Path, str]:
    """Files that are whole but not what their names say, or not what one expects; path -> kind."""
    made = {}
    for i, source in enumerate(good_videos):
        other = good_videos[(i + 1) % len(good_videos)]
        made[folder / f"other_{i}{source.suffix}"] = other.read_bytes()
    for i, source in enumerate(good_images):
        made[folder / f"picture_{i}.mp4"] = source.read_bytes()
    kinds = dict.fromkeys(made, "extension")
    for path, raw in made.items():
        path.write_bytes(raw)
    for name, codec in (("sound.mp4", "aac"), ("sound.webm", "libopus"), ("sound.avi", "mp2")):
        sound(folder / name, codec)
        kinds[folder / name] = "audio"
    for source in good_videos:
        path = folder / f"single_{source.name}"
        first_packet(source, path)
        kinds[path] = "one frame"
    return kinds


def sound(path: Path, codec: str) -> None:
    """A second of a tone, and no picture."""
    with av.open(str(path), "w") as write:
        stream = write.add_stream(codec, rate=48000, layout="mono")
        wave = (np.sin(np.arange(48000) * 0.05) * 8000).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate = 48000
        write.mux(stream.encode(frame))
        write.mux(stream.encode())


def first_packet(source: Path, path: Path) -> None:
    """A video of one frame."""
    with av.open(str(source)) as read, av.open(str(path), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.size:
                packet.stream = stream
                write.mux(packet)
                return
