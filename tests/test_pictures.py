"""Pictures are judged by their pixels: the colours that carry the meaning are where they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from bevt import masking
from bevt.config import ConfigError, MaskConfig
from bevt.pictures import answer, confusion, curves, masks, strip

CLIPS, IMAGES, NOTE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xB0, 0x00, 0x00)
GREY, EDGE, DARK = (128, 128, 128), (255, 196, 0), (38, 60, 92)


def pixels(path: Path) -> np.ndarray:
    """(height, width, 3) int64."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(np.int64)


def where(picture: np.ndarray, colour: tuple[int, int, int], tolerance: int = 0) -> np.ndarray:
    return (np.abs(picture - np.array(colour)) <= tolerance).all(-1)


def train_rows(*streams: str, n: int = 20) -> list[dict[str, Any]]:
    """Losses that fall from 6 to 3 nats and accuracies that rise from 1 to 30 %."""
    rows = []
    for i, progress in enumerate(np.linspace(0, 1, n)):
        row: dict[str, Any] = {"event": "train", "step": 10 * (i + 1), "loss": 9.0, "lr": 1e-3}
        for stream in streams:
            row[f"loss_{stream}"], row[f"accuracy_{stream}"] = 6 - 3 * progress, 0.01 + 0.29 * progress
        rows.append(row)
    return rows


def eval_row(stream: str, step: int = 200) -> dict[str, Any]:
    values = {"val_loss": 3.1, "val_accuracy": 0.28, "entropy": 5.0, "commonest": 0.1}
    return {"event": "eval", "step": step, **{f"{name}_{stream}": value for name, value in values.items()}}


def write(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def panels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The plots' halves of the picture, without the legends below them."""
    picture = pixels(path)
    height, width, _ = picture.shape
    assert width > 1200
    assert height > 400
    return picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :]


@pytest.mark.parametrize("n", [20, 200], ids=["raw", "smoothed"])
def test_loss_falls_and_accuracy_rises_to_the_right(tmp_path: Path, n: int) -> None:
    curves(write(tmp_path / "metrics.jsonl", train_rows("clips", n=n)), tmp_path / "new" / "curves.png")
    picture = pixels(tmp_path / "new" / "curves.png")
    middle = picture.shape[1] // 2
    for name, half, sign in (("loss", picture[:, :middle], 1), ("accuracy", picture[:, middle:], -1)):
        y, x = np.nonzero(where(half, CLIPS, 30))
        plot = y < 0.65 * picture.shape[0]  # the legend is below
        slope = np.polyfit(x[plot], y[plot], 1)[0]
        assert sign * slope > 0.2, name


def test_a_stream_that_takes_no_part_is_not_drawn(tmp_path: Path) -> None:
    curves(write(tmp_path / "metrics.jsonl", train_rows("images")), tmp_path / "curves.png")
    picture = pixels(tmp_path / "curves.png")
    assert where(picture, IMAGES, 30).any()
    assert not where(picture, CLIPS, 30).any()


