"""One optimizer step: tokens, masked losses, gradients, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bevt import masking
from bevt.config import Config
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.models.bevt import MaskedInput
from bevt.models.video_swin import PATCH
from bevt.tokenizers import Tokenizer
from bevt.train.distributed import World


def masked_inputs(batch: Batch, tokenizer: Tokenizer, config: Config) -> dict[str, MaskedInput]:
    """A micro-batch on the device as the model takes it, under `clips` and `images`.

    The tokenizer reads the same augmented crop as the encoder, resized to half its side (224 -> 112: 14x14 codes).
    """
    view = config.data.crop // 2
    inputs = {}
    if batch.clips is not None and batch.clip_masks is not None:
        clips, frames = batch.clips, batch.clips.shape[1]
        codes = tokenizer.encode(augment.tokenizer_view(clips.flatten(0, 1), view))
        grid = cast("tuple[int, int, int]", tuple(batch.clip_masks.shape[1:]))
        slots = len(clips) * PATCH[0] * masking.capacity(config.clip_mask, grid)
        inputs["clips"] = MaskedInput(
            augment.to_encoder_clips(clips), batch.clip_masks, codes.unflatten(0, (-1, frames)), slots
        )
    if batch.images is not None and batch.image_masks is not None:
        images = batch.images
        if batch.image_jitter is not None and config.data.jitter > 0:
            images = augment.color_jitter(images, batch.image_jitter)
        codes = tokenizer.encode(augment.tokenizer_view(images, view))
        slots = len(images) * masking.capacity(config.image_mask, (1, *batch.image_masks.shape[1:]))
        inputs["images"] = MaskedInput(augment.to_encoder_images(images), batch.image_masks, codes, slots)
    return inputs


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The context of a forward pass in `config.train.precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch for one step: drop path is a function of (seed, step, rank), so a resumed run is the run."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device; read it when it is logged."""

    values: dict[str, Tensor]
    """Scalars: loss, loss_* and accuracy_* of each stream, grad_norm (before clipping)."""
    finite: Tensor
    """Bool scalar: loss and all gradients were finite, on every process. Where it is False, the update was skipped."""
    worst: Tensor
    """Int scalar: index, in the order of `model.parameters()`, of the last non-finite gradient; -1: all are finite."""


class TrainStep:
    """Forward, backward and update over the micro-batches of one step."""

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, config: Config, world: World
    ) -> None:
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.config, self.world = config, world
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, step: int, lr: float, batches: Sequence[Batch]) -> StepResult:
        """Run 0-based `step` at learning rate `lr`. `batches` are this process's micro-batches, on any device."""
        config, device = self.config, self.world.device
        seed_step(config.train.seed, step, self.world.rank)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            inputs = masked_inputs(batch.to(device), self.tokenizer, config)
            with self.world.without_sync(self.model, skip=i < len(batches) - 1):
                with autocast(config, device):
                    out = self.model(**inputs)
                loss = torch.zeros((), device=device)
                if "loss_images" in out:
                    loss = loss + out["loss_images"]
                if "loss_clips" in out:
                    loss = loss + config.train.loss_weight * out["loss_clips"]
                (loss / len(batches)).backward()
            for name, value in (("loss", loss), *out.items()):
                sums[name] = sums.get(name, 0) + value.detach() / len(batches)
        return self._update(lr, sums)

    def _update(self, lr: float, sums: dict[str, Tensor]) -> StepResult:
        """Clip and apply the gradients, or skip the update on the device where anything is not finite."""
        grads = [cast(Tensor, p.grad) for p in self.parameters]
        norms = torch.stack(torch._foreach_norm(grads))
        total = torch.linalg.vector_norm(norms)
        order = torch.arange(len(grads), device=norms.device)
        worst = torch.where(norms.isfinite(), -1, order).amax()
        # Of all processes: one that skips what another applies would leave them with different weights.
        finite = self.world.all(sums["loss"].isfinite() & (worst < 0))
        if self.config.optim.clip_grad > 0:
            torch._foreach_mul_(grads, (self.config.optim.clip_grad / (total + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The fused optimizer's own switch, GradScaler's: an update under found_inf = 1 changes nothing.
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult({**sums, "grad_norm": total}, finite, worst)
