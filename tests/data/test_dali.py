"""DALI serves the requests that PyAV serves: the same frames, the same cut, the same rules for what is damaged."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import take, with_data, with_train

from bevt.config import Config, ConfigError
from bevt.data import DataError, build, shapes
from bevt.data.batch import Batch
from bevt.data.build import build_loader
from bevt.data.decoding import Masks, Plan, Processes
from bevt.data.files import File, ReadError
from bevt.data.manifest import Entry, Manifest, index
from bevt.data.sampling import NO_JITTER, Request, Sampler

av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")
pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'bevt[dali]'")

from bevt.data import dali, pyav  # noqa: E402

FRAMES = (0, 3, 8, 31, 17, 17)


@pytest.fixture(scope="module")
def vp9(dataset: shapes.ShapesPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the embedded dataset's VP9 videos: what DALI can decode without a GPU."""
    folder = tmp_path_factory.mktemp("vp9")
    for path in Path(dataset.train_clips).glob("*.webm"):
        shutil.copy(path, folder)
    return folder


def transcode(source: Path, target: Path, codec: str, count: int = 60, size: tuple[int, int] | None = None) -> None:
    """The first frames of a video in another codec, (width, height) `size`."""
    with av.open(str(source)) as read, av.open(str(target), "w") as write:
        stream = write.add_stream(
            codec, rate=30, options={"deadline": "realtime", "cpu-used": "8", "b": "1M", "g": "24"}
        )
        video = read.streams.video[0]
        stream.width, stream.height = size or (video.width, video.height)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, frame in enumerate(read.decode(video)):
            if number == count:
                break
            frame = frame.reformat(stream.width, stream.height, stream.pix_fmt)
            frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, 30), 0
            write.mux(stream.encode(frame))
        write.mux(stream.encode())


@pytest.fixture(scope="module")
def pipelines() -> dali.Pipelines:
    """On the CPU, whatever the machine has."""
    return dali.Pipelines(Config().data, None)


def whole(path: Path, height: int, width: int, **changes: object) -> Request:
    """FRAMES of a file as they are: the square at its top left, neither resized nor flipped."""
    plain = dict(
        stream="clips",
        position=0,
        file=File(str(path), str(path)),
        kind=changes.get("stream", "clips"),
        frames=FRAMES,
        resize=(height, width),
        crop=(0, 0),
        size=min(height, width),
        flip=False,
        jitter=NO_JITTER,
        mask_seed=0,
    )
    return Request(**{**plain, **changes})  # type: ignore[arg-type]


