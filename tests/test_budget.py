"""The budget against the published and the independently counted figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bevt import budget
from bevt.config import ConfigError
from bevt.recipes import RECIPES
from bevt.train import memory


@pytest.fixture(scope="module")
def joint() -> dict[str, budget.Component]:
    return {row.name.strip(): row for row in budget.components(RECIPES["joint_stage"]())}


@pytest.mark.parametrize(
    ("row", "clip", "image"),
    [
        ("tokenizer (dalle)", 312.97, 26.06),
        ("projections", 39.5, 4.93),
        ("attention", 19.5, 0.30),
        ("MLP", 78.9, 9.87),
        ("merging", 2.5, 0.31),
        ("decoders", 3.8, 0.356),
        ("head and loss", 9.8, 0.82),
    ],
)
def test_multiply_adds_of_swin_b(joint: dict[str, budget.Component], row: str, clip: float, image: float) -> None:
    assert joint[row].clip_gmac == pytest.approx(clip, abs=0.06)
    assert joint[row].image_gmac == pytest.approx(image, abs=0.006)


@pytest.mark.parametrize(
    ("row", "clip", "image"),
    [("tokenizer (dalle)", 417.0, 26.06), ("decoders", 7.4, 0.51), ("head and loss", 26.3, 1.64)],
)
def test_multiply_adds_of_the_official_way(
    joint: dict[str, budget.Component], row: str, clip: float, image: float
) -> None:
    assert joint[row].before.clip_gmac == pytest.approx(clip, abs=0.06)
    assert joint[row].before.image_gmac == pytest.approx(image, abs=0.006)


def test_the_encoder_multiplies_the_same_either_way(joint: dict[str, budget.Component]) -> None:
    encoder = joint["encoder"]
    assert encoder.before[:2] == (encoder.clip_gmac, encoder.image_gmac)


def test_the_official_way_keeps_its_scores_and_logits(joint: dict[str, budget.Component]) -> None:
    """Of 8 clips, where the peak is: the logits of half of the positions, in float32 for the loss."""
    logits = 4 * 8192 * 0.5 * 8 * 3136
    assert joint["head and loss"].before.kept > 0.9 * logits > 2 * joint["head and loss"].kept
    assert joint["encoder"].before.kept > 1.5 * joint["encoder"].kept


def test_encoder_with_its_patch_embedding_is_the_published_cost(joint: dict[str, budget.Component]) -> None:
    assert joint["encoder"].clip_gmac + joint["patch embedding"].clip_gmac == pytest.approx(140.7, abs=0.05)
    assert joint["encoder"].image_gmac + joint["patch embedding"].image_gmac == pytest.approx(15.4, abs=0.05)


def test_parts_of_the_encoder_add_up(joint: dict[str, budget.Component]) -> None:
    parts = ("projections", "attention", "MLP", "merging")
    assert sum(joint[p].clip_gmac for p in parts) == pytest.approx(joint["encoder"].clip_gmac)


def test_parameters(joint: dict[str, budget.Component]) -> None:
    assert joint["tokenizer (dalle)"].parameters == 53_786_240
    assert joint["encoder"].parameters / 1e6 == pytest.approx(87.62, abs=0.01)
    assert joint["head and loss"].parameters == 8192 * 1024 + 8192


def test_a_joint_clip_costs_less_than_it_did(joint: dict[str, budget.Component]) -> None:
    """One clip and eight images: 3.14 TFLOP the official way, 40 % of them the tokenizer's."""
    whole = [joint[n] for n in joint if n not in ("projections", "attention", "MLP", "merging")]
    now, before = ({row.name: row.step_flop(1, 8, way) for row in whole} for way in (False, True))
    assert sum(before.values()) / 1e12 == pytest.approx(3.14, abs=0.01)
    assert before["tokenizer (dalle)"] / sum(before.values()) == pytest.approx(0.40, abs=0.005)
    assert sum(now.values()) / 1e12 == pytest.approx(2.77, abs=0.01)


def test_activations_grow_with_the_micro_batch_and_shrink_with_precision() -> None:
    config = RECIPES["demo_joint_stage"]()

    def kept(**train: object) -> int:
        changed = replace(config, train=replace(config.train, **train))  # type: ignore[arg-type]
        return sum(memory.predict(changed, 1, "cpu").kept().values())

    once, twice, thrice = (kept(micro_clips=4 * n, micro_images=16 * n) for n in (1, 2, 3))
    half = kept(precision="bfloat16")
    assert thrice - twice == pytest.approx(twice - once, rel=1e-4)
    assert twice == pytest.approx(2 * once, rel=0.02)  # the gradients of the head's weights do not grow
    assert 0.4 * once < half < once


def test_most_of_the_memory_is_the_encoders(joint: dict[str, budget.Component]) -> None:
    whole = [row for name, row in joint.items() if name not in ("projections", "attention", "MLP", "merging")]
    assert joint["encoder"].kept > 0.9 * sum(row.kept for row in whole)
    assert all(row.kept > 0 for row in whole if row.trained)
    assert joint["tokenizer (dalle)"].states == 4 * 53_786_240
    assert joint["encoder"].states == 16 * joint["encoder"].parameters


def test_operations_of_a_step_are_the_rows_sum(joint: dict[str, budget.Component]) -> None:
    whole = [joint[n] for n in joint if n not in ("projections", "attention", "MLP", "merging")]
    tokenizer, others = budget.step_flop(RECIPES["joint_stage"]())
    assert tokenizer == joint["tokenizer (dalle)"].step_flop(256, 2048)
    assert tokenizer + others == pytest.approx(sum(row.step_flop(256, 2048) for row in whole), rel=1e-12)


def test_hours_follow_devices_and_efficiency() -> None:
    text = budget.budget(RECIPES["image_stage"](), 8, 790e12, 0.4, 240_000, 1_281_167)
    half = budget.budget(RECIPES["image_stage"](), 8, 790e12, 0.2, 240_000, 1_281_167)

    def hours(table: str) -> float:
        return float(table.split(" hours", maxsplit=1)[0].rsplit(maxsplit=1)[-1])

    assert "500456 steps" in text
    assert hours(half) == pytest.approx(2 * hours(text), abs=0.11)


def test_devices_that_do_not_divide_the_batch() -> None:
    text = budget.budget(RECIPES["image_stage"](), 7, 790e12, 0.4, 240_000, 1_281_167)
    assert "a run on 7 devices would be refused: train.images = 2048 is not a multiple of" in " ".join(text.split())


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--efficiency above 0 and at most 1, got 8, 790, 240000, 1281167 and 1\.4"):
        budget.budget(RECIPES["image_stage"](), 8, 790e12, 1.4, 240_000, 1_281_167)


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("data", {"crop": 200}, "data.crop must be a multiple of 32"),
        ("data", {"frames": 15}, "data.frames must be even"),
        ("train", {"micro_clips": 0}, "train.micro_clips must be above 0"),
        ("train", {"clips": 0, "images": 0}, "at least one stream"),
    ],
)
def test_what_cannot_be_trained_is_refused(group: str, change: dict, message: str) -> None:
    config = RECIPES["joint_stage"]()
    config = replace(config, **{group: replace(getattr(config, group), **change)})
    with pytest.raises(ConfigError, match=message):
        budget.budget(config, 8, 790e12, 0.4, 240_000, 1_281_167)
