"""One optimizer step of learning classes: augmentation, loss, gradients, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt import draws
from bevt.config import FinetuneConfig
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.data.randaugment import rand_augment
from bevt.train.distributed import World, shard
from bevt.train.step import MeanStep, StepResult, drop_factors

_DROPOUT = 2**32 + 5
"""Sequence of a sample's random numbers that is dropout's, behind those of drop path and augmentation."""


class ClassStep(MeanStep):
    """A step of learning classes.

    The loss is the mean over the samples of the global batch, and over the heads where there are several (`probes`).
    `names` are those of the heads, `average` (by parameters' names) the weights that follow the trained ones with
    `optim.ema`.
    """

    config: FinetuneConfig

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: FinetuneConfig,
        world: World,
        classes: int,
        names: Sequence[str] = (),
        average: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, optimizer, config, world)
        self.classes, self.names = classes, names
        self.stream = config.stream
        self.average = list((average or {}).values())

    def __call__(self, lr: float, batches: Sequence[Batch]) -> StepResult:
        result = super().__call__(lr, batches)
        if self.average:
            self._follow()
        self.phases.mark("optimizer")
        return result

    @torch.no_grad()
    def _follow(self) -> None:
        """The averaged weights go their share of the way to the trained ones."""
        average, trained = (list(map(shard, values)) for values in (self.average, self.parameters))
        torch._foreach_lerp_(average, trained, 1 - self.config.optim.ema)

    def inputs(self, batch: Batch) -> tuple[dict[str, Tensor | None], Tensor]:
        """What the model takes, and the targets (B, K), on the device."""
        device, a = self.world.device, self.config.augment
        labels = augment.sent(cast(Tensor, getattr(batch, f"{self.stream[:-1]}_labels")).numpy(), device)
        seeds = cast(Tensor, getattr(batch, f"{self.stream[:-1]}_seeds")).numpy()
        moved = batch.to(device)
        if self.stream == "clips":
            frames = cast(Tensor, moved.clips)
        else:
            frames = cast(Tensor, moved.images)
            if moved.image_jitter is not None and self.config.data.jitter > 0:
                frames = augment.color_jitter(frames, moved.image_jitter)
            frames = frames.unsqueeze(1)
        if a.repeats > 1:  # the cuts of a file lie side by side, where mixing would pair them
            order = np.arange(len(seeds)).reshape(-1, a.repeats).T.reshape(-1)
            seeds, index = seeds[order], augment.sent(order, device)
            frames, labels = frames.index_select(0, index), labels.index_select(0, index)
        if a.color or a.grey:
            frames = augment.color_augment(frames, seeds, a.color, a.grey)
        if a.rand_augment:
            official = self.config.model.quirks == "official"
            frames = rand_augment(frames, seeds, a.rand_augment, a.magnitude, official=official)
        pixels = augment.to_encoder_clips(frames, self.config.model.pixels)
        targets = augment.smooth(labels, self.classes, a.label_smoothing)
        if a.erasing:
            pixels = augment.erase(pixels, seeds, a.erasing)
        if a.mixup or a.cutmix:
            pixels, targets = augment.mix(pixels, targets, seeds, a.mixup, a.cutmix)
        if self.stream == "images":
            pixels = pixels.squeeze(2)
        drop = keep = None
        if not self.names:  # frozen features drop nothing
            if self.config.model.drop_path:
                drop = augment.sent(drop_factors(self.config.model, seeds), device)
            if self.config.head.dropout:
                keep = augment.sent(dropout(seeds, self.config.model.channels, self.config.head.dropout), device)
        return {"pixels": pixels, "drop": drop, "keep": keep}, targets

    def losses(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of (B, K) or (heads, B, K) logits; what is logged of them."""
        logits = outputs.float() if outputs.dtype == torch.bfloat16 else outputs
        heads = logits.view(-1, *targets.shape)
        losses = torch.stack([F.cross_entropy(head, targets.to(head.dtype)) for head in heads])
        right = (heads.argmax(-1) == targets.argmax(-1)).double().mean(-1)
        values: dict[str, Tensor] = {f"loss_{self.stream}": losses.mean(), f"accuracy_{self.stream}": right.mean()}
        values |= {f"accuracy {name}": value for name, value in zip(self.names, right)}
        loss = losses.sum() if self.names else losses.mean()
        return loss, {"loss": losses.mean(), **values}


def dropout(seeds: np.ndarray, channels: int, rate: float) -> np.ndarray:
    """Dropout's factors of samples, (B, channels) float32, 0 or 1 / (1 - rate): a function of each sample's seed."""
    drawn = draws.uniform(draws.sequence(draws.keys(seeds), _DROPOUT), np.arange(channels))
    return ((drawn >= rate) / (1 - rate)).astype(np.float32)
