"""Every parameter's learning rate and weight decay in finetuning, against the published configurations.

The official keys are those of BEVT's `swin_base_patch244_window877_bevt_finetune_k400.py` and
`swin_base_patch244_window1677_bevt_finetune_ssv2.py` (its commit 8881b21), and mmcv 1.3.3's rule for them
(`DefaultOptimizerConstructor`): the longest key that is part of a parameter's name counts, alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bevt.config import FinetuneConfig, FinetuneOptimConfig
from bevt.models.classifier import VideoSwinClassifier
from bevt.recipes import FINETUNE_RECIPES
from bevt.train.finetune import build_classifier
from bevt.train.optim import build_optimizer, finetuning_rule, learning_rate, rungs, update

RUNGS = [
    *("layers.3.blocks.1", "layers.3.blocks.0", "layers.2.downsample"),
    *(f"layers.2.blocks.{i}" for i in range(17, -1, -1)),
    *("layers.1.downsample", "layers.1.blocks.1", "layers.1.blocks.0"),
    *("layers.0.downsample", "layers.0.blocks.1", "layers.0.blocks.0"),
    "patch_embed",
]
"""From the head down, as the official Kinetics-400 configuration lists them: 0.9, 0.9**2, ... 0.9**28."""


def parameters(config: FinetuneConfig) -> dict[str, torch.nn.Parameter]:
    """Swin-B's, without data."""
    with torch.device("meta"):
        return dict(VideoSwinClassifier(config.model, 400).named_parameters())


def official_name(name: str) -> str:
    """In the official code."""
    return (
        name.replace("head.", "cls_head.fc_cls.")
        if name.startswith("head.")
        else "backbone." + name.replace("encoder.", "")
    )


def mmcv(name: str, keys: dict[str, tuple[float, float]], decay: float) -> tuple[float, float]:
    """(rate's multiple, weight decay) that mmcv gives a parameter; `keys`: multiples of both."""
    for key in sorted(sorted(keys), key=len, reverse=True):
        if key in name:
            return keys[key][0], keys[key][1] * decay
    return 1.0, decay


K400 = {
    "relative_position_bias_table": (1.0, 0.0),
    "norm": (1.0, 0.0),
    "backbone.norm": (0.9, 0.0),
    **{f"backbone.{part}": (0.9 ** (i + 1), 1.0) for i, part in enumerate(RUNGS)},
}
SSV2 = {"relative_position_bias_table": (1.0, 0.0), "norm": (1.0, 0.0), "backbone": (0.1, 1.0)}


@pytest.mark.parametrize(("recipe", "keys"), [("k400", K400), ("diving48", K400), ("ssv2", SSV2)])
def test_official_rates_of_every_parameter(recipe: str, keys: dict[str, tuple[float, float]]) -> None:
    """Quirk D: bias tables at the full rate, norms of the blocks decayed."""
    config = FINETUNE_RECIPES[recipe]()
    rule = finetuning_rule(config.optim, replace(config.model, quirks="official"))
    names = parameters(config)
    assert len(names) == 329
    for name in names:
        assert rule(name) == pytest.approx(mmcv(official_name(name), keys, config.optim.weight_decay)), name
    assert rule("encoder.layers.0.blocks.0.attn.relative_position_bias_table") == (1.0, 0.0)
    assert rule("encoder.layers.0.blocks.0.norm1.weight").weight_decay == config.optim.weight_decay


@pytest.mark.parametrize("recipe", ["k400", "diving48"])
def test_layer_decay_of_every_parameter(recipe: str) -> None:
    """Clean: 28 rungs below the head, each 0.9 of the one above; no decay on norms and bias tables."""
    config = FINETUNE_RECIPES[recipe]()
    rule = finetuning_rule(config.optim, config.model)
    assert [part.replace("encoder.", "") for part in rungs(config.model.depths)] == RUNGS
    assert len(RUNGS) == 28
    for name in parameters(config):
        below = name.replace("encoder.", "")
        (rung,) = [i + 1 for i, part in enumerate(RUNGS) if below.startswith(f"{part}.")] or [
            1 if below.startswith("norm.") else 0
        ]
        bare = "norm" in below or "bias_table" in below
        assert rule(name) == pytest.approx((0.9**rung, 0.0 if bare else 0.001)), name
    assert rule("head.weight") == (1.0, 0.001)
    assert rule("patch_embed.proj.weight").factor == pytest.approx(0.9**28)


def test_backbone_factor_of_every_parameter() -> None:
    """Clean Something-Something: a tenth below the head, bias tables too."""
    config = FINETUNE_RECIPES["ssv2"]()
    rule = finetuning_rule(config.optim, config.model)
    for name in parameters(config):
        bare = "norm" in name or "bias_table" in name
        assert rule(name) == pytest.approx((1.0 if name.startswith("head.") else 0.1, 0.0 if bare else 0.05)), name


