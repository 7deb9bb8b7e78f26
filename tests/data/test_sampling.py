"""The sampler: pure, fair, inside the file."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.foreign import torchvision_schemas
from bevt.config import DataConfig
from bevt.data import DataError
from bevt.data.cut import cut
from bevt.data.files import File
from bevt.data.manifest import Entry, Manifest
from bevt.data.sampling import NO_JITTER, Request, Sampler, Stream

CLIPS = Manifest(
    "clips",
    "/videos",
    tuple(
        Entry(f"{i}.mp4", 1000 + i, 0, width=340, height=256, frames=frames, keys=((0, 0), (60, 600), (150, 1500)))
        for i, frames in enumerate((300, 121, 120, 32, 1, 500, 200))
    ),
)
IMAGES = Manifest(
    "images", "/images", tuple(Entry(f"{i}.jpg", 10, 0, width=400, height=300, frames=1) for i in range(50))
)


@given(position=st.integers(0, 10**6), seed=st.integers(0, 2**31), substitute=st.integers(0, 10))
def test_request_is_pure(position: int, seed: int, substitute: int) -> None:
    """The history of a sampler leaves no trace in what it answers."""
    used = Sampler(CLIPS, DataConfig(), "clips", seed)
    for other in (position + 9, position // 2, 3):
        used.request(other)
    assert used.request(position, substitute) == Sampler(CLIPS, DataConfig(), "clips", seed).request(
        position, substitute
    )


@given(position=st.integers(0, 10**6))
def test_request_lies_inside_its_file(position: int) -> None:
    """Frames exist, loop where the span does not fit, and the crop lies in the resized frame."""
    data = DataConfig()
    request = Sampler(CLIPS, data, "clips", 0).request(position)
    length = CLIPS.entries[int(request.path.split("/")[-1].split(".")[0])].frames
    start = request.frames[0]
    assert request.frames == tuple((start + 8 * i) % length for i in range(16))
    assert start + 120 < length if length >= 121 else start == 0
    height, width = request.resize
    assert 256 <= height <= 320
    assert width == round(340 * height / 256)
    assert 0 <= request.crop[0] <= height - 224
    assert 0 <= request.crop[1] <= width - 224
    assert all(number <= max(request.frames) for number, _ in request.seeks)
    assert request.jitter == NO_JITTER


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_epoch_visits_every_file_once(epoch: int) -> None:
    """In an order of its own."""
    sampler = Sampler(IMAGES, DataConfig(), "images", 3)
    paths = [sampler.request(epoch * 50 + i).path for i in range(50)]
    assert sorted(paths) == sorted(IMAGES.locate(entry) for entry in IMAGES.entries)
    assert paths != [sampler.request((epoch + 1) * 50 + i).path for i in range(50)]


def test_draws_are_uniform() -> None:
    """Means and ends of 4,000 images' numbers; the tolerance is four standard errors."""
    sampler = Sampler(IMAGES, DataConfig(), "images", 0)
    requests = [sampler.request(i) for i in range(4000)]
    sides = np.array([min(r.resize) for r in requests])
    assert (sides.min(), sides.max()) == (256, 320)
    assert abs(sides.mean() - 288) < 4 * 18.8 / 63
    assert abs(np.mean([r.flip for r in requests]) - 0.5) < 4 * 0.5 / 63
    factors = np.array([r.jitter[:3] for r in requests])
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert np.abs(factors.mean(0) - 1).max() < 4 * 0.231 / 63
    _, counts = np.unique([r.jitter[3:] for r in requests], axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - 4000 / 6).max() < 4 * 23.6
    assert len({r.mask_seed for r in requests}) == 4000


def test_evaluation_is_centred_and_in_order() -> None:
    """The middle of the video, the centre crop, no flip, no jitter, files in their own order."""
    sampler = Sampler(CLIPS, DataConfig(), "clips", 0, train=False)
    request = sampler.request(0)
    assert request.path == "/videos/0.mp4"
    assert request.frames == tuple(range(89, 210, 8))
    assert (request.resize, request.crop, request.flip) == ((256, 340), (16, 58), False)
    assert request.seeks == ((60, 600),)


