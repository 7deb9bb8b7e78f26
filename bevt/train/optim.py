"""AdamW with BEVT's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from bevt.config import OptimConfig


def undecayed(name: str) -> bool:
    """Whether a parameter is exempt from weight decay: norms and bias tables (official configuration), nothing else."""
    return "norm" in name or name.endswith("relative_position_bias_table")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over two groups, fused: one pass over all parameters, and it can skip an update on a device-side flag."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not undecayed(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if undecayed(name)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
