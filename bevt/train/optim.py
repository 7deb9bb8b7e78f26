"""AdamW with BEVT's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bevt.config import ConfigError, OptimConfig


def undecayed(name: str) -> bool:
    """Whether a parameter is exempt from weight decay: norms and bias tables (official configuration), nothing else."""
    return "norm" in name or name.endswith("relative_position_bias_table")


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """AdamW over two groups; `fused`: one pass over all parameters, which can be skipped on a device-side flag.

    Raises ConfigError where `config.impl` cannot serve.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not undecayed(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if undecayed(name)], "weight_decay": 0.0},
    ]
    if config.impl == "apex":
        return _apex(groups, config)
    settings: dict[str, Any] = {"fused": True} if fused else {"foreach": False}
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
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    if optimizer.defaults.get("fused"):
        # The fused optimizer's own switch, GradScaler's: an update under found_inf = 1 changes nothing.
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif optimizer.defaults.get("foreach") is False:
        if finite:  # waits for the device, as the official code's mixed precision does
            optimizer.step()
    else:
        optimizer.step(grad_scaler=_Switch((~finite).float()))  # type: ignore[call-overload]


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
    """Rate of 0-based `step` out of `steps`: cosine to 0 per step, times a linear warm-up from `warmup_factor`.

    The warm-up multiplies the cosine, as mmcv's hook does for the official code.
    """
    rate = config.lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    warmup = steps * config.warmup_epochs / config.epochs
    if step < warmup:
        rate *= config.warmup_factor + (1.0 - config.warmup_factor) * step / warmup
    return rate