def test_substitute_is_the_next_file_with_the_same_mask() -> None:
    """The fixed rule for unreadable files."""
    sampler = Sampler(IMAGES, DataConfig(), "images", 0)
    assert sampler.request(7, substitute=2).path == sampler.request(9).path
    assert sampler.request(7, substitute=2).mask_seed == sampler.request(7).mask_seed


def test_files_known_to_be_unreadable_keep_their_places() -> None:
    """They change neither the length nor another position; theirs go to the next readable file of the epoch's order."""
    bad = {"/images/3.jpg", "/images/17.jpg", "/images/18.jpg"}
    entries = tuple(
        replace(entry, error="damaged" if f"/images/{entry.path}" in bad else None) for entry in IMAGES.entries
    )
    whole = Sampler(IMAGES, DataConfig(), "images", 0)
    sampler = Sampler(replace(IMAGES, entries=entries), DataConfig(), "images", 0)
    assert (len(sampler), sampler.readable) == (50, 47)
    assert sampler.manifest.fingerprint() == IMAGES.fingerprint()
    for epoch in (0, 1):
        order = [whole.request(50 * epoch + place).path for place in range(50)]
        for place in range(50):
            left = [path for path in order[place:] + order[:place] if path not in bad]
            for k in range(3):
                request = sampler.request(50 * epoch + place, substitute=k)
                assert request == replace(whole.request(50 * epoch + place), file=File(left[k], left[k]))


def test_known_values() -> None:
    """The samples of a seed never change: a resumed run has to find them again."""
    request = Sampler(CLIPS, DataConfig(), "clips", 0).request(12345)
    assert (request.path, request.resize, request.crop) == ("/videos/3.mp4", (312, 414), (13, 156))
    assert (request.frames[:5], request.flip, request.mask_seed) == ((0, 8, 16, 24, 0), True, 1875867415229846789)


SEGMENTS = DataConfig(frames=8, sampling="segments")


@given(position=st.integers(0, 10**6))
def test_segments_hold_one_frame_each(position: int) -> None:
    """Frame i lies in the i-th of eight equal parts; a video of fewer frames repeats them in order."""
    request = Sampler(CLIPS, SEGMENTS, "clips", 0).request(position)
    length = CLIPS.entries[int(request.path.split("/")[-1].split(".")[0])].frames
    assert len(request.frames) == 8
    for part, frame in enumerate(request.frames):
        low, high = part * length // 8, (part + 1) * length // 8
        assert low <= frame < max(high, low + 1)
        assert frame < length


def test_segments_are_uniform() -> None:
    """Each frame of a part comes up equally often; four standard errors."""
    manifest = replace(CLIPS, entries=(CLIPS.entries[6],))  # 200 frames: 25 a part
    sampler = Sampler(manifest, SEGMENTS, "clips", 0)
    frames = np.array([sampler.request(position).frames for position in range(2000)])
    for part in range(8):
        counts = np.bincount(frames[:, part] - 25 * part, minlength=25)
        assert len(counts) == 25
        assert np.abs(counts - 80).max() < 4 * np.sqrt(80)
    assert abs(np.corrcoef(frames[:, 0], frames[:, 1])[0, 1]) < 4 / np.sqrt(2000)


def test_segments_do_not_change_the_other_numbers() -> None:
    """Crop, flip and mask of a position are those of dense sampling."""
    dense = Sampler(CLIPS, DataConfig(frames=8), "clips", 5)
    segments = Sampler(CLIPS, SEGMENTS, "clips", 5)
    for position in range(20):
        assert segments.request(position) == replace(
            dense.request(position), frames=segments.request(position).frames, seeks=segments.request(position).seeks
        )


def test_evaluation_takes_the_middle_of_each_segment() -> None:
    """Of 25 frames the 13th; no draw."""
    manifest = replace(CLIPS, entries=(CLIPS.entries[6],))
    request = Sampler(manifest, SEGMENTS, "clips", 0, train=False).request(0)
    assert request.frames == tuple(25 * part + 12 for part in range(8))


