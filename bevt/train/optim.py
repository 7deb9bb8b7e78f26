"""Optimizers with each model's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bevt.config import AnyModel, ConfigError, FinetuneOptimConfig, ModelConfig, OptimConfig, ViTConfig
from bevt.train.distributed import shard


def undecayed(name: str, model: AnyModel | None = None) -> bool:
    """Whether a parameter is exempt from weight decay.

    Of a Video Swin norms and bias tables (BEVT's official configuration), nothing else. Of a vision transformer all
    that is no matrix of weights: norms, biases, tokens and positions (VideoMAE's `optim_factory.py`).
    """
    if isinstance(model, ViTConfig):
        part = name.rpartition(".")[2]
        return "norm" in name or part.endswith(("bias", "_token", "_embed"))
    return "norm" in name or name.endswith("relative_position_bias_table")


class Rule(NamedTuple):
    """What the optimizer does to a parameter."""

    factor: float
    """Its learning rate over the run's."""
    weight_decay: float


def pretraining_rule(config: OptimConfig, model: AnyModel | None = None) -> Callable[[str], Rule]:
    """One rate for all parameters, by name."""
    return lambda name: Rule(1.0, 0.0 if undecayed(name, model) else config.weight_decay)


def vit_rule(config: FinetuneOptimConfig, model: ViTConfig) -> Callable[[str], Rule]:
    """The rates and decays of a `ViTClassifier`'s parameters, by name.

    As VideoMAE's `optim_factory.py` has it: head and norm have the full rate, the last block `layer_decay` of it, each
    below it as much again, patch embedding, class token and positions one rung below the first block. Of `vivit_2` the
    blocks over time stand above those over space.
    """
    prefixes = ["encoder.temporal.blocks"] * model.temporal_depth if model.kind == "vivit_2" else []
    numbers = [*reversed(range(len(prefixes))), *reversed(range(model.depth))]
    blocks = [f"{p}.{i}." for p, i in zip(prefixes + ["encoder.blocks"] * model.depth, numbers)]
    above = ("head.", "norm.", "encoder.temporal.cls_token", "encoder.temporal.pos_embed", "encoder.spatial_norm.")

    def rung(name: str) -> int:
        if name.startswith(above[:2]):
            return 0
        if name.startswith(above[2:]):  # what stands between the two stacks of blocks
            return model.temporal_depth + 1
        return next((i + 1 for i, block in enumerate(blocks) if name.startswith(block)), len(blocks) + 1)

    def rule(name: str) -> Rule:
        factor = config.layer_decay ** rung(name) * (1.0 if name.startswith("head.") else config.backbone_factor)
        return Rule(factor, 0.0 if undecayed(name, model) else config.weight_decay)

    return rule


def rungs(depths: Sequence[int]) -> list[str]:
    """The parts of `VideoSwinClassifier` below its head, from the last block down, as prefixes of parameters' names.

    Each is a rung of the layer decay, for Swin-B 28, as in the official configuration; the final norm is on the first.
    """
    below = []
    for stage in reversed(range(len(depths))):
        if stage < len(depths) - 1:
            below.append(f"encoder.layers.{stage}.downsample")
        below += [f"encoder.layers.{stage}.blocks.{block}" for block in reversed(range(depths[stage]))]
    return [*below, "patch_embed"]


def finetuning_rule(config: FinetuneOptimConfig, model: AnyModel) -> Callable[[str], Rule]:
    """The rates and decays of a classifier's parameters, by name."""
    return vit_rule(config, model) if isinstance(model, ViTConfig) else swin_rule(config, model)


def swin_rule(config: FinetuneOptimConfig, model: ModelConfig) -> Callable[[str], Rule]:
    """The rates and decays of a `VideoSwinClassifier`'s parameters, by name.

    Clean: a parameter's rate is its rung's; norms and bias tables do not decay. With `quirks="official"` what mmcv
    makes of the official configurations (quirk D): of their keys that occur in a parameter's name the longest counts
    alone, so that bias tables train at the full rate, and norms inside a layer that has a key decay.
    """
    rates = {"norm": config.layer_decay}
    rates |= {part: config.layer_decay ** (i + 1) for i, part in enumerate(rungs(model.depths))}
    decay = config.weight_decay

    def clean(name: str) -> Rule:
        part = next((part for part in rates if name.startswith((f"{part}.", f"{part}_2d."))), None)
        return Rule(rates[part] * config.backbone_factor if part else 1.0, 0.0 if undecayed(name) else decay)

    def theirs(name: str) -> str:
        return name if name.startswith("head.") else f"backbone.{name.removeprefix('encoder.')}"

    keys = {"relative_position_bias_table": Rule(1.0, 0.0), "norm": Rule(1.0, 0.0)}
    if config.backbone_factor != 1:
        keys["backbone"] = Rule(config.backbone_factor, decay)
    if config.layer_decay != 1:
        keys |= {theirs(part): Rule(rate, 0.0 if part == "norm" else decay) for part, rate in rates.items()}
    longest_first = sorted(keys, key=len, reverse=True)

    def official(name: str) -> Rule:
        return next((keys[key] for key in longest_first if key in theirs(name)), Rule(1.0, decay))

    return official if model.quirks == "official" else clean


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, fused: bool = True, rule: Callable[[str], Rule] | None = None
) -> torch.optim.Optimizer:
    """AdamW or SGD over a group for each `rule` that names of parameters have (default: `pretraining_rule`).

    `fused`: one pass over all parameters, which can be skipped on a device-side flag. Raises ConfigError where
    `config.impl` cannot serve.
    """
    rule = rule or pretraining_rule(config)
    by_rule: dict[Rule, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            by_rule.setdefault(rule(name), []).append(p)
    groups: list[dict[str, Any]] = [{"params": members, **kind._asdict()} for kind, members in by_rule.items()]
    if config.impl == "apex":
        return _apex(groups, config)
    settings: dict[str, Any] = {"fused": True} if fused else {"foreach": False}
    if config.kind != "adamw":
        nesterov = config.kind == "nesterov"
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0], nesterov=nesterov, **settings)
        for group in groups:  # else a first update that is skipped would leave what was in the memory before
            for p in group["params"]:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, **settings)


