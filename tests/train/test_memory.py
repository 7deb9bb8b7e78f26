"""Predicted memory against that of real steps, the blocks that are recomputed, and what is said where memory ends."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ENVIRONMENT, changed, figures

from benchmarks.memory import MALLOC
from bevt.config import Config, ConfigError, resized, to_dict
from bevt.data import augment
from bevt.models.bevt import BEVT, MaskedInput
from bevt.models.video_swin import SwinBlock
from bevt.recipes import RECIPES
from bevt.train import memory
from bevt.train.distributed import World
from bevt.train.pretrain import build_model, pretrain

WORLD = World(0, 1, torch.device("cpu"))
DEMO = RECIPES["demo_joint_stage"]()


def measured(configs: list[Config], *options: str) -> str:
    """What the script prints."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measured.py")), *options],
        input=json.dumps([to_dict(config) for config in configs]),
        env=ENVIRONMENT | MALLOC,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def swin_t() -> Config:
    """One clip and two images of the joint stage."""
    base = RECIPES["joint_stage"]()
    config = changed(
        base,
        tokenizer={"kind": "vq"},
        train={"clips": 1, "images": 2, "micro_clips": 1, "micro_images": 2, "precision": "float32"},
    )
    return replace(config, model=resized(base.model, "tiny"))


def halfway(config: Config) -> Config:
    """With a memory budget between what it needs plain and at least."""
    predicted = memory.predict(config, 1, "cpu", again=True)
    room = (predicted.peak().total + predicted.least.total) / 2 / memory.GIB
    return changed(config, train={"memory_budget": round(room, 4)})


def test_the_predicted_peak_is_the_measured_one_within_15_percent() -> None:
    """The masks of the prediction are as large as they get, and a process has a base that grows: hence not less."""
    configs = {
        "demo": DEMO,
        "demo, reference path": replace(DEMO, path="reference"),
        "swin-t": swin_t(),
        "swin-t, recomputed": halfway(swin_t()),
    }
    found = json.loads(measured(list(configs.values())))
    predicted = []
    for config in configs.values():
        budget = config.train.memory_budget
        peak = memory.choose(config, 1, "cpu").peak if budget else memory.predict(config, 1, "cpu").peak()
        predicted.append(peak.total)
    lines = [
        f"{name}: predicted {p / 2**20:.0f} MiB, measured {m / 2**20:.0f}"
        for name, p, m in zip(configs, predicted, found)
    ]
    print("\n".join(lines))
    assert all(abs(p / m - 1) <= 0.15 for p, m in zip(predicted, found)), lines
    assert found[3] < 0.9 * found[2], lines


def test_no_block_more_than_the_budget_needs() -> None:
    config = halfway(swin_t())
    room = config.train.memory_budget * memory.GIB
    choice, predicted = memory.choose(config, 1, "cpu"), memory.predict(config, 1, "cpu", again=True)
    order = predicted.blocks
    assert choice.blocks == frozenset(order[: len(choice.blocks)])
    assert choice.peak.total <= room < predicted.peak(frozenset(order[: len(choice.blocks) - 1])).total
    assert f"{len(choice.blocks)} of 12 blocks" in str(choice)


def test_early_stages_free_most_for_their_operations() -> None:
    """Activations for each operation go as one over the channels, which double from stage to stage."""
    stages = [stage for stage, _ in memory.predict(swin_t(), 1, "cpu", again=True).blocks]
    assert stages == sorted(stages)


def test_a_budget_with_room_recomputes_nothing() -> None:
    choice = memory.choose(changed(DEMO, train={"memory_budget": 4.0}), 1, "cpu")
    assert not choice.blocks
    assert choice.peak == choice.plain


def test_a_budget_that_nothing_meets_names_what_would() -> None:
    config = changed(DEMO, train={"memory_budget": 0.2})
    with pytest.raises(
        ConfigError, match=r"0\.2 GiB is too little.* at least 0\.2.*--train\.micro-clips 2 --train\.micro-images 8"
    ):
        memory.choose(config, 1, "cpu")


def test_shards_need_less_and_buckets_more() -> None:
    """Of eight processes, next to one with the same micro-batch."""
    many = changed(swin_t(), train={"clips": 8, "images": 16})
    alone, ddp, fsdp = (
        memory.predict(config, processes, "cpu").peak().total
        for config, processes in ((swin_t(), 1), (many, 8), (changed(many, train={"parallel": "fsdp"}), 8))
    )
    weights = sum(p.nbytes for p in memory.meta_model(many, 512).parameters())
    assert ddp == alone + weights
    assert fsdp < alone - weights


def test_prediction_leaves_true_numbers_behind() -> None:
    """The resize keeps its matrices: those made under fake tensors would have no data."""
    augment._lanczos4.cache_clear()
    memory.predict.cache_clear()
    memory.predict(DEMO, 1, "cpu")
    view = augment.tokenizer_view(torch.full((1, 96, 96, 3), 255, dtype=torch.uint8), 48)
    assert torch.equal(view, torch.ones(1, 3, 48, 48))


def gradients(model: BEVT, inputs: dict[str, MaskedInput]) -> list[torch.Tensor]:
    """Of the sum of both streams' losses."""
    out = model(**inputs)
    (out["loss_clips"] + out["loss_images"]).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def test_gradients_are_bitwise_those_without_recomputation(config: Config) -> None:
    torch.manual_seed(0)
    model = build_model(config, 32, WORLD.device)
    drop = torch.rand(5, 2, 2).round() * 2
    inputs = {
        "clips": MaskedInput(
            torch.randn(2, 3, 4, 64, 64), torch.rand(2, 2, 4, 4) < 0.5, torch.randint(32, (2, 4, 4, 4)), 64, drop
        ),
        "images": MaskedInput(
            torch.randn(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.5, torch.randint(32, (2, 4, 4)), 32, drop
        ),
    }
    expected = gradients(model, inputs)
    blocks = [module for module in model.modules() if isinstance(module, SwinBlock)]
    runs: list[SwinBlock] = []
    for block in blocks:
        block.recompute = True
        block.attn.register_forward_pre_hook(lambda module, _: runs.append(module))
    found = gradients(model, inputs)
    assert len(runs) == 4 * len(blocks)  # two streams, each forward and again
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_run_under_a_budget_is_the_run_without(
    config: Config, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(halfway(config), tmp_path / "run")
    assert "recomputation: " in capsys.readouterr().out
    assert figures(tmp_path / "run") == figures(finished)


def test_running_out_of_memory_says_what_to_change() -> None:
    config = changed(DEMO, train={"clips": 8, "images": 32, "micro_clips": 8, "micro_images": 32})
    said = measured([config], str(2**28))
    for words in (
        "out of memory in a step",
        "GiB in clips",
        "--train.micro-clips 4 --train.micro-images 16",
        "--train.memory-budget",
        "--resume continues",
    ):
        assert words in said, said


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), memory.explained(DEMO, WORLD):
        raise RuntimeError("shapes differ")