def test_a_range_of_frames() -> None:
    """Diving48: only frames [start, end) of a file are the sample's; it loops inside them where it is too short."""
    entry = replace(CLIPS.entries[5], start=100, end=180)
    manifest = replace(CLIPS, entries=(entry,))
    starts = {Sampler(manifest, DataConfig(), "clips", seed).request(0).frames for seed in range(20)}
    assert starts == {tuple(100 + (8 * i) % 80 for i in range(16))}
    short = DataConfig(frames=8, stride=2)
    drawn = [Sampler(manifest, short, "clips", seed).request(0).frames for seed in range(300)]
    assert {frames[0] for frames in drawn} == set(range(100, 166))
    assert max(frames[-1] for frames in drawn) == 179
    assert Sampler(manifest, SEGMENTS, "clips", 0, train=False).request(0).frames == tuple(
        100 + 10 * part + 4 for part in range(8)
    )


def test_grid_of_a_test() -> None:
    """K400's 4 clips x 3 crops: evenly placed clips, crops at the ends and in the middle of the longer side."""
    data = DataConfig(frames=32, stride=2, short_side=(224, 224))
    views = Sampler(CLIPS, data, "clips", 0, train=False).grid(0, clips=4, crops=3)
    assert len(views) == 12
    assert [view.frames[0] for view in views[::3]] == [
        int((300 - 63) * share) for share in (1 / 8, 3 / 8, 5 / 8, 7 / 8)
    ]
    assert [view.crop for view in views[:3]] == [(0, 0), (0, 37), (0, 74)]
    assert {view.resize for view in views} == {(224, 298)}
    assert not any(view.flip for view in views)
    upright = replace(CLIPS, entries=(replace(CLIPS.entries[0], width=256, height=340),))
    assert [view.crop for view in Sampler(upright, data, "clips", 0).grid(0, 1, 3)] == [(0, 0), (37, 0), (74, 0)]
    assert Sampler(CLIPS, DataConfig(), "clips", 0).grid(0, 1, 1)[0].crop == (16, 58)


def test_grid_of_segments() -> None:
    """Something-Something's 1 x 3: the middle of every part; more clips lie between the parts' ends."""
    data = DataConfig(frames=8, sampling="segments", short_side=(224, 224))
    manifest = replace(CLIPS, entries=(CLIPS.entries[6],))
    one = Sampler(manifest, data, "clips", 0).grid(0, 1, 3)
    assert {view.frames for view in one} == {tuple(25 * part + 12 for part in range(8))}
    two = Sampler(manifest, data, "clips", 0).grid(0, 2, 1)
    assert [view.frames[0] for view in two] == [6, 18]


def test_grid_of_an_unreadable_file() -> None:
    """An error: nothing is replaced in a test."""
    manifest = replace(CLIPS, entries=(replace(CLIPS.entries[0], error="damaged"),))
    with pytest.raises(DataError, match=r"/videos/0\.mp4: damaged; .* never replaced"):
        Sampler(manifest, DataConfig(), "clips", 0).grid(0, 4, 3)


