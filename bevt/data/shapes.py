"""The embedded dataset: short clips of one textured shape that moves over a smooth background, and stills of several.

Everything is drawn with integer arithmetic from seeded raw PCG64 bits, so the frames are the same on every machine;
then they become real files: H.264 (.mp4) and VP9 (.webm) in turn, JPEG for the stills. What is hidden behind a mask can
mostly be told from what is visible: few colours, backgrounds of low frequency, large shapes, steady motion of 1 to 3
pixels a frame.

Letters: H x W pixels, T frames. Coordinates count in 1/16 pixel, angles in 1/256 turn.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from bevt.data import DataError
from bevt.data.processes import cores, pool

_log = logging.getLogger("bevt.data")

VERSION = 1
"""Of the pictures: it changes with any change to what is drawn or encoded."""

WIDTH, HEIGHT, FRAMES, FPS = 128, 112, 40, 25

MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "bounce", "grow", "spin")
SHAPES = ("disc", "square", "triangle", "diamond", "ring", "cross")
TEXTURES = ("plain", "stripes", "checks", "shaded")
BACKGROUNDS = ("horizontal", "vertical", "diagonal", "radial", "bands")
COLOURS = {
    "red": (214, 54, 48),
    "orange": (236, 138, 38),
    "yellow": (238, 210, 64),
    "green": (72, 160, 68),
    "teal": (40, 150, 150),
    "sky": (104, 178, 228),
    "blue": (48, 82, 186),
    "violet": (122, 70, 170),
    "pink": (232, 128, 176),
    "brown": (128, 86, 52),
    "grey": (128, 128, 132),
    "white": (236, 234, 228),
}

LABELLINGS = {"what": ("background", BACKGROUNDS), "how": ("motion", MOTIONS)}
"""Column of the labels, whose last word is the class, and the classes: what one frame tells, and what none does."""

COUNTS: dict[str, Any] = {"train_clips": 540, "val_clips": 162, "train_images": 1080, "val_images": 162}
"""Of `bevt replicate` and of sources named `shapes:`. Of clips multiples of 54, of motions times shapes: each motion
equally often. Backgrounds are drawn at random."""

PREFIX = "shapes:"
"""Of a source that is this dataset."""

_SINE = np.array([round(1024 * math.sin(2 * math.pi * i / 256)) for i in range(256)])
_Y, _X = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.int32) * 16 + 8  # centres of pixels
_HALF_Y, _HALF_X = np.mgrid[0 : HEIGHT * 2, 0 : WIDTH * 2].astype(np.int32) * 8 + 4  # centres of half pixels
_SHADES = 16
"""Levels of a background's gradient: smooth for the eye, few for a tokenizer."""


@dataclass(frozen=True)
class ShapesPaths:
    """Four folders, and the labels of their files."""

    train_clips: str
    val_clips: str
    train_images: str
    val_images: str
    labels: str
    """CSV: path (relative to the file's own folder), split, shape, texture, colour, background, motion."""


@dataclass(frozen=True)
class Object:
    """One moving shape. Lengths in 1/16 pixel, angles in 1/256 turn; rates are per frame."""

    shape: str
    texture: str
    colour: str
    motion: str
    x: int
    y: int
    """Centre in the middle of the clip (of the circle, for circling shapes)."""
    radius: int
    angle: int
    speed: int


@dataclass(frozen=True)
class Scene:
    """What `render` draws."""

    background: str
    colours: tuple[str, str]
    """The two ends of the background's gradient."""
    objects: tuple[Object, ...]


