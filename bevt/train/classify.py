"""One optimizer step of learning classes: augmentation, loss, gradients, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from bevt import draws
from bevt.config import FinetuneConfig
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.data.randaugment import rand_augment
from bevt.data.sampling import Stream
from bevt.train.distributed import World
from bevt.train.step import Step, StepResult, autocast, drop_factors, sent

_DROPOUT = 2**32 + 5
"""Sequence of a sample's random numbers that is dropout's, behind those of drop path and augmentation."""


class ClassStep(Step):
    """Forward, backward and update over the micro-batches of one step.

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
        self.stream: Stream = "clips" if config.train.clips else "images"
        self.average = list((average or {}).values())

    def __call__(self, lr: float, batches: Sequence[Batch]) -> StepResult:
        self.phases.mark("data")
        share = 1 / len(batches)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            with record_function("bevt: augmentation"):
                inputs, targets = self.inputs(batch)
            self.phases.mark("data")
            with self.world.synchronising(self.model, last=i == len(batches) - 1):
                with record_function("bevt: forward"), autocast(self.config, self.world.device):
                    logits = self.model(**inputs)
                loss, values = self._losses(logits.float() if logits.dtype == torch.bfloat16 else logits, targets)
                self.phases.mark("head")
                with record_function("bevt: backward"):
                    (loss * share).backward()
            self.phases.mark("encoder")
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * share
        with record_function("bevt: optimizer"):
            result = self._update(lr, sums)
            if self.average:
                self._follow()
        self.phases.mark("optimizer")
        return result

    @torch.no_grad()
    def _follow(self) -> None:
        """The averaged weights go their share of the way to the trained ones."""
        average, trained = (list(map(_local, values)) for values in (self.average, self.parameters))
        torch._foreach_lerp_(average, trained, 1 - self.config.optim.ema)

    def inputs(self, batch: Batch) -> tuple[dict[str, Tensor | None], Tensor]:
        """What the model takes, and the targets (B, K), on the device."""
        device, a = self.world.device, self.config.augment
        labels = cast(Tensor, getattr(batch, f"{self.stream[:-1]}_labels")).to(device, non_blocking=True)
        seeds = cast(Tensor, getattr(batch, f"{self.stream[:-1]}_seeds")).numpy()
        moved = batch.to(device)
        if self.stream == "clips":
            frames = cast(Tensor, moved.clips)
        else:
            frames = cast(Tensor, moved.images)
            if moved.image_jitter is not None and self.config.data.jitter > 0:
                frames = augment.color_jitter(frames, moved.image_jitter)
            frames = frames.unsqueeze(1)
        if a.rand_augment:
            official = self.config.model.quirks == "official"
            frames = rand_augment(frames, seeds, a.rand_augment, a.magnitude, official=official)
        pixels = augment.to_encoder_clips(frames)
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
                drop = sent(drop_factors(self.config.model, seeds), device)
            if self.config.head.dropout:
                keep = sent(dropout(seeds, 8 * self.config.model.embed_dim, self.config.head.dropout), device)
        return {"pixels": pixels, "drop": drop, "keep": keep}, targets

    def _losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of (B, K) or (heads, B, K) logits; what is logged of them."""
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


def _local(tensor: Any) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