@pytest.mark.parametrize(("manifest", "stream"), [(CLIPS, "clips"), (IMAGES, "images")])
def test_fixed_views(manifest: Manifest, stream: Stream) -> None:
    """Three cuts a file, the same for every seed and epoch, drawn equally often; masks are drawn anew."""
    data = DataConfig(views=3)
    views: dict[int, set[object]] = {}
    counts, masks = np.zeros(3 * len(manifest.entries)), set()
    for seed in (0, 1):
        sampler = Sampler(manifest, data, stream, seed)
        for position in range(1500):
            request = sampler.request(position)
            assert manifest.locate(manifest.entries[request.slot // 3]) == request.path
            views.setdefault(request.slot, set()).add(replace(request, position=0, mask_seed=0))
            counts[request.slot] += 1
            masks.add(request.mask_seed)
    assert all(len(cuts) == 1 for cuts in views.values())
    assert len({cut for cuts in views.values() for cut in cuts}) == 3 * len(manifest.entries)
    assert len(masks) == 3000
    expected = 3000 / len(counts)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert Sampler(manifest, DataConfig(), stream, 0).request(0).slot == -1
    assert Sampler(manifest, data, stream, 0, train=False).request(0).slot == -1


def test_jumps_to_key_frames() -> None:
    """Before the first frame, and into gaps that are long enough; never past a wanted frame."""
    keys = tuple((12 * i, 120 * i) for i in range(25))
    manifest = replace(CLIPS, entries=(replace(CLIPS.entries[0], keys=keys),))
    dense = Sampler(manifest, DataConfig(), "clips", 0, train=False).request(0)
    assert dense.frames[0] == 89
    assert dense.seeks == ((84, 840),)
    sparse = Sampler(manifest, SEGMENTS, "clips", 0, train=False).request(0)
    assert sparse.frames == (18, 55, 93, 130, 168, 205, 243, 280)
    assert [number for number, _ in sparse.seeks] == [12, 48, 84, 120, 168, 204, 240, 276]


BOXES = DataConfig(crop_area=(0.08, 1.0))


def of_size(width: int, height: int) -> Manifest:
    """One video of frames of this size."""
    return replace(CLIPS, entries=(replace(CLIPS.entries[0], width=width, height=height),))


@given(position=st.integers(0, 10**6), width=st.integers(1, 2000), height=st.integers(1, 2000))
def test_boxes_lie_in_the_frame(position: int, width: int, height: int) -> None:
    """The crop lies in the resized frame, whose sides are stretched by at most 4/3 against each other.

    Of whole pixels: half of one is left for the box's sides, another for the frame's.
    """
    request = Sampler(of_size(width, height), BOXES, "clips", 0).request(position)
    assert request.size == 224
    for at, side in zip(request.crop, request.resize):
        assert 0 <= at <= side - 224
    high, wide = (
        (np.array([-0.5, 0.5]) + 224 * side / (resized + np.array([0.5, -0.5])))
        for side, resized in zip((height, width), request.resize)
    )
    assert wide[1] / max(high[0], 1e-9) >= 3 / 4
    assert wide[0] / high[1] <= 4 / 3


@pytest.fixture(scope="module")
def transforms() -> ModuleType:
    torchvision_schemas()
    reason = "needs torchvision: pip install --no-deps torchvision==0.28.0 (make test does it)"
    return pytest.importorskip("torchvision.transforms", reason=reason)


def box(request: Request, width: int, height: int) -> tuple[float, float, float, float]:
    """(top, left, height, width) in the frame of what a request cuts out, up to its rounding."""
    down, right = height / request.resize[0], width / request.resize[1]
    return request.crop[0] * down, request.crop[1] * right, 224 * down, 224 * right


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.3, 0.5)])
def test_boxes_are_those_of_random_resized_crop(transforms: ModuleType, area: tuple[float, float]) -> None:
    """Place, sides, area and aspect have torchvision's distributions: Kolmogorov-Smirnov at a level of 1e-6.

    The two differ in what they do after ten boxes that do not fit, which does not happen to frames of 400 x 300.
    """
    sampler = Sampler(of_size(400, 300), replace(BOXES, crop_area=area), "clips", 0)
    count = 4000
    ours = np.array([box(sampler.request(position), 400, 300) for position in range(count)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = torch.zeros(3, 300, 400)
        draw = transforms.RandomResizedCrop.get_params
        theirs = np.array([draw(blank, area, (3 / 4, 4 / 3)) for _ in range(count)])
    limit = np.sqrt(-np.log(1e-6 / 2) / 2 * 2 / count)
    for name, figure in (
        ("top", lambda b: b[:, 0]),
        ("left", lambda b: b[:, 1]),
        ("height", lambda b: b[:, 2]),
        ("width", lambda b: b[:, 3]),
        ("area", lambda b: b[:, 2] * b[:, 3]),
        ("aspect", lambda b: b[:, 3] / b[:, 2]),
        ("place in what is free", lambda b: (b[:, 1] + 0.5) / (401 - b[:, 3])),
    ):
        both = [np.sort(figure(boxes)) for boxes in (ours, theirs)]
        at = np.concatenate(both)
        shares = [np.searchsorted(values, at, side="right") / count for values in both]
        assert np.abs(shares[0] - shares[1]).max() < limit, name


def test_numbers_of_a_box_have_nothing_to_do_with_each_other() -> None:
    """Both places, area, aspect, flip and first frame: correlations below 5 standard errors, where every box fits."""
    sampler = Sampler(of_size(400, 300), replace(BOXES, crop_area=(0.1, 0.3)), "clips", 0)
    requests = [sampler.request(position) for position in range(4000)]
    top, left, high, wide = np.array([box(request, 400, 300) for request in requests]).T
    others = np.array([(request.flip, request.frames[0]) for request in requests]).T
    columns = np.array([top / (300 - high), left / (400 - wide), high * wide, np.log(wide / high), *others])
    assert np.abs(np.corrcoef(columns) - np.eye(6)).max() < 5 / np.sqrt(4000)


SCALES = (1.0, 0.875, 0.75, 0.66)


def test_multi_scale_crops_are_those_of_tsn() -> None:
    """Sides of the short side's shares, at most one apart in the list; 13 places; all combinations equally often.

    As `GroupMultiScaleCrop` of VideoMAE's code lists them: 10 pairs of sides, corners, edges, centre and quarters.
    """
    sampler = Sampler(of_size(400, 320), replace(DataConfig(), crop_scales=SCALES), "clips", 0)
    sides = [int(320 * scale) for scale in SCALES]
    expected = {}
    for i, high in enumerate(sides):
        for wide in sides[max(i - 1, 0) : i + 2]:
            down, right = (320 - high) // 4, (400 - wide) // 4
            places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]
            for y, x in places:
                resize = round(320 * 224 / high), round(400 * 224 / wide)
                crop = round(y * down * 224 / high), round(x * right * 224 / wide)
                at = min(crop[0], resize[0] - 224), min(crop[1], resize[1] - 224)
                expected[resize, at] = expected.get((resize, at), 0) + 1
    count = 13000
    requests = [sampler.request(position) for position in range(count)]
    found: dict[object, int] = {}
    for request in requests:
        found[request.resize, request.crop] = found.get((request.resize, request.crop), 0) + 1
    assert found.keys() == expected.keys()
    for key, times in expected.items():  # of 130
        assert abs(found[key] - 100 * times) < 6 * np.sqrt(100 * times), key
    flips = np.array([request.flip for request in requests])
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / np.sqrt(count)


@given(position=st.integers(0, 10**6), width=st.integers(1, 2000), height=st.integers(1, 2000))
def test_multi_scale_crops_lie_in_the_frame(position: int, width: int, height: int) -> None:
    request = Sampler(of_size(width, height), DataConfig(crop_scales=SCALES), "clips", 0).request(position)
    for at, side in zip(request.crop, request.resize):
        assert 0 <= at <= side - 224


def test_held_out_files_are_cut_as_ever() -> None:
    """Scales are for training."""
    plain, scaled = DataConfig(), DataConfig(crop_scales=SCALES)
    one, other = (Sampler(CLIPS, data, "clips", 0, train=False).request(3) for data in (plain, scaled))
    assert one == other


def test_a_frame_that_no_box_fits() -> None:
    """The largest square, in the middle: of 1000 x 10 pixels 10 x 10, resized to 224 with all that is beside it."""
    for width, height, resize, crop in (
        (1000, 10, (224, 22400), (0, 495 * 224 // 10)),
        (11, 1100, (22400, 224), (round(544 * 224 / 11), 0)),
    ):
        sampler = Sampler(of_size(width, height), BOXES, "clips", 0)
        assert {(r.resize, r.crop) for r in map(sampler.request, range(20))} == {(resize, crop)}


def test_a_cut_box_is_the_resized_box() -> None:
    """Every pixel of the result shows the place in the frame that it would if the box were cut out and resized.

    Up to one pixel of the result, where the frame's size and the box's corner after the resize are rounded (a half
    each), and a level for the picture's own rounding. The frame, smaller than the crop so that its whole pixels can be
    told from the request, says where it is: red rises from left to right, green from top to bottom, in steps of 4.
    """
    width, height, size = 62, 50, 64
    rows, columns = np.mgrid[:height, :width]
    frame = np.stack([4 * columns, 4 * rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    sampler = Sampler(of_size(width, height), replace(BOXES, crop=size, short_side=(64, 64)), "clips", 0)
    flipped = 0
    for request in map(sampler.request, range(200)):
        out = torch.zeros(size, size, 3, dtype=torch.uint8)
        cut(frame, [(request, out)])
        seen = (out.flip(1) if request.flip else out).double().numpy() / 4
        flipped += request.flip
        for shown, side, resized, at in (
            (seen[..., 0], width, request.resize[1], request.crop[1]),
            (seen[..., 1].T, height, request.resize[0], request.crop[0]),
        ):
            length = round(side * size / resized)
            first = round(at * length / size)
            assert 0 <= first <= side - length
            wanted = first + (np.arange(size) + 0.5) * length / size - 0.5
            inside = (wanted > 2) & (wanted < side - 3)  # the kernel reaches two pixels, at the border fewer
            error = np.abs(shown - wanted)[:, inside]
            assert error.max(initial=0) <= length / size + 1 / 4, request
    assert 60 < flipped < 140


@given(position=st.integers(0, 10**6), seed=st.integers(0, 2**31), substitute=st.integers(0, 10))
def test_boxes_are_pure(position: int, seed: int, substitute: int) -> None:
    """A function of seed and position, whatever was asked before."""
    used = Sampler(IMAGES, BOXES, "images", seed)
    used.request(position // 3, cut=1)
    assert used.request(position, substitute) == Sampler(IMAGES, BOXES, "images", seed).request(position, substitute)


@pytest.mark.parametrize("sampling", ["dense", "segments"])
def test_boxes_change_no_other_number(sampling: str) -> None:
    """Frames, flip, jitter and mask of a position are those without a box; at evaluation nothing changes."""
    for manifest, stream in ((CLIPS, "clips"), (IMAGES, "images")):
        plain = replace(DataConfig(), sampling=sampling)
        boxed = replace(plain, crop_area=(0.08, 1.0))
        without, sampler = (Sampler(manifest, data, stream, 5) for data in (plain, boxed))  # type: ignore[arg-type]
        for position in range(40):
            request = sampler.request(position)
            assert replace(request, resize=(0, 0), crop=(0, 0)) == replace(
                without.request(position), resize=(0, 0), crop=(0, 0)
            )
        held_out = [Sampler(manifest, data, stream, 5, train=False) for data in (plain, boxed)]  # type: ignore[arg-type]
        for number in range(7):
            assert held_out[1].request(number) == held_out[0].request(number)
            assert held_out[1].grid(number, 2, 3) == held_out[0].grid(number, 2, 3)


def test_known_boxes() -> None:
    """The samples of a seed never change: a resumed run has to find them again."""
    request = Sampler(IMAGES, BOXES, "images", 0).request(12345)
    assert (request.path, request.resize, request.crop) == ("/images/10.jpg", (400, 605), (52, 47))
    second = Sampler(IMAGES, BOXES, "images", 0).request(12345, cut=1)
    assert (second.path, second.resize, second.crop) == ("/images/10.jpg", (256, 315), (2, 38))


def test_cuts_of_a_position() -> None:
    """Two of one file, each with a box, a flip and a mask of its own; the first is what no cut asks for."""
    sampler = Sampler(IMAGES, BOXES, "images", 0)
    firsts, seconds = ([sampler.request(position, cut=cut) for position in range(400)] for cut in (0, 1))
    assert firsts == [sampler.request(position) for position in range(400)]
    assert [request.path for request in firsts] == [request.path for request in seconds]
    assert {request.cut for request in seconds} == {1}
    assert all((a.resize, a.crop) != (b.resize, b.crop) for a, b in zip(firsts, seconds))
    assert len({request.mask_seed for request in firsts + seconds}) == 800
    assert len({request.jitter for request in firsts + seconds}) == 800
    alike = sum(a.flip == b.flip for a, b in zip(firsts, seconds))
    assert abs(alike - 200) < 4 * np.sqrt(100), "flips of the two have nothing to do with each other"
    assert sampler.request(7, substitute=2, cut=1).path == sampler.request(9).path


def test_labels_are_the_files() -> None:
    """Of a training request, of one that a substitute serves, and of every test view."""
    labels = np.arange(50) * 3 % 7
    sampler = Sampler(IMAGES, DataConfig(), "images", 0, labels=labels)
    for position in range(120):
        for substitute in (0, 1):
            request = sampler.request(position, substitute)
            assert request.label == labels[int(request.path.split("/")[-1].split(".")[0])]
    assert {view.label for view in sampler.grid(11, 2, 3)} == {labels[11]}
    assert Sampler(IMAGES, DataConfig(), "images", 0).request(0).label == -1