def _apex(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Apex's FusedAdam in its capturable form, the one whose update can be skipped without a host sync.

    After NVIDIA/apex at 004da4e, `apex/optimizers/fused_adam.py`; not yet run on a GPU.
    """
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise ConfigError(
            f"optim.impl 'apex' needs NVIDIA's apex with its CUDA extensions ({error}; PyPI's package of that name is "
            "another one): build it from github.com/NVIDIA/apex, or leave optim.impl at 'torch'"
        ) from error
    try:
        optimizer = FusedAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, capturable=True)
    except (RuntimeError, TypeError, AssertionError) as error:  # no GPU, no extensions, older than "capturable"
        raise ConfigError(f"optim.impl 'apex': this apex cannot serve here ({error})") from error
    for group in groups:  # before the first step, so that a checkpoint has where to go
        for p in group["params"]:
            optimizer.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
    return optimizer


def resume(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell an optimizer that was restored how many updates it has made: apex counts them outside of its state."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["step"] = torch.tensor([step], dtype=torch.int, device=group["lr"].device)


def update(optimizer: torch.optim.Optimizer, lr: float, finite: Tensor) -> None:
    """One update at rate `lr` from the gradients, none where `finite` (bool scalar on the device) is False."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # apex's, on the device
            group["lr"].fill_(lr * group["factor"])
        else:
            group["lr"] = lr * group["factor"]
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]:
        _fused_sgd(optimizer, (~finite).float())
    elif optimizer.defaults.get("fused"):
        # The fused optimizer's own switch, GradScaler's: an update under found_inf = 1 changes nothing.
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif optimizer.defaults.get("foreach") is False:
        if finite:  # waits for the device, as the official code's mixed precision does
            optimizer.step()
    else:
        optimizer.step(grad_scaler=_Switch((~finite).float()))  # type: ignore[call-overload]


@torch.no_grad()
def _fused_sgd(optimizer: torch.optim.SGD, skip: Tensor) -> None:
    """The optimizer's own kernel, on this process's shards: torch 2.13 has none of DTensors."""
    for group in optimizer.param_groups:
        parameters = group["params"]
        torch._fused_sgd_(
            [shard(p) for p in parameters],
            [shard(p.grad) for p in parameters],
            [shard(optimizer.state[p]["momentum_buffer"]) for p in parameters],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=False,
            grad_scale=None,
            found_inf=skip,
        )


class _Switch:
    """What apex asks of a GradScaler: whether to skip, and a scale of 1."""

    def __init__(self, skip: Tensor) -> None:
        self.skip = skip

    def _check_inf_per_device(self, _: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.skip.device: self.skip}

    def _get_scale_async(self) -> Tensor:
        return torch.ones_like(self.skip)


def total_steps(config: OptimConfig, steps_per_epoch: float) -> int:
    """Optimizer steps of the whole run."""
    return config.max_steps or math.ceil(config.epochs * steps_per_epoch)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of 0-based `step` out of `steps`: cosine to 0, times a linear warm-up from `warmup_factor`.

    The warm-up multiplies the cosine, as mmcv's hook does for the official code. The cosine falls per step, or, where
    finetuning says so, per epoch.
    """
    done = step / steps
    if isinstance(config, FinetuneOptimConfig) and config.schedule == "epoch":
        done = int(done * config.epochs + 1e-9) / config.epochs  # an epoch's first step is its own
    rate = config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    warmup = steps * config.warmup_epochs / config.epochs
    if step < warmup:
        rate *= config.warmup_factor + (1.0 - config.warmup_factor) * step / warmup
    return rate
