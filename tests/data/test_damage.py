"""Damaged files among good ones: all of them named, once, and nothing served that a plain decode would not give."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import FRAMES, HARMS, VIDEOS, harm, images, oddities, videos
from loading import with_data, with_train
from PIL import Image

from bevt.config import Config
from bevt.data import DataError, pyav, shapes
from bevt.data.batch import BadFile
from bevt.data.build import build_loader, eval_batches
from bevt.data.files import ReadError
from bevt.data.manifest import MOST_NAMED, Manifest, index
from bevt.data.sampling import STREAMS, Sampler, Stream
from bevt.train.distributed import World
from bevt.train.metrics import BadFiles, read_rows
from bevt.train.pretrain import pretrain
from tests.train import conftest as trainer
from tests.train.tiny import changed, train_rows

av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")

tokenizer_path, config = trainer.tokenizer_path, trainer.config
"""Fixtures: the trainer's very small run."""

DALI = "DALI is not installed: pip install 'bevt[dali]'"


def decode(path: Path, wanted: tuple[int, ...] = ()) -> tuple[int, dict[int, np.ndarray], str]:
    """A plain decode of a whole video: (sound frames from the start on, pixels of those wanted, FFmpeg's complaint).

    It complains by an exception or by marking a frame as corrupt; of JPEG frames only when it is told to be strict.
    """
    count, pixels = 0, {}
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                return 0, {}, "no video of a known codec"
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            if stream.codec_context.name == "mjpeg":
                stream.codec_context.options = {"err_detect": "explode"}
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    return count, pixels, "a corrupt frame"
                if count in wanted:
                    pixels[count] = frame.reformat(format="gbrp", interpolation=pyav._ACCURATE).to_ndarray()
                count += 1
    except (av.error.FFmpegError, OSError) as error:
        return count, pixels, str(error)
    return count, pixels, "" if count else "no frame"


def unreadable(path: Path) -> bool:
    """Whether a plain decode of the whole file, video or image, meets anything wrong."""
    if path.parent.name == "clips":
        return bool(decode(path)[2])
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True
    return False


def whole(path: Path) -> bool:
    """Whether a plain decode gives every frame that there was. Then there is no reason to call the file bad."""
    return not unreadable(path) and (path.parent.name == "images" or decode(path)[0] == FRAMES)


