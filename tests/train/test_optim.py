"""Parameter groups and the learning rate, against the official configuration."""

from __future__ import annotations

import math

import pytest
import torch

from bevt.config import Config, ModelConfig, OptimConfig
from bevt.models.bevt import BEVT
from bevt.train.optim import build_optimizer, learning_rate, total_steps


@pytest.fixture(scope="module")
def decay(config: Config) -> dict[str, float]:
    """The weight decay of every parameter by name."""
    model = BEVT(config.model, 32)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.05))
    of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    return {name: of[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "name",
    [
        "norm.weight",
        "norm.bias",
        "patch_embed.norm.weight",
        "patch_embed_2d.norm.bias",
        "encoder.layers.0.blocks.0.norm1.weight",
        "encoder.layers.0.downsample.norm.bias",
        "encoder.layers.2.blocks.1.attn.relative_position_bias_table",
    ],
)
def test_undecayed(decay: dict[str, float], name: str) -> None:
    """Norms and bias tables: the official `paramwise_cfg` names them."""
    assert decay[name] == 0.0


@pytest.mark.parametrize(
    "name",
    [
        "mask_token",
        "head.weight",
        "head.bias",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "encoder.layers.0.blocks.0.attn.qkv.bias",
        "encoder.layers.0.blocks.0.mlp.fc2.weight",
        "video_decoder.frames.bias",
    ],
)
def test_decayed(decay: dict[str, float], name: str) -> None:
    """All else, biases of linear maps and the mask token too: no rule of the official configuration names them."""
    assert decay[name] == 0.05


def test_learning_rate() -> None:
    """Cosine times warm-up at the points where both are known: 1000 steps, 100 of warm-up."""
    config = OptimConfig(lr=2.0, epochs=50, warmup_epochs=5, warmup_factor=0.1)
    rates = [learning_rate(config, step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1 * 2.0)
    assert rates[50] == pytest.approx(0.55 * (1 + math.cos(math.pi * 0.05)))
    assert rates[99] == pytest.approx(0.991 * (1 + math.cos(math.pi * 0.099)))
    assert rates[100] == pytest.approx(1 + math.cos(math.pi * 0.1))
    assert rates[500] == pytest.approx(1.0)
    assert rates[1000] == pytest.approx(0.0, abs=1e-12)
    assert max(rates) == rates[100]


def test_no_warm_up() -> None:
    """Starts at the peak."""
    assert learning_rate(OptimConfig(lr=2.0, warmup_epochs=0), 0, 10) == 2.0


def test_length_of_a_run() -> None:
    """In epochs, rounded up to a whole step, or in steps; the warm-up keeps its share of either."""
    assert total_steps(OptimConfig(epochs=3), 3.5) == 11
    config = OptimConfig(lr=1.0, epochs=10, warmup_epochs=1, max_steps=200)
    assert total_steps(config, 3.5) == 200
    assert learning_rate(config, 19, 200) < 0.96 * learning_rate(config, 20, 200)
    assert learning_rate(config, 20, 200) > learning_rate(config, 21, 200)


def test_found_inf_skips_the_update() -> None:
    """The fused optimizer's switch: neither weights nor moments nor step counts change, even on the first step."""
    model = BEVT(ModelConfig(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)), 8, ["images"])
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    for found, moves in ((1.0, False), (0.0, True), (1.0, False)):
        before = [p.detach().clone() for p in model.parameters()]
        moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 if moves else math.nan)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found)  # type: ignore[attr-defined]
        optimizer.step()
        assert all(torch.equal(a, b) != moves for a, b in zip(before, model.parameters()))
        for p, old in zip(model.parameters(), moments):
            new = optimizer.state[p]
            zero = {name: torch.zeros_like(value) for name, value in new.items()}
            assert all(torch.equal(new[name], (old or zero)[name]) != moves for name in new)