def scene(seed: int, split: str, index: int, *, still: bool) -> Scene:
    """The scene of one file: a pure function of its arguments.

    Of clips, motions come up equally often, and shapes but for `spin`.
    """
    words = (VERSION, seed, ("train", "val").index(split), int(still), index)
    raw = iter(np.random.PCG64(np.random.SeedSequence(words)).random_raw(64).tolist())

    def draw(low: int, high: int) -> int:
        """A whole number in low .. high, both included."""
        return low + (next(raw) >> 32) % (high - low + 1)

    def pick(names: tuple[str, ...]) -> str:
        return names[draw(0, len(names) - 1)]

    names = tuple(COLOURS)
    first = draw(0, len(names) - 1)
    # The gradient's other end is a neighbour in the palette: 12 hues, not 144 pairs.
    background, colours = pick(BACKGROUNDS), (names[first], names[(first + 1) % len(names)])
    objects = []
    for _ in range(draw(1, 3) if still else 1):
        motion = MOTIONS[index % len(MOTIONS)]
        texture = pick(TEXTURES)
        shape = SHAPES[(index // len(MOTIONS)) % len(SHAPES)] if not still else pick(SHAPES)
        if motion == "spin":  # a plain disc would not show it
            shape, texture = ("square" if shape in ("disc", "ring") else shape), ("stripes", "checks")[draw(0, 1)]
        colour = names[(first + draw(3, len(names) - 2)) % len(names)]  # never one of the background's
        reach = (480, 400) if still else (160, 128)
        objects.append(
            Object(
                shape,
                texture,
                colour,
                "still" if still else motion,
                x=WIDTH * 8 + draw(-reach[0], reach[0]),
                y=HEIGHT * 8 + draw(-reach[1], reach[1]),
                radius=draw(180, 350),
                angle=draw(0, 255),
                speed=draw(18, 44),
            )
        )
    return Scene(background, colours, tuple(objects))


def render(what: Scene, frames: int = FRAMES) -> np.ndarray:
    """(T, H, W, 3) uint8 RGB, by integer arithmetic only."""
    background = _background(what)
    out = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(frames):
        out[t] = background
        for item in what.objects:
            _paint(out[t], item, *_pose(item, 2 * t - (frames - 1)))
    return out


def ensure(
    root: str | Path,
    seed: int = 0,
    *,
    train_clips: int = 240,
    val_clips: int = 40,
    train_images: int = 600,
    val_images: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> ShapesPaths:
    """The dataset under `root`, rendered and encoded where it is not there yet, on every core.

    It lies in a folder named after the version, seed and counts. Files appear whole or not at all, and an interrupted
    rendering is completed by the next call. Raises DataError where PyAV or one of the two encoders is missing, OSError
    where `root` cannot be written.
    """
    counts = {
        "train_clips": train_clips,
        "val_clips": val_clips,
        "train_images": train_images,
        "val_images": val_images,
    }
    folder = Path(root) / f"shapes-v{VERSION}-{seed}-{'-'.join(map(str, counts.values()))}"
    paths = ShapesPaths(*(str(folder / name) for name in (*counts, "labels.csv")))
    stamp = folder / "complete.json"
    if stamp.exists():
        return paths
    jobs, rows = [], []
    for name, count in counts.items():
        split, kind = name.split("_")
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            suffix = ".jpg" if kind == "images" else (".mp4", ".webm")[i % 2]
            path = folder / name / f"{i:04d}{suffix}"
            what = scene(seed, split, i, still=kind == "images")
            rows.append([f"{name}/{path.name}", split, *_labels(what)])
            if not path.exists():
                jobs.append((path, what))
    if any(path.suffix != ".jpg" for path, _ in jobs):
        _require_encoders()
    jobs.sort(key=lambda job: job[0].suffix, reverse=True)  # the slow ones first
    with pool(cores()) as processes:
        for done, _ in enumerate(processes.map(_write, jobs, chunksize=4), 1):
            if progress:
                progress(done, len(jobs))
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "shape", "texture", "colour", "background", "motion"])
        writer.writerows(rows)
    stamp.write_text(json.dumps({"version": VERSION, "seed": seed, **counts}) + "\n", encoding="utf-8")
    return paths


def write_labels(data: ShapesPaths) -> None:
    """Lists of `path label` lines beside the folders: `what_train_clips.txt` and so on, four."""
    folder = Path(data.labels).parent
    with open(data.labels, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for labels, (column, classes) in LABELLINGS.items():
        for split in ("train_clips", "val_clips"):
            lines = [
                f"{row['path']} {classes.index(row[column].split()[-1])}\n"
                for row in rows
                if row["path"].startswith(f"{split}/")
            ]
            text, path = "".join(lines), folder / f"{labels}_{split}.txt"
            if not path.exists() or path.read_text() != text:
                path.write_text(text)


def located(source: str, kind: Literal["clips", "images"]) -> str:
    """The folder or list that a source `shapes:SPLIT` or `shapes:SPLIT:LABELS` is; any other source as it is.

    SPLIT is train or val, LABELS what or how, of clips. The dataset is rendered where it is not there yet (a minute),
    into the user's cache folder (`$XDG_CACHE_HOME/bevt`, else `~/.cache/bevt`). Raises DataError where it cannot be,
    and for a name that is none of these.
    """
    if not source.startswith(PREFIX):
        return source
    split, _, labels = source.removeprefix(PREFIX).partition(":")
    if split not in ("train", "val") or labels not in ("", *LABELLINGS) or (labels and kind == "images"):
        raise DataError(
            f"{source}: of the embedded dataset there are {PREFIX}train and {PREFIX}val, and of clips with labels "
            f"{PREFIX}train:how, {PREFIX}val:how, {PREFIX}train:what and {PREFIX}val:what"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bevt"

    def tell(done: int, total: int) -> None:
        if done == 1:
            _log.warning("the embedded dataset is rendered into %s: %d files, a minute on two cores", cache, total)

    try:
        paths = ensure(cache, 0, **COUNTS, progress=tell)
    except OSError as error:
        raise DataError(
            f"{source}: the embedded dataset cannot be written into {cache} ({error.strerror}): point XDG_CACHE_HOME "
            "at a folder that can be written"
        ) from error
    if not labels:
        return str(getattr(paths, f"{split}_{kind}"))
    write_labels(paths)
    return str(Path(paths.labels).parent / f"{labels}_{split}_clips.txt")


def _background(what: Scene) -> np.ndarray:
    """(H, W, 3) uint8: a gradient between two colours."""
    x, y = _X, _Y
    width, height = WIDTH * 16, HEIGHT * 16
    if what.background == "horizontal":
        level = x * 256 // width
    elif what.background == "vertical":
        level = y * 256 // height
    elif what.background == "diagonal":
        level = (x + y) * 256 // (width + height)
    elif what.background == "radial":
        dx, dy = x - width // 2, y - height // 2
        level = (dx * dx + dy * dy) * 256 // (width * width // 4 + height * height // 4)
    else:  # bands: two and a half soft waves, from the top to the bottom
        level = 128 + (_SINE[(y * 640 // height) % 256] >> 3)
    level = level.clip(0, 255) * _SHADES // 256
    low, high = (np.array(COLOURS[name]) for name in what.colours)
    return (low + (high - low) * level[..., None] // (_SHADES - 1)).astype(np.uint8)


def _pose(item: Object, t2: int) -> tuple[int, int, int, int]:
    """(x, y, radius, angle) at half-frames `t2` before (< 0) or after the middle of the clip."""
    x, y, radius, angle = item.x, item.y, item.radius, item.angle
    way = item.speed * t2 // 2
    if item.motion in ("left", "right"):
        x += way if item.motion == "right" else -way
    elif item.motion in ("up", "down"):
        y += way if item.motion == "down" else -way
    elif item.motion in ("clockwise", "counterclockwise"):
        turn = item.speed * t2 // 22 * (1 if item.motion == "clockwise" else -1) + item.angle
        x += 400 * int(_SINE[(turn + 64) % 256]) >> 10
        y += 400 * int(_SINE[turn % 256]) >> 10
        angle = 0
    elif item.motion == "bounce":
        x += _zigzag(way + item.angle * 4, 560)
        y += _zigzag(way * 3 // 4 + item.angle * 2, 420)
    elif item.motion == "grow":
        radius = 160 + (item.speed + 20) * (t2 + 40) // 14
    elif item.motion == "spin":
        angle += (item.speed // 12 + 1) * t2 // 2
    return x, y, radius, angle % 256


def _zigzag(way: int, reach: int) -> int:
    """Position between -reach and reach after `way` of travel, reflected at the ends."""
    phase = (way + reach) % (4 * reach)
    return (phase if phase < 2 * reach else 4 * reach - phase) - reach


def _paint(frame: np.ndarray, item: Object, x: int, y: int, radius: int, angle: int) -> None:
    """Draw one shape into (H, W, 3) uint8, in place; a pixel at an edge is the mean of its four quarters."""
    reach = radius * 3 // 2  # more than any shape's corner is away
    left, right = max(0, (x - reach) // 16), min(WIDTH, (x + reach) // 16 + 1)
    top, bottom = max(0, (y - reach) // 16), min(HEIGHT, (y + reach) // 16 + 1)
    if left >= right or top >= bottom:
        return
    quarters = (slice(2 * top, 2 * bottom), slice(2 * left, 2 * right))
    dx, dy = _HALF_X[quarters] - x, _HALF_Y[quarters] - y
    cosine, sine = int(_SINE[(angle + 64) % 256]), int(_SINE[angle])
    u, v = (cosine * dx + sine * dy) >> 10, (cosine * dy - sine * dx) >> 10
    square = u * u + v * v
    if item.shape == "disc":
        inside = square <= radius * radius
    elif item.shape == "square":
        inside = np.maximum(abs(u), abs(v)) * 8 <= radius * 7
    elif item.shape == "triangle":  # upright, its corners on the circle of the radius
        inside = (2 * v <= radius) & (1774 * abs(u) - 1024 * v <= 1024 * radius)
    elif item.shape == "diamond":
        inside = 2 * abs(u) + abs(v) * 3 // 2 <= 2 * radius
    elif item.shape == "ring":
        inside = (square <= radius * radius) & (4 * square >= radius * radius)
    else:  # cross
        inside = (np.minimum(abs(u), abs(v)) * 3 <= radius) & (np.maximum(abs(u), abs(v)) <= radius)
    if item.texture == "plain":
        shade = np.full(u.shape, 256)
    elif item.texture == "stripes":
        shade = np.where((u * 4 // radius) % 2, 256, 120)
    elif item.texture == "checks":
        shade = np.where((u * 2 // radius + v * 2 // radius) % 2, 256, 120)
    else:  # shaded from one side to the other
        shade = 136 + ((v + radius) * 8 // (2 * radius)).clip(0, 7) * 17
    below = frame[top:bottom, left:right]
    painted = np.array(COLOURS[item.colour]) * shade[..., None] >> 8
    painted = np.where(inside[..., None], painted, below.repeat(2, 0).repeat(2, 1))
    below[:] = (painted.reshape(bottom - top, 2, right - left, 2, 3).sum((1, 3)) + 2) >> 2


def _labels(what: Scene) -> list[str]:
    first = what.objects[0]
    return [first.shape, first.texture, first.colour, f"{what.colours[0]} {what.background}", first.motion]


_CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    ".mp4": ("mp4", "libx264", {"preset": "veryfast", "crf": "20", "g": "20"}),
    ".webm": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "7", "crf": "24", "b": "0", "g": "20"}),
}
"""Container, encoder and options by file suffix."""


def _require_encoders() -> None:
    from bevt.data.pyav import library

    available = library().codecs_available
    for _, encoder, _ in _CODECS.values():
        if encoder not in available:
            raise DataError(
                f"the FFmpeg that PyAV uses has no encoder {encoder}, which the embedded dataset needs: "
                "install PyAV's own wheel (`pip install --force-reinstall --only-binary av av`)"
            )


def _write(job: tuple[Path, Scene]) -> None:
    """Render and encode one file."""
    path, what = job
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".jpg":
            Image.fromarray(render(what, 1)[0]).save(temporary, quality=92)
        else:
            _encode(temporary, render(what))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(path: Path, frames: np.ndarray) -> None:
    from bevt.data.pyav import library

    av = library()
    name, encoder, options = _CODECS[path.suffix]
    with av.open(str(path), "w", format=name) as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.thread_count = 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