@pytest.fixture(scope="module")
def good(dataset: shapes.ShapesPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips/ and images/: one file of every container, codec and format."""
    folder = tmp_path_factory.mktemp("good")
    for name in ("clips", "images"):
        (folder / name).mkdir()
    videos(sorted(Path(dataset.train_clips).glob("[0-9]*")), folder / "clips")
    images(sorted(Path(dataset.train_images).glob("*.jpg")), folder / "images")
    return folder


def copies(folder: Path, count: int, target: Path) -> None:
    """`count` copies of every file."""
    target.mkdir(parents=True, exist_ok=True)
    for path, i in itertools.product(sorted(folder.iterdir()), range(count)):
        shutil.copy(path, target / f"good_{i}_{path.name}")


@pytest.fixture(scope="module")
def damaged(good: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, str]]:
    """clips/ and images/ with 500 damaged or odd files among 59 good ones; and of what kind those are."""
    folder = tmp_path_factory.mktemp("damaged")
    copies(good / "clips", 3, folder / "clips")
    copies(good / "images", 4, folder / "images")
    clips, stills = (sorted((good / name).iterdir()) for name in ("clips", "images"))
    kinds = oddities(clips, stills, folder / "clips")
    kinds |= harm(stills, folder / "images", 100, seed=2)
    kinds |= harm(clips, folder / "clips", 500 - len(kinds), seed=1)
    assert len(kinds) == 500
    assert set(kinds.values()) == {how.__name__ for how in HARMS} | {"extension", "audio", "one frame"}
    return folder, kinds


@pytest.fixture
def long(config: Config) -> Config:
    """Clips that ask for every frame of a file, cut by one worker: whatever is damaged is met in the first epoch."""
    data = {"frames": FRAMES, "stride": 1, "workers": 1}
    train = {"clips": 16, "images": 8, "micro_clips": 8, "micro_images": 4, "log_every": 5, "checkpoint_every": 10**6}
    return changed(config, data=data, train=train)


def first_positions(sampler: Sampler, bad: set[str]) -> dict[str, int]:
    """Where training first meets each of the files `bad`: at its own place, or earlier in the stead of others."""
    found: dict[str, int] = {}
    before = None
    for position in range(len(sampler)):
        path = sampler.request(position).path
        if path in bad and path not in found:
            found[path] = found[before] if before in bad else position
        before = path
    return found


def check_run(config: Config, out: Path, manifests: dict[Stream, Manifest], log: str) -> set[str]:
    """The unreadable files of a finished run: those that were met while training are named once, where they were met.

    In `bad_files.jsonl` and in the log; and the rows count every sample that was replaced.
    """
    rows = read_rows(out / "bad_files.jsonl")
    assert [path for path, count in Counter(row["path"] for row in rows).items() if count > 1] == []
    steps, replaced = train_rows(out)[-1]["step"], 0
    for stream, manifest in manifests.items():
        found = {row["path"]: row["position"] for row in rows if row["stream"] == stream and row["position"] >= 0}
        sampler = Sampler(manifest, config.data, stream, config.train.seed)
        expected = first_positions(sampler, set(found))
        assert found == expected
        for path in found:
            assert len(re.findall(rf"{re.escape(path)}: .*read in its place: ", log)) == 1, path
        last = steps * getattr(config.train, stream)
        replaced += sum(sampler.request(position).path in found for position in range(last))
    assert sum(row["replaced"] for row in train_rows(out)) == replaced
    return {row["path"] for row in rows}


@pytest.mark.slow
def test_training_over_500_damaged_files(
    damaged: tuple[Path, dict[Path, str]], long: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It finishes; whatever a plain decode complains of is named once, and nothing that is whole."""
    folder, kinds = damaged
    sources = {"clips": str(folder / "clips"), "images": str(folder / "images")}
    config = changed(long, data=sources)
    files = sorted(path for name in sources for path in (folder / name).iterdir() if path.name[0] != ".")
    steps = -(-sum(path.parent.name == "clips" for path in files) // config.train.clips) + 1
    assert pretrain(changed(config, optim={"max_steps": steps}), tmp_path, quiet=True).finished
    assert all(np.isfinite(row["loss"]) for row in train_rows(tmp_path))

    manifests: dict[Stream, Manifest] = {
        "clips": index(sources["clips"], "clips"),
        "images": index(sources["images"], "images"),
    }
    named = check_run(config, tmp_path, manifests, caplog.text)
    silent = [path.name for path in files if str(path) not in named and unreadable(path)]
    assert silent == [], "read as if nothing were wrong"
    wronged = [path.name for path in files if str(path) in named and whole(path)]
    assert wronged == [], "called unreadable, though every frame is there"
    odd = [path for path in files if kinds.get(path, "extension") in ("extension", "one frame")]
    assert all((str(path) in named) == path.name.startswith("picture") for path in odd)  # a JPEG is no video
    for stream, manifest in manifests.items():
        known = {manifest.locate(entry) for entry in manifest.entries if entry.error}
        rows = [row for row in read_rows(tmp_path / "bad_files.jsonl") if row["stream"] == stream]
        assert {row["path"] for row in rows if row["position"] == -1} == known
        said = [path for path in known if re.search(rf"^WARNING .*{re.escape(path)}: ", caplog.text, re.MULTILINE)]
        assert len(said) == MOST_NAMED
        assert (
            f"{len(known)} of {len(manifest.entries)} files cannot be read, {len(known) - MOST_NAMED} more"
            in caplog.text
        )


def test_held_out_data_is_refused(damaged: tuple[Path, dict[Path, str]], config: Config) -> None:
    """Before anything is decoded, with the list of them."""
    folder, _ = damaged
    source = str(folder / "clips")
    manifest = index(source, "clips")
    bad = len(manifest.unreadable)
    with pytest.raises(DataError) as caught:
        eval_batches(with_data(config, val_clips=source))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(
        f"{bad} of {len(manifest.entries)} files cannot be read; held-out data is never replaced"
    )
    named = [manifest.locate(manifest.entries[number]) for number in manifest.unreadable]
    assert [line.strip().partition(": ")[0] for line in lines[1:]] == named


@pytest.fixture(params=["pyav", "dali"])
def spoiled(request: pytest.FixtureRequest, good: Path, tmp_path: Path, long: Config) -> Config:
    """A run over 72 videos and 20 images of which a quarter was harmed after they were indexed; by backend."""
    folder = tmp_path / "data"
    copies(good / "images", 4, folder / "images")
    (folder / "clips").mkdir()
    names = list(VIDEOS)
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason=DALI)
        names = ["vp9.webm", "vp9.mp4"]
    for i in range(72):
        shutil.copy(good / "clips" / names[i % len(names)], folder / "clips" / f"{i:02}_{names[i % len(names)]}")
    draw = random.Random(4)
    for name in STREAMS:
        index(str(folder / name), name, cache=tmp_path / f"{name}.jsonl")
        files = sorted(path for path in (folder / name).iterdir() if path.name[0] != ".")
        for path in draw.sample(files, len(files) // 4):
            how = draw.choice([how for how in HARMS if how.__name__ != "huge"])
            path.write_bytes(how(path.read_bytes(), draw))
    return with_data(
        long, clips=str(tmp_path / "clips.jsonl"), images=str(tmp_path / "images.jsonl"), backend=request.param
    )


@pytest.mark.slow
def test_files_damaged_after_they_were_indexed(
    spoiled: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training itself meets them, in two epochs: they are named once, all of them, whoever decodes."""
    out = tmp_path / "run"
    assert pretrain(changed(spoiled, optim={"max_steps": 9}), out, quiet=True).finished
    manifests = {name: Manifest.load(getattr(spoiled.data, name)) for name in STREAMS}
    named = check_run(spoiled, out, manifests, caplog.text)
    assert len(named) >= 10
    for manifest in manifests.values():
        for entry in manifest.entries:
            path = Path(manifest.locate(entry))
            if str(path) in named:
                assert not whole(path), f"{path.name} is called unreadable"
            else:
                assert not unreadable(path), f"{path.name} is read as if nothing were wrong"

    with pytest.raises(DataError) as caught:
        list(eval_batches(with_train(with_data(spoiled, val_clips=spoiled.data.clips), eval_clips=72, eval_images=0)))
    listed = {line.strip().partition(": ")[0] for line in str(caught.value).splitlines()[1:]}
    clips = {manifests["clips"].locate(entry) for entry in manifests["clips"].entries}
    assert named & clips <= listed < clips  # and those whose harm no decoder sees: they are not what was indexed


def test_pixels_are_those_of_a_plain_decode(damaged: tuple[Path, dict[Path, str]], long: Config) -> None:
    """Of files that the index accepts, some frames: what comes is what FFmpeg shows, or an error where it complains.

    A frame that it guessed counts wherever a later one may have taken something from it, asked for or not.
    """
    folder, kinds = damaged
    manifest = index(str(folder / "clips"), "clips")
    sampler = Sampler(manifest, replace(long.data, frames=4, sampling="segments"), "clips", 0, train=False)
    seen = Counter[str]()
    for number, entry in enumerate(manifest.entries):
        path = Path(manifest.locate(entry))
        if entry.error or path not in kinds or entry.frames < 4:
            continue
        request = replace(sampler.grid(number, 1, 1)[0], seeks=())
        count, expected, complaint = decode(path, request.frames)
        try:
            got = dict(pyav.pictures(request, list(request.frames)))
        except ReadError:
            assert complaint or count < entry.frames, path.name
            seen["refused"] += 1
            continue
        # Frames that nothing refers to, and that nobody asked for, need not even be decoded.
        assert not complaint or request.timing, f"{path.name}: {complaint} at {count}, of {request.frames}"
        for frame, pixels in expected.items() if entry.format != "vp8" else ():  # it leaves parts as the buffer was
            assert np.array_equal(got[frame], pixels), f"{path.name}: frame {frame}"
        seen["read"] += 1
    print(seen)
    assert seen["read"] > 50


@pytest.mark.parametrize("timed", [False, True])
def test_a_damaged_frame_that_nobody_asked_for(good: Path, long: Config, tmp_path: Path, timed: bool) -> None:
    """Frame 3 is damaged and frames 2 and 6 are wanted: 6 takes its picture from 3, and is refused."""
    (tmp_path / "clips").mkdir()
    path = tmp_path / "clips" / "a.mp4"
    with av.open(str(good / "clips" / "h264.mp4")) as read, av.open(str(path), "w") as write:
        stream = write.add_stream("libx264", rate=25, options={"bf": "0", "g": "16", "qp": "10"})
        stream.width, stream.height, stream.pix_fmt = 128, 112, "yuv420p"
        for frame in read.decode(video=0):
            frame.pict_type = 0
            write.mux(stream.encode(frame))
        write.mux(stream.encode())
    manifest = index(str(tmp_path / "clips"), "clips")
    assert manifest.entries[0].timing
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][3]
    raw = bytearray(path.read_bytes())
    raw[packet.pos + packet.size // 3 : packet.pos + packet.size] = bytes([0x55]) * (packet.size - packet.size // 3)
    path.write_bytes(raw)
    assert decode(path)[::2] == (3, "a corrupt frame")
    request = Sampler(manifest, long.data, "clips", 0, train=False).request(0)
    if not timed:
        request = replace(request, timing=None)
    assert [number for number, _ in pyav.pictures(request, [1, 2])] == [1, 2]
    with pytest.raises(ReadError, match="frame 3 is damaged"):
        list(pyav.pictures(request, [2, 6]))


def resident(pid: int | str) -> float:
    """MiB of memory that a process holds."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("needs /proc to see how much memory a process holds: run it on Linux")
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())[0]) / 1024


def held(loader: object, batches: Iterator[object], count: int) -> float:
    """The most that this process and its workers hold together, after any of the next `count` micro-batches."""
    most = 0.0
    for _ in itertools.islice(batches, count):
        most = max(most, sum(resident(pid) for pid in ("self", *(p.pid for p in multiprocessing.active_children()))))
    return most


@pytest.mark.slow
def test_memory_is_flat(spoiled: Config) -> None:
    """A quarter of the decodes fail; what is held after a third of them is held at the end.

    The bound: one decoded frame (21 KiB) kept at each of the 960 decodes between would be 20 MiB, one of DALI's
    pipelines (0.9 MiB) kept at each of the 60 failures between 54 MiB. What allocators keep is 0 to 9.
    """
    dali = spoiled.data.backend == "dali"
    third = 15 if dali else 60
    config = with_train(with_data(spoiled, frames=4, stride=4), clips=8, images=0, micro_clips=8)
    loader = build_loader(config)
    try:
        batches = iter(loader)
        early, late = held(loader, batches, third), held(loader, batches, 2 * third)
    finally:
        loader.close()
    print(f"{early:.0f} MiB, then {late:.0f} MiB")
    assert late - early < 16


def test_rows_of_an_earlier_run_are_known(tmp_path: Path) -> None:
    """A run that is continued lists nothing again, not even what another process had listed."""
    world = World(0, 1, torch.device("cpu"))
    first, second = (BadFile("clips", i, f"{i}.mp4", "damaged", "x.mp4") for i in range(2))
    BadFiles(tmp_path, world).add([first, replace(first, position=7)])
    BadFiles(tmp_path, replace(world, rank=1, size=2)).add([first, second])
    BadFiles(tmp_path, world).add([first, second, replace(first, stream="images")])
    rows = [(row["stream"], row["position"]) for row in read_rows(tmp_path / "bad_files.jsonl")]
    assert rows == [("clips", 0), ("images", 0)]
    assert [row["path"] for row in read_rows(tmp_path / "bad_files_rank1.jsonl")] == ["1.mp4"]
