"""Decoding: the frames asked for are the frames served."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bevt.config import Config, DataConfig
from bevt.data import pyav, shapes
from bevt.data.decoding import Masks, Plan, Processes, shape
from bevt.data.files import File, ReadError
from bevt.data.manifest import Manifest, index
from bevt.data.sampling import NO_JITTER, Request, Sampler, _seeks

av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")

REAL_CLIPS = (
    "kinetics_like_340x256_h264.mp4",
    "ntsc_426x240_h264.mp4",
    "short_32_frames_h264.mp4",
    "ucf_like_320x240_mpeg4.avi",
)


def request_for(path: Path, resize: tuple[int, int], frames: tuple[int, ...], **changes: object) -> Request:
    """Whole square at the top left, unscaled."""
    plain = dict(
        stream="clips",
        position=0,
        file=File(str(path), str(path)),
        kind=changes.get("stream", "clips"),
        frames=frames,
        resize=resize,
        crop=(0, 0),
        size=min(resize),
        flip=False,
    )
    return Request(**{**plain, "jitter": NO_JITTER, "mask_seed": 0, **changes})  # type: ignore[arg-type]


def read(request: Request) -> np.ndarray:
    """The pixels of one request."""
    out = torch.zeros(shape([request]), dtype=torch.uint8)
    pyav.read([request], [out[0]])
    return out[0].numpy()


def every_frame(path: Path) -> np.ndarray:
    """(T, H, W, 3): the whole file, decoded from start to end, no frame left out."""
    with av.open(str(path)) as container:
        return np.stack(
            [frame.reformat(format="gbrp", interpolation=0x40002).to_ndarray() for frame in container.decode(video=0)]
        )


@pytest.mark.parametrize("name", REAL_CLIPS)
def test_frames_are_exact(real_clips: Path, name: str) -> None:
    """Any frame of a real clip (B-frames, AVI, 29.97 fps), with and without seeking, equals the full decode's."""
    assert_frames_are_exact(real_clips, name)


@pytest.mark.parametrize("name", ["0000.mp4", "0001.webm"])
def test_embedded_frames_are_exact(dataset: shapes.ShapesPaths, name: str) -> None:
    """H.264 and VP9 as the embedded dataset encodes them."""
    assert_frames_are_exact(Path(dataset.train_clips), name)