def both(pipelines: dali.Pipelines, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """A clip as DALI and as PyAV decode it, whole numbers with a sign."""
    found = []
    for read in (pipelines.read, pyav.read):
        out = torch.zeros(len(request.frames), request.size, request.size, 3, dtype=torch.uint8)
        read([request], [out])
        found.append(out.numpy().astype(int))
    return found[0], found[1]


def assert_agree(mine: np.ndarray, other: np.ndarray, mean: float, most: int) -> None:
    """Mean and largest absolute difference, of 255."""
    difference = np.abs(mine - other)
    print(f"mean {difference.mean():.4f}, largest {difference.max()}")
    assert mine.any()
    assert difference.mean() <= mean
    assert difference.max() <= most


def test_frames_of_real_clips(pipelines: dali.Pipelines, real_clips: Path, tmp_path: Path) -> None:
    """Real footage in VP9, VP8 and odd sizes, before augmentation: equal (the contract allows a mean of 1.5)."""
    for source, target, codec, size in (
        ("kinetics_like_340x256_h264.mp4", "a.webm", "libvpx-vp9", (340, 256)),
        ("ntsc_426x240_h264.mp4", "b.mp4", "libvpx-vp9", (426, 240)),
        ("ucf_like_320x240_mpeg4.avi", "c.webm", "libvpx", (320, 240)),
        ("short_32_frames_h264.mp4", "d.mkv", "libvpx-vp9", (171, 129)),
    ):
        transcode(real_clips / source, tmp_path / target, codec, size=size)
        odd = size[0] % 2  # then the two builds of swscale round differently
        assert_agree(*both(pipelines, whole(tmp_path / target, size[1], size[0])), mean=0.01 * odd, most=odd)


def test_frames_of_embedded_clips(pipelines: dali.Pipelines, vp9: Path) -> None:
    """The embedded dataset's own VP9, before augmentation: equal."""
    for path in sorted(vp9.glob("*.webm")):
        assert_agree(*both(pipelines, whole(path, shapes.HEIGHT, shapes.WIDTH)), mean=0.0, most=0)


@pytest.mark.parametrize("flip", [False, True])
def test_after_augmentation(pipelines: dali.Pipelines, vp9: Path, flip: bool) -> None:
    """Resized up and down by odd factors, cropped, flipped: the two bicubics differ by a rounding."""
    path = min(vp9.glob("*.webm"))
    for resize, crop, size in (((71, 81), (5, 9), 64), ((112, 128), (16, 3), 96), ((224, 256), (0, 32), 224)):
        cut = whole(path, 0, 0, resize=resize, crop=crop, size=size, flip=flip)
        assert_agree(*both(pipelines, cut), mean=0.25, most=8)


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1)])
@pytest.mark.parametrize("flip", [False, True])
def test_rotated_video(
    pipelines: dali.Pipelines, vp9: Path, tmp_path: Path, matrix: tuple[int, int, int, int], flip: bool
) -> None:
    """A display matrix in an MP4: DALI's decoder does not know it, the request does."""
    path = tmp_path / "turned.mp4"
    transcode(min(vp9.glob("*.webm")), path, "libvpx-vp9", 32, (96, 64))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40  # version 0: the matrix is 40 bytes into the box's body
    a, b, c, d = (int(v * 65536).to_bytes(4, "big", signed=True) for v in matrix)
    raw[at : at + 8], raw[at + 12 : at + 20] = a + b, c + d
    path.write_bytes(raw)
    entry = index(str(tmp_path), "clips", workers=1).entries[0]
    assert entry.turns
    cut = whole(path, entry.height, entry.width, crop=(7, 3), size=48, flip=flip, turns=entry.turns)
    assert_agree(*both(pipelines, cut), mean=0.0, most=0)