def test_both_streams_are_drawn_in_their_colours(tmp_path: Path) -> None:
    rows = train_rows("clips", "images")
    for row in rows:
        row["loss_images"] += 1
        row["accuracy_images"] += 0.1
    curves(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    for half in panels(tmp_path / "curves.png"):
        assert where(half, CLIPS, 30).any()
        assert where(half, IMAGES, 30).any()


@pytest.mark.parametrize("evaluated", [False, True])
def test_reference_lines_are_drawn_where_there_is_an_eval_row(tmp_path: Path, evaluated: bool) -> None:
    rows = train_rows("clips") + [eval_row("clips")] * evaluated
    curves(write(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    picture = pixels(tmp_path / "curves.png")
    for half in np.split(picture[:, : picture.shape[1] // 2 * 2], 2, axis=1):
        widest = where(half, CLIPS, 60).sum(1).max()  # a dotted line colours a good part of one row of pixels
        assert (widest > 0.2 * half.shape[1]) == evaluated


def test_events_that_are_not_training_are_skipped(tmp_path: Path) -> None:
    rows = train_rows("clips")
    curves(write(tmp_path / "a.jsonl", rows), tmp_path / "a.png")
    noise = [{"event": "resume", "step": 50}, {"event": "checkpoint", "step": 50, "loss_clips": 99.0}]
    curves(write(tmp_path / "b.jsonl", rows[:5] + noise + rows[5:]), tmp_path / "b.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


@pytest.mark.parametrize("tail", ["", '{"event": "train", "st'])
def test_a_cut_last_line_is_left_out_and_said(tmp_path: Path, tail: str) -> None:
    curves(write(tmp_path / "metrics.jsonl", train_rows("clips"), tail), tmp_path / "curves.png")
    assert where(pixels(tmp_path / "curves.png"), NOTE, 20).any() == bool(tail)


def test_two_runs_share_a_picture(tmp_path: Path) -> None:
    first = write(tmp_path / "images" / "metrics.jsonl", train_rows("images"))
    second = write(tmp_path / "joint" / "metrics.jsonl", train_rows("clips"))
    curves([first, second], tmp_path / "curves.png")
    for half in panels(tmp_path / "curves.png"):
        assert where(half, CLIPS, 30).any()
        assert where(half, IMAGES, 30).any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"metrics\.jsonl has no training rows"),
        (json.dumps(eval_row("clips")) + "\n", r"no training rows yet \(of 1 lines\)"),
        ('{"event": "tra', r"no training rows"),
        ('oops\n{"event": "train", "step": 1}\n', r"metrics\.jsonl, line 1 is no row of metrics: 'oops'"),
        ("[1, 2]\n", r"line 1 is no row of metrics"),
    ],
    ids=["empty", "eval only", "cut", "not JSON", "not a row"],
)
def test_bad_metrics_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_missing_metrics_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        curves(tmp_path / "nowhere.jsonl", tmp_path / "curves.png")


def test_no_metrics_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics file was given"):
        curves([], tmp_path / "curves.png")


def colour(t: int) -> tuple[int, int, int]:
    """A flat colour for frame t, far from every colour of the picture's own."""
    return 10 + 12 * t, 40, 200


def flat_clip(frames: int, height: int = 56, width: int = 56) -> np.ndarray:
    return np.broadcast_to(
        np.array([colour(t) for t in range(frames)], np.uint8)[:, None, None], (frames, height, width, 3)
    ).copy()


def cells(picture: np.ndarray, t: int, size: int) -> list[np.ndarray]:
    """Frame t's cells from top to bottom, found by the flat colour along their left edge."""
    marked = where(picture, colour(t))
    left = int(np.flatnonzero(marked.any(0))[0])
    tops = np.flatnonzero(np.diff(marked[:, left].astype(int), prepend=0) == 1)
    return [picture[top : top + size, left : left + size] for top in tops]


def test_strip_greys_exactly_the_hidden_patches(tmp_path: Path) -> None:
    mask = masking.generate(MaskConfig(), np.array([3]), (4, 14, 14))[0].repeat(2, axis=0)
    mask[:, :, 0] = False  # the left edge stays visible: `cells` finds the frames by it
    strip(tmp_path / "new" / "strip.png", flat_clip(8), mask, {}, "a clip")
    picture = pixels(tmp_path / "new" / "strip.png")
    for t in range(8):
        original, seen = cells(picture, t, 14 * 14)
        assert where(original, colour(t)).all()
        hidden = mask[t].repeat(14, 0).repeat(14, 1)
        np.testing.assert_array_equal(where(seen, GREY), hidden, err_msg=f"frame {t}")
        np.testing.assert_array_equal(where(seen, colour(t)), ~hidden, err_msg=f"frame {t}")


def test_strip_shows_what_was_rebuilt_with_the_hidden_region_outlined(tmp_path: Path) -> None:
    frames = flat_clip(2)
    mask = np.zeros((2, 4, 4), bool)
    mask[1, 1:3, 1:4] = True
    true = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    predicted = true.clone()
    predicted[1, :, 14:42, 14:] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    strip(
        tmp_path / "strip.png",
        torch.from_numpy(frames),
        torch.from_numpy(mask),
        {"true": true, "guess": predicted},
        "a clip",
    )
    picture = pixels(tmp_path / "strip.png")
    size, p = 192, 48
    *_, unmasked_true, unmasked_predicted = cells(picture, 0, size)
    assert where(unmasked_true, colour(0)).all()
    assert where(unmasked_predicted, colour(0)).all()
    original, seen, rebuilt, guessed = cells(picture, 1, size)
    inside = np.s_[p + 4 : 3 * p - 4, p + 4 : size]
    assert where(original[inside], colour(1)).all()
    assert where(seen[inside], GREY).all()
    assert where(rebuilt[inside], colour(1)).all()
    assert where(guessed[inside], (0, 255, 0)).all()
    for cell in (rebuilt, guessed):
        edge = where(cell, EDGE)
        assert edge[p : p + 2, p:].all(), "top of the hidden region"
        assert edge[p : 3 * p, p : p + 2].all(), "left of the hidden region"
        assert not edge[p + 2 : 3 * p - 2, size - 2 :].any(), "the frame's own border"
        assert not edge[:p].any(), "outside"


def test_strip_of_a_long_clip_skips_frames_evenly(tmp_path: Path) -> None:
    strip(tmp_path / "strip.png", flat_clip(16), np.zeros((16, 14, 14), bool), {}, "16 frames")
    picture = pixels(tmp_path / "strip.png")
    shown = [t for t in range(16) if where(picture, colour(t)).any()]
    assert shown == list(range(0, 16, 2))


def test_strip_of_one_image(tmp_path: Path) -> None:
    strip(tmp_path / "image.png", flat_clip(1, 64, 96), np.ones((1, 4, 6), bool), {}, "an image")
    picture = pixels(tmp_path / "image.png")
    assert where(picture, colour(0)).sum() == 4 * 32 * 6 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((2, 56, 56, 3))}, r"frames must be .*uint8, got .*float64"),
        ({"frames": np.zeros((0, 56, 56, 3), np.uint8)}, r"frames must be .*\(0, 56, 56, 3\)"),
        ({"mask": np.zeros((1, 4, 4), bool)}, r"mask must be \(2, h, w\) bool"),
        ({"mask": np.zeros((2, 4, 4))}, r"mask must be .*float64"),
        ({"rebuilt": {"the true\ncodes": np.zeros((2, 56, 56, 3))}}, r"'the true codes' must be \(2, 3, gH, gW\)"),
        ({"rebuilt": {"guess": np.zeros((2, 3, 32, 32), np.uint8)}}, r"'guess' must be .*uint8"),
    ],
)
def test_strip_names_the_argument_that_does_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"frames": flat_clip(2), "mask": np.zeros((2, 4, 4), bool), "rebuilt": {}}
    with pytest.raises(ValueError, match=message):
        strip(tmp_path / "strip.png", **(good | change), title="")