def assert_frames_are_exact(folder: Path, name: str) -> None:
    """Frames from the beginning, and from every key frame that the manifest lists, against the whole decode."""
    entry = _one(folder, name).entries[0]
    whole = every_frame(folder / name)
    assert entry.frames == len(whole)
    size, last = whole.shape[1:3], len(whole) - 1
    wanted = tuple(sorted({0, 1, 7, 31, last // 2, max(0, last - 40), last}))
    got = read(request_for(folder / name, size, wanted))
    np.testing.assert_array_equal(got, whole[list(wanted), : min(size), : min(size)])
    for key in entry.keys[1:]:
        wanted = (key[0], key[0] + 1, last)
        for timing in {None, entry.timing}:
            got = read(request_for(folder / name, size, wanted, seeks=(key,), timing=timing))
            np.testing.assert_array_equal(got, whole[list(wanted), : min(size), : min(size)])


CODECS = (
    ("mp4", "libx264", {"preset": "veryfast", "bf": "3", "x264-params": "keyint=24:open-gop=1:b-pyramid=normal"}),
    ("mkv", "libx264", {"preset": "medium", "g": "30", "bf": "2"}),
    ("mp4", "libx265", {"preset": "veryfast", "x265-params": "keyint=24:open-gop=1:bframes=4:log-level=none"}),
    (
        "webm",
        "libvpx-vp9",
        {"deadline": "good", "cpu-used": "5", "lag-in-frames": "16", "auto-alt-ref": "1", "g": "24"},
    ),
    ("mp4", "libsvtav1", {"preset": "12", "g": "24"}),
    ("mp4", "mpeg4", {"bf": "2", "g": "24"}),
)


@pytest.mark.parametrize(("container", "codec", "options"), CODECS)
def test_frames_left_out_change_no_other(
    dataset: shapes.ShapesPaths, tmp_path: Path, container: str, codec: str, options: dict[str, str]
) -> None:
    """What nobody asked for is not decoded where nothing refers to it, and jumps skip the rest: the same frames."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}: install PyAV's own wheel")
    path = tmp_path / f"a.{container}"
    source = every_frame(Path(dataset.train_clips) / "0000.mp4")
    with av.open(str(path), "w") as write:
        stream = write.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 112, "yuv420p"
        for pixels in (*source, *source[::-1], *source):
            write.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        write.mux(stream.encode())
    entry = index(str(tmp_path), "clips", workers=1).entries[0]
    whole = every_frame(path)
    assert entry.frames == len(whole) == 120
    if codec != "mpeg4":  # not one of those whose packets are taken for frames
        assert entry.timing is not None
        assert len(entry.keys) > 2
    draw = np.random.default_rng(0)
    for count in (1, 2, 5, 8, 16) * 3:
        wanted = tuple(sorted(draw.choice(120, count, replace=False).tolist()))
        request = request_for(path, (112, 128), wanted, seeks=_seeks(entry, wanted), timing=entry.timing)
        np.testing.assert_array_equal(read(request), whole[list(wanted), :112, :112])


def test_one_decode_for_many_views(real_clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twelve views of a test: the file is opened once, and each view is what it is alone."""
    manifest = _one(real_clips, "kinetics_like_340x256_h264.mp4")
    data = DataConfig(frames=4, stride=8, short_side=(224, 224))
    views = Sampler(manifest, data, "clips", 0, train=False).grid(0, clips=4, crops=3)
    alone = [read(view) for view in views]
    opened: list[File] = []
    real = pyav.open_video

    def count(file: File, **options: str) -> object:
        opened.append(file)
        return real(file, **options)

    monkeypatch.setattr(pyav, "open_video", count)
    backend = Processes("pyav", DataConfig(workers=0))
    ((_, decoded),) = backend.decode([Plan(views, [])], Masks(Config(), ()))
    assert len(opened) == 1
    np.testing.assert_array_equal(decoded.clips, np.stack(alone))


def test_a_wrong_key_frame_costs_time_not_content(real_clips: Path) -> None:
    """Where seeking lands elsewhere than the manifest says, decoding starts over."""
    path = real_clips / "ntsc_426x240_h264.mp4"
    plain = request_for(path, (240, 426), (120, 121))
    wrong = request_for(path, (240, 426), (120, 121), seeks=((100, 100_100),))
    np.testing.assert_array_equal(read(wrong), read(plain))


def test_short_clip_loops(real_clips: Path) -> None:
    """16 frames at stride 8 out of 32: frame numbers modulo 32, each decoded once."""
    manifest = _one(real_clips, "short_32_frames_h264.mp4")
    request = Sampler(manifest, DataConfig(), "clips", 0).request(0)
    clip = read(request)
    assert clip.shape == (16, 224, 224, 3)
    np.testing.assert_array_equal(clip[:4], clip[4:8])


def test_crop_and_flip(real_clips: Path) -> None:
    """The crop is cut from the resized frame and mirrored afterwards."""
    path = real_clips / "ucf_like_320x240_mpeg4.avi"
    whole = read(request_for(path, (120, 160), (5,)))[0]
    cut = read(request_for(path, (120, 160), (5,), crop=(10, 20), size=96, flip=True))[0]
    np.testing.assert_array_equal(cut, whole[10:106, 20:116][:, ::-1])


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1)])
def test_rotation_is_applied(real_clips: Path, tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    """A phone's upright video: the display matrix of the MP4 decides size and pixels."""
    raw = bytearray((real_clips / "short_32_frames_h264.mp4").read_bytes())
    at = raw.index(b"tkhd") + 4 + 40  # version 0: the matrix is 40 bytes into the box's body
    a, b, c, d = (int(v * 65536).to_bytes(4, "big", signed=True) for v in matrix)
    raw[at : at + 8], raw[at + 12 : at + 20] = a + b, c + d
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(raw)
    entry = index(str(tmp_path), "clips", workers=1).entries[0]
    quarter_turns = {(0, 1, -1, 0): 3, (0, -1, 1, 0): 1, (-1, 0, 0, -1): 2}[matrix]
    assert (entry.width, entry.height) == ((340, 256) if quarter_turns == 2 else (256, 340))
    upright = every_frame(real_clips / "short_32_frames_h264.mp4")[3]
    got = read(request_for(turned, (entry.height, entry.width), (3,), size=256))[0]
    np.testing.assert_array_equal(got, np.rot90(upright, quarter_turns)[:256, :256])


def test_frames_of_changing_size(tmp_path: Path) -> None:
    """Every frame is brought to the size of the request, whatever size it has."""
    path = tmp_path / "changing.mkv"
    _encode_changing(path)
    clip = read(request_for(path, (64, 64), (0, 5)))
    assert clip.shape == (2, 64, 64, 3)
    assert abs(int(clip[0].mean()) - 60) <= 2
    assert abs(int(clip[1].mean()) - 200) <= 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_image_is_turned_resized_cropped_flipped(tmp_path: Path, orientation: int) -> None:
    """In this order, as Pillow does it; EXIF's orientation 6 is a quarter turn clockwise."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 13, 3)).astype(np.uint8).repeat(9, 0).repeat(9, 1)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_270)
    size = (96, 74) if orientation == 6 else (74, 96)
    request = request_for(tmp_path / "a.png", size, (0,), stream="images", crop=(3, 5), size=64, flip=True)
    full = np.asarray(upright.resize(size[::-1], Image.Resampling.BICUBIC))[3:67, 5:69][:, ::-1]
    difference = np.abs(read(request).astype(int) - full)
    assert difference.max() <= 2
    assert difference.mean() < 0.02


def test_read_error_names_file_and_reason(tmp_path: Path) -> None:
    """A text file called .mp4, and one called .jpg."""
    (tmp_path / "a.mp4").write_text("no video")
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ReadError, match=r"a\.mp4: not a video that FFmpeg recognises"):
        read(request_for(tmp_path / "a.mp4", (64, 64), (0,)))
    with pytest.raises(ReadError, match=r"a\.jpg: not an image that Pillow recognises"):
        read(request_for(tmp_path / "a.jpg", (64, 64), (0,), stream="images"))


def test_a_frame_that_cannot_be_converted(dataset: shapes.ShapesPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's complaint is about the file, whichever step it comes from."""

    class Refusing:
        def reformat(self, *_: object, **__: object) -> None:
            raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")

    monkeypatch.setattr("av.video.reformatter.VideoReformatter", Refusing)
    with pytest.raises(ReadError, match=r"0000\.mp4: frame 3 cannot be converted to RGB \(Invalid data"):
        read(request_for(Path(dataset.train_clips) / "0000.mp4", (112, 128), (3,)))


def test_fewer_frames_than_promised(real_clips: Path) -> None:
    """A file that was replaced after it was indexed."""
    with pytest.raises(ReadError, match="ends before frame 40"):
        read(request_for(real_clips / "short_32_frames_h264.mp4", (256, 340), (0, 40)))


def _one(folder: Path, name: str) -> Manifest:
    """The manifest of one file of a folder."""
    manifest = index(str(folder), "clips", workers=1)
    return Manifest("clips", manifest.root, tuple(entry for entry in manifest.entries if entry.path == name))


def _encode_changing(path: Path) -> None:
    """Three frames of 64x48, then three of 96x80: MPEG-2 sequences in one stream."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i, (width, height, level) in enumerate([(64, 48, 60)] * 3 + [(96, 80, 200)] * 3):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
            encoder.time_base = Fraction(1, 25)
            pixels = np.full((height, width, 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuvj420p")
            frame.pts = i
            frame.time_base = Fraction(1, 25)
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:
                packet.stream = stream
                container.mux(packet)


def test_16_bit_images_are_scaled(tmp_path: Path) -> None:
    """Pillow's own conversion would cut everything above 255 off."""
    path = tmp_path / "deep.png"
    levels = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(path)
    with Image.open(path) as image:
        got = np.asarray(pyav.upright(File(str(path), str(path)), image))
    assert np.array_equal(got, np.repeat((levels >> 8).astype(np.uint8)[..., None], 3, axis=2))
