"""Parameter groups and the learning rate, against the official configuration."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import changed, figures

from bevt.config import Config, ConfigError, ModelConfig, OptimConfig
from bevt.models.bevt import BEVT
from bevt.train.optim import build_optimizer, learning_rate, total_steps, update
from bevt.train.pretrain import pretrain


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


class FusedAdam(torch.optim.Optimizer):
    """apex's interface (NVIDIA/apex at 004da4e) around plain AdamW: rates on the device, updates counted by group."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, capturable: bool) -> None:
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps})
        assert capturable

    @torch.no_grad()
    def step(self, closure: None = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        (skip,) = grad_scaler._check_inf_per_device(self).values()
        assert grad_scaler._get_scale_async() == 1
        for group in self.param_groups:
            assert isinstance(group["lr"], torch.Tensor)
            group["step"] = group.get("step", torch.tensor([0], dtype=torch.int)) + (skip == 0)
            if skip:
                continue
            (beta1, beta2), t = group["betas"], int(group["step"])
            for p in group["params"]:
                mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                mean.lerp_(p.grad, 1 - beta1)
                square.lerp_(p.grad**2, 1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p -= group["lr"] * (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + group["eps"])

    def zero_grad(self) -> None:  # type: ignore[override]
        raise AssertionError("apex's takes no set_to_none")


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name with this optimizer."""
    module = ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


def test_apex_trains_as_torch_does(apex: None, config: Config, tmp_path: Path) -> None:
    """The same losses up to rounding, also where a resumed run goes on counting its updates."""
    by_apex = changed(config, optim={"impl": "apex"})
    pretrain(config, tmp_path / "torch", quiet=True)
    pretrain(by_apex, tmp_path / "apex", quiet=True)
    losses = [[row["loss"] for row in figures(tmp_path / name)] for name in ("torch", "apex")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    shutil.rmtree(tmp_path / "apex" / "checkpoints" / "step_00000006")
    pretrain(by_apex, tmp_path / "apex", resume=True, quiet=True)
    assert [row["loss"] for row in figures(tmp_path / "apex")] == losses[1]


def test_apex_skips_what_is_not_finite(apex: None) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(impl="apex"))
    before = model.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    update(optimizer, 0.1, torch.tensor(False))
    assert torch.equal(model.weight, before)


def test_apex_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"optim.impl 'apex' needs NVIDIA's apex .*leave optim.impl at 'torch'"):
        build_optimizer(torch.nn.Linear(2, 2), OptimConfig(impl="apex"))
