"""Single steps of a small model, outside the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import changed
from torch import Tensor

from bevt import tokenizers
from bevt.config import Config
from bevt.data.batch import Batch
from bevt.models.bevt import BEVT
from bevt.train.distributed import World
from bevt.train.optim import build_optimizer
from bevt.train.pretrain import build_model
from bevt.train.step import StepResult, TrainStep

WORLD = World(0, 1, torch.device("cpu"))


def split(batch: Batch, parts: int) -> list[Batch]:
    """Equal consecutive shares."""
    tensors = ("clips", "clip_masks", "images", "image_masks", "image_jitter", "clip_seeds", "image_seeds")
    given = [name for name in tensors if getattr(batch, name) is not None]
    shares = zip(*(getattr(batch, name).chunk(parts) for name in given))
    return [Batch(**dict(zip(given, share))) for share in shares]


def trainer(config: Config, seed: int = 0) -> tuple[BEVT, TrainStep]:
    """A seeded model and what steps it."""
    tokenizer = tokenizers.build(config.tokenizer, torch.device("cpu"))
    torch.manual_seed(seed)
    model = build_model(config, tokenizer.vocab_size, WORLD.device)
    return model, TrainStep(model, tokenizer, build_optimizer(model, config.optim), config, WORLD)


def gradients(
    config: Config, batches: list[Batch], prepare: Callable[[BEVT], None] = lambda model: None
) -> tuple[StepResult, dict[str, Tensor]]:
    """What a step of a prepared model leaves, and the gradients it summed up (before clipping)."""
    model, step = trainer(changed(config, optim={"clip_grad": 0.0}))
    prepare(model)
    found: dict[str, Tensor] = {}
    update: Callable[..., Any] = step.optimizer.step

    def record() -> None:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        update()

    step.optimizer.step = record  # type: ignore[method-assign,assignment]
    return step(1e-3, batches), found