def test_mask_sheet_shows_the_masks_that_training_draws(tmp_path: Path) -> None:
    config = MaskConfig(kind="tube", wrap=True)
    masks(tmp_path / "masks.png", [config], seed=7)
    hidden = masking.generate(config, np.array([7, 8]), (8, 14, 14)).sum()
    assert where(pixels(tmp_path / "masks.png"), DARK).sum() == hidden * 4 * 4  # 5-pixel patches, one for the grid


def test_mask_sheet_has_a_row_for_each_kind(tmp_path: Path) -> None:
    masks(tmp_path / "masks.png")
    rows = where(pixels(tmp_path / "masks.png"), DARK).any(1)
    gaps = np.flatnonzero(np.diff(np.flatnonzero(rows)) > 5)
    assert len(gaps) + 1 == 5


def test_mask_sheet_refuses_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="configs is empty"):
        masks(tmp_path / "masks.png", [])
    with pytest.raises(ConfigError, match="min_block"):
        masks(tmp_path / "masks.png", grid=(8, 4, 4))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of the pictures that a test saves, in the order they were put there."""
    words: list[str] = []
    real = Figure.savefig

    def spy(figure: Figure, *args: Any, **kwargs: Any) -> None:
        real(figure, *args, **kwargs)
        words.extend(text.get_text() for text in figure.findobj(Text) if text.get_visible())

    monkeypatch.setattr(Figure, "savefig", spy)
    return words


def test_confusion_colours_each_row_by_its_shares(tmp_path: Path) -> None:
    """Anchored at the grey row of the class without files, between the others: 64-pixel cells."""
    counts = np.array([[7, 0, 0], [0, 0, 0], [30, 10, 60]])
    confusion(tmp_path / "new" / "confusion.png", counts, ["a", "b", "c"], "three classes")
    picture = pixels(tmp_path / "new" / "confusion.png")
    grey = where(picture, (217, 217, 217), 1)
    y, x = (int(np.flatnonzero(grey.sum(axis) > 40)[0]) for axis in (1, 0))
    brightness = np.array([[picture[y + 64 * i + 10, x + 64 * j + 10].sum() for j in range(3)] for i in (-1, 0, 1)])
    np.testing.assert_allclose(brightness[1], 3 * 217, atol=3)
    assert brightness[0, 0] < brightness[2, 2] < brightness[2, 0] < brightness[2, 1] < brightness[0, 1]
    assert brightness[0, 1] == brightness[0, 2]


@pytest.mark.parametrize(
    ("k", "numbers", "names", "listed"),
    [(4, True, 4, 0), (30, True, 30, 0), (31, False, 31, 0), (60, False, 60, 0), (61, False, 31, 10), (400, 0, 58, 10)],
)
def test_confusion_has_as_many_words_as_fit(
    tmp_path: Path, written: list[str], k: int, numbers: bool, names: int, listed: int
) -> None:
    counts = 17 * np.eye(k, dtype=np.int64) + 3 * np.eye(k, k=1, dtype=np.int64)
    confusion(tmp_path / "confusion.png", counts, [f"class {i}" for i in range(k)], "")
    assert [written.count(share) for share in ("85", "15")] == ([k - 1, k - 1] if numbers else [0, 0])
    assert sum(word.startswith("class ") for word in written) == 2 * names
    assert sum(word.count("3 of 20 (15 %)") for word in written) == listed


def test_confused_pairs_begin_with_the_most_files(tmp_path: Path, written: list[str]) -> None:
    counts = 90 * np.eye(70, dtype=np.int64)
    counts[3, 4], counts[5, 6], counts[8, 7] = 10, 30, 10
    counts[8, 8] = 0
    confusion(tmp_path / "confusion.png", counts, [f"class {i}" for i in range(70)], "")
    (text,) = (word for word in written if "confused" in word)
    assert text.splitlines()[-3:] == [
        "30 of 120 (25 %)  class 5  →  class 6",
        "10 of 10 (100 %)  class 8  →  class 7",
        "10 of 100 (10 %)  class 3  →  class 4",
    ]


@pytest.mark.parametrize("counts", [np.eye(3, dtype=int), np.eye(2), np.zeros((2, 3), int)])
def test_confusion_refuses_counts_that_do_not_fit(tmp_path: Path, counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"counts must be \(2, 2\) integers"):
        confusion(tmp_path / "confusion.png", counts, ["a", "b"], "")


def test_answer_has_a_bar_for_each_of_the_likeliest_classes(tmp_path: Path, written: list[str]) -> None:
    shares = [0.04, 0.1, 0.25, 0.1, 0.5, 0.01]
    answer(tmp_path / "new" / "answer.png", flat_clip(1), list("abcdef"), shares, "a clip")
    bars = where(pixels(tmp_path / "new" / "answer.png"), CLIPS).sum(1)
    first = np.flatnonzero(np.diff((bars > 0).astype(int)) == 1) + 3  # a row of pixels inside each bar
    np.testing.assert_allclose(bars[first], 616 * np.array([0.5, 0.25, 0.1, 0.1, 0.04]), atol=1.5)
    assert [word for word in written if word in "abcdef" and word] == ["e", "c", "b", "d", "a"]
    assert [word for word in written if "%" in word] == ["50.0 %", "25.0 %", "10.0 %", "10.0 %", "4.0 %"]


def test_answer_shows_frames_in_their_shape(tmp_path: Path) -> None:
    answer(tmp_path / "answer.png", flat_clip(16, 64, 128), ["a", "b"], torch.tensor([0.5, 0.5]), "16 frames")
    picture = pixels(tmp_path / "answer.png")
    areas = [int(where(picture, colour(t)).sum()) for t in range(16)]
    assert areas == [96 * 192, 0] * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((2, 56, 56, 3))}, r"frames must be .*uint8, got .*float64"),
        ({"probabilities": [0.5, 0.3, 0.2]}, r"probabilities must be \(2,\), as the classes, got \(3,\)"),
    ],
)
def test_answer_names_the_argument_that_does_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"frames": flat_clip(2), "classes": ["a", "b"], "probabilities": [0.5, 0.5]}
    with pytest.raises(ValueError, match=message):
        answer(tmp_path / "answer.png", **(good | change), title="")


def test_dollars_in_names_are_no_formula(tmp_path: Path) -> None:
    r"""Matplotlib refuses `$\frac$` where it reads formulas."""
    bad = r"$\frac$"
    answer(tmp_path / "answer.png", flat_clip(1), [bad, "b"], [0.5, 0.5], bad)
    confusion(tmp_path / "confusion.png", np.eye(70, k=1, dtype=int), [bad] * 70, bad)