def test_groups_have_the_rates_and_an_update_uses_them() -> None:
    """SGD-like: the first step of AdamW without decay moves every weight by its rate."""
    model = torch.nn.ModuleDict({"norm": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    optim = FinetuneOptimConfig(layer_decay=0.5, weight_decay=0.0)
    optimizer = build_optimizer(model, optim, rule=finetuning_rule(optim, FINETUNE_RECIPES["k400"]().model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    update(optimizer, 1e-2, torch.tensor(True))
    for name, p in model.named_parameters():
        moved = 1e-2 * (0.5 if name.startswith("norm") else 1.0)
        torch.testing.assert_close(before[name] - p, torch.full_like(p, moved), rtol=1e-5, atol=0)


def test_the_cosine_by_epoch() -> None:
    """As mmcv's CosineAnnealing with `by_epoch`: constant within an epoch, times the warm-up by iteration."""
    config = replace(FINETUNE_RECIPES["k400"]().optim, epochs=60)
    steps = 60 * 100
    for step in (0, 99, 100, 249, 250, 251, 3000, 3099, 5999):
        epoch = step // 100
        expected = 3e-4 * 0.5 * (1 + math.cos(math.pi * epoch / 60))
        if step < 250:
            expected *= 1 - (1 - step / 250) * (1 - 0.1)
        assert learning_rate(config, step, steps) == pytest.approx(expected, rel=1e-12), step


def videomae_layer(name: str, depth: int) -> int:
    """As VideoMAE's `optim_factory.py` numbers the layers of a ViT by its original names, from 0 at the bottom."""
    own = name.removeprefix("encoder.")
    if own.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    if own.startswith("blocks."):
        return int(own.split(".")[1]) + 1
    return depth + 1


@pytest.mark.parametrize("recipe", ["videomae_k400", "videomae_k400_large", "videomae_ssv2"])
def test_layer_decay_of_a_vision_transformer(recipe: str) -> None:
    """0.75 for each block below the head, and no decay on what has one axis (there: `len(shape) == 1`), by shapes."""
    config = FINETUNE_RECIPES[recipe]()
    depth = config.model.depth  # type: ignore[union-attr]
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_classifier(config, 7, torch.device("meta")).named_parameters()}
    rule = finetuning_rule(config.optim, config.model)
    for name, shape in shapes.items():
        factor = 0.75 ** (depth + 1 - videomae_layer(name, depth))
        assert rule(name) == pytest.approx((factor, 0.0 if len(shape) == 1 else 0.05)), name
    assert rule("encoder.patch_embed.proj.weight").factor == pytest.approx(0.75 ** (depth + 1))


def test_layers_of_two_stacks() -> None:
    """ViViT's second model: those over time above those over space; tokens and positions do not decay."""
    config = FINETUNE_RECIPES["vivit_k400_factorised"]()
    rule = finetuning_rule(replace(config.optim, layer_decay=0.5, weight_decay=0.1), config.model)
    assert rule("encoder.temporal.blocks.3.attn.qkv.weight") == (0.5, 0.1)
    assert rule("encoder.temporal.blocks.0.attn.qkv.weight") == (0.5**4, 0.1)
    assert rule("encoder.temporal.cls_token") == (0.5**5, 0.0)
    assert rule("encoder.spatial_norm.weight") == (0.5**5, 0.0)
    assert rule("encoder.blocks.11.mlp.fc1.weight") == (0.5**5, 0.1)
    assert rule("encoder.blocks.0.mlp.fc1.weight") == (0.5**16, 0.1)
    assert rule("encoder.pos_embed") == (0.5**17, 0.0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["sgd", "nesterov"])
def test_sgd(kind: Any, fused: bool) -> None:
    """Momentum 0.9 without dampening; an update that is to be skipped, the first too, leaves everything alone."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    config = FinetuneOptimConfig(kind=kind, lr=0.5, weight_decay=0.0)
    optimizer = build_optimizer(model, config, fused=fused)
    expected, velocity = 1.0, 0.0
    for finite, gradient in ((False, float("nan")), (True, 1.0), (False, float("nan")), (True, 2.0), (True, -1.0)):
        model.weight.grad = torch.full((1, 1), gradient)
        update(optimizer, 0.1, torch.tensor(finite))
        if finite:
            velocity = 0.9 * velocity + gradient
            expected -= 0.1 * (gradient + 0.9 * velocity if kind == "nesterov" else velocity)
        assert model.weight.item() == pytest.approx(expected, rel=1e-6)
        assert optimizer.state[model.weight]["momentum_buffer"].item() == pytest.approx(velocity, rel=1e-6)