def test_motion_jpeg(pipelines: dali.Pipelines, tmp_path: Path) -> None:
    """Every frame a JPEG, full range."""
    with av.open(str(tmp_path / "a.avi"), "w") as write:
        stream = write.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        encoder = av.CodecContext.create("mjpeg", "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 96, 64, "yuvj420p", Fraction(1, 25)
        for number in range(32):
            pixels = np.add.outer(np.arange(64) * 3, np.arange(96) + 2 * number)[..., None] * np.array([1, 2, 3]) % 256
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            for packet in encoder.encode(frame):
                packet.stream = stream
                write.mux(packet)
    assert_agree(*both(pipelines, whole(tmp_path / "a.avi", 64, 96)), mean=1.5, most=64)


def test_a_frame_past_the_end(pipelines: dali.Pipelines, vp9: Path) -> None:
    """An error, not a black frame."""
    request = whole(min(vp9.glob("*.webm")), shapes.HEIGHT, shapes.WIDTH, frames=(0, shapes.FRAMES))
    with pytest.raises(ReadError, match="ends before frame 40, which the manifest promises"):
        both(pipelines, request)


def test_pictures_of_another_size_than_indexed(
    pipelines: dali.Pipelines, vp9: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A container that lies about its frames' size makes DALI shift rows: PyAV decodes it, and the log says why."""
    request = whole(min(vp9.glob("*.webm")), shapes.HEIGHT, shapes.WIDTH, picture=(shapes.HEIGHT, 64))
    for _ in range(2):
        assert_agree(*both(pipelines, request), mean=0.0, most=0)
    assert caplog.messages == [
        f"{request.path}: DALI cannot decode it (128x112 pixels, where its manifest says 64x112); "
        "PyAV decodes it in its place"
    ]


def test_what_it_cannot_decode_is_refused(config: Config, dataset: shapes.ShapesPaths) -> None:
    """H.264 without a GPU: which codec, what DALI could, and who can."""
    with pytest.raises(
        ConfigError,
        match=r"data\.backend 'dali' cannot read this data: DALI does not decode h264 on CPUs \(on a GPU it decodes "
        r"h264, .*\); .*pyav can",
    ):
        build_loader(with_data(config, backend="dali"))


@pytest.fixture
def mixed(config: Config, vp9: Path) -> Config:
    """Both streams, VP9 clips."""
    return with_data(config, clips=str(vp9), val_clips="", workers=1)


def assert_alike(first: Batch, second: Batch) -> None:
    """The same samples, masks and reports; pixels as after augmentation."""
    assert (first.clip_ids, first.image_ids) == (second.clip_ids, second.image_ids)
    assert torch.equal(first.clip_masks, second.clip_masks)
    assert torch.equal(first.image_masks, second.image_masks)
    assert torch.equal(first.image_jitter, second.image_jitter)
    assert [(bad.position, bad.path, bad.replaced_by) for bad in first.bad] == [
        (bad.position, bad.path, bad.replaced_by) for bad in second.bad
    ]
    for mine, other in ((first.clips, second.clips), (first.images, second.images)):
        assert_agree(mine.numpy().astype(int), other.numpy().astype(int), mean=0.25, most=12)


def test_the_loader_serves_what_pyav_serves(mixed: Config) -> None:
    """Videos and images, over the end of an epoch; and a batch is not touched by those after it."""
    loader = build_loader(with_data(mixed, backend="dali"))
    assert loader.backend == "dali"
    batches, copies = [], []
    try:
        for batch, _ in zip(loader, range(8), strict=False):
            batches.append(batch)
            copies.append(replace(batch, clips=batch.clips.clone(), images=batch.images.clone()))
    finally:
        loader.close()
    for batch, copy, expected in zip(batches, copies, take(mixed, 8), strict=True):
        assert torch.equal(batch.clips, copy.clips)
        assert torch.equal(batch.images, copy.images)
        assert_alike(batch, expected)


def test_frames_as_images(mixed: Config, vp9: Path, tmp_path: Path) -> None:
    """Single frames of videos, one of them damaged: what PyAV serves, and nothing is left to PyAV."""
    folder = tmp_path / "videos"
    shutil.copytree(vp9, folder, ignore=shutil.ignore_patterns(".*"))
    index(str(folder), "clips", cache=tmp_path / "videos.jsonl")
    min(folder.glob("*.webm")).write_text("no video")
    frames = with_data(mixed, images=str(tmp_path / "videos.jsonl"), val_images="", image_source="frames")
    batches = take(with_data(frames, backend="dali"), 3)
    assert any(batch.bad for batch in batches)
    for batch, expected in zip(batches, take(frames, 3), strict=True):
        assert_alike(batch, expected)


def test_damaged_files_are_replaced_by_the_same_rule(mixed: Config, vp9: Path, tmp_path: Path) -> None:
    """Text, nothing and a cut video: the batches of PyAV, file by file, and the pipeline goes on behind them."""
    folder = tmp_path / "clips"
    shutil.copytree(vp9, folder, ignore=shutil.ignore_patterns(".*"))
    healthy = sorted(folder.glob("*.webm"))
    for name in ("x.webm", "y.webm", "z.webm"):
        shutil.copy(healthy[0], folder / name)
    index(str(folder), "clips", cache=tmp_path / "clips.jsonl")
    (folder / "x.webm").write_text("no video")
    (folder / "y.webm").write_bytes(b"")
    (folder / "z.webm").write_bytes(healthy[0].read_bytes()[:3000])
    damaged = with_train(
        with_data(mixed, clips=str(tmp_path / "clips.jsonl")), clips=2, images=4, micro_clips=1, micro_images=2
    )
    mine, other = take(with_data(damaged, backend="dali"), 12), take(damaged, 12)
    assert {Path(bad.path).name for batch in mine for bad in batch.bad} == {"x.webm", "y.webm", "z.webm"}
    for first, second in zip(mine, other, strict=True):
        assert_alike(first, second)


def test_nothing_of_a_stream_can_be_loaded(config: Config, vp9: Path, tmp_path: Path) -> None:
    """A micro-batch whose only file is gone: reported, and the next ones are served."""
    manifest = index(str(vp9), "clips")
    sampler = Sampler(manifest, config.data, "clips", 0, train=False)
    requests = [sampler.request(number) for number in range(3)]
    gone = replace(requests[1], file=File("gone.webm", str(tmp_path / "gone.webm")))
    plans = [Plan([request], []) for request in (requests[0], gone, requests[2])]
    got = [decoded for _, decoded in dali.Pipelines(config.data, None).decode(plans, Masks(config, ["clips"]))]
    assert [decoded.failures for decoded in got] == [
        [],
        [("clips", 0, "cannot be opened (No such file or directory)")],
        [],
    ]
    expected = [decoded for _, decoded in Processes("pyav", config.data).decode(plans, Masks(config, ["clips"]))]
    assert not got[1].clips.any()
    for number in (0, 2):
        assert_agree(got[number].clips.numpy().astype(int), expected[number].clips.numpy().astype(int), 0.25, 8)


def test_members_of_an_archive(pipelines: dali.Pipelines, vp9: Path, tmp_path: Path) -> None:
    """Bytes in the middle of a larger file."""
    path = min(vp9.glob("*.webm"))
    raw = path.read_bytes()
    (tmp_path / "a.tar").write_bytes(b"#" * 1000 + raw + b"#" * 1000)
    member = File("a.tar/b.webm", str(tmp_path / "a.tar"), 1000, len(raw))
    request = whole(path, shapes.HEIGHT, shapes.WIDTH, file=member)
    assert_agree(*both(pipelines, request), mean=0.0, most=0)


def test_pixel_formats_it_does_not_take() -> None:
    """Ten bits: refused before anything is decoded."""
    manifest = Manifest("clips", "/", (Entry("a.webm", 1, 0, format="vp9", pixel_format="yuv420p10le", frames=1),))
    assert dali.refusal(manifest, None) == (
        "DALI's video decoders take 8-bit 4:2:0 (yuv420p, yuvj420p), not vp9 in yuv420p10le"
    )


def test_how_the_pipeline_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a stream is handed over: by place, which is all that DALI takes it by."""
    from nvidia.dali.pipeline import Pipeline

    parameter = inspect.signature(Pipeline.run).parameters["cuda_stream"]
    assert parameter.kind is inspect.Parameter.POSITIONAL_ONLY
    given: list[tuple[object, ...]] = []

    class Recorder:
        def run(self, *arguments: object) -> object:
            given.append(arguments)
            raise RuntimeError("fn.decoders.video: out of memory")

    pipelines = dali.Pipelines(Config().data, None)
    pipelines._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    with pytest.raises(DataError, match=r"DALI failed \(.*out of memory\): lower data\.prefetch"):
        pipelines._run(Recorder(), [])
    assert given == [("stream",)]


def test_image_formats_it_does_not_take() -> None:
    """A GIF called .jpg is an image for PyAV's backend, not for DALI."""
    manifest = Manifest("images", "/", (Entry("a.jpg", 1, 0, format="GIF", pixel_format="P", frames=1),))
    assert dali.refusal(manifest, None) == "DALI decodes JPEG, MPO, PNG, WEBP, BMP, TIFF, not GIF"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: NVDEC")
def test_frames_on_a_gpu(dataset: shapes.ShapesPaths) -> None:
    """H.264 and VP9 by NVDEC, on the device, within the contract's 1.5 of 255."""
    for path in sorted(Path(dataset.train_clips).glob("0*"))[:4]:
        mine, other = both(dali.Pipelines(Config().data, 0), whole(path, shapes.HEIGHT, shapes.WIDTH))
        assert_agree(mine, other, mean=1.5, most=255)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaders here, whatever the machine has: what they are compared with is on the CPU."""
    monkeypatch.setattr(build, "_device_id", lambda: None)


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """DALI's own threads are enough beside two test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
