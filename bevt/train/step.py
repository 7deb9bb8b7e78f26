"""One optimizer step: tokens, masked losses, gradients, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from bevt import draws, masking
from bevt.config import AnyConfig, AnyModel, Config, MaskConfig
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.data.sampling import STREAMS
from bevt.models.bevt import MaskedInput, Stream
from bevt.tokenizers import Tokenizer
from bevt.tokenizers.cache import TokenCache
from bevt.train import optim
from bevt.train.distributed import World
from bevt.train.phases import Phases

NO_TOKEN = -1
"""In place of a code where a frame was not tokenised; as a class or an index it is an error."""


def masked_inputs(
    batch: Batch, tokenizer: Tokenizer, config: Config, device: torch.device, cache: TokenCache | None = None
) -> dict[Stream, MaskedInput]:
    """A micro-batch of the loader as the model takes it, on `device`, under `clips` and `images`.

    The tokenizer reads the same augmented crop as the encoder, resized to half its side (224 -> 112: 14x14 codes), and
    only of frames and images that hold a masked position and are not in `cache`; the codes of frames without one are
    `NO_TOKEN`. Which ones is decided on the host. Raises ValueError where the masks are not on the CPU: looking at them
    would wait for the device.
    """
    masks = {"clips": batch.clip_masks, "images": batch.image_masks}
    everything = config.path == "reference"
    tubelet = config.model.tubelet
    needed = {stream: _frames(mask, everything, tubelet) for stream, mask in masks.items() if mask is not None}
    batch = batch.to(device)
    frames: dict[str, Tensor] = {}
    inputs: dict[Stream, MaskedInput] = {}
    if batch.clips is not None:
        frames["clips"] = batch.clips.flatten(0, 1)
    if batch.images is not None:
        frames["images"] = batch.images
        if batch.image_jitter is not None and config.data.jitter > 0:
            frames["images"] = augment.color_jitter(batch.images, batch.image_jitter)
    held = {}
    if cache is not None:
        views = {"clips": batch.clip_slots, "images": batch.image_slots}
        held = {stream: cache.find(stream, views[stream], numbers) for stream, numbers in needed.items()}
    fresh = {stream: numbers[~held[stream].known] if held else numbers for stream, numbers in needed.items()}
    codes, new = _codes(frames, fresh, tokenizer, config.data.crop // 2)
    if cache is not None:
        cache.add({stream: found.records[~found.known] for stream, found in held.items()}, new)
        for stream, found in held.items():
            codes[stream].index_copy_(
                0, augment.sent(needed[stream][found.known], device), augment.sent(found.codes, device)
            )
    if batch.clips is not None and batch.clip_masks is not None:
        clips, mask = batch.clips, batch.clip_masks
        slots = config.model.tubelet * slots_for(config.clip_mask, mask, device)
        inputs["clips"] = MaskedInput(
            augment.to_encoder_clips(clips, config.model.pixels),
            mask,
            codes["clips"].unflatten(0, clips.shape[:2]),
            slots,
        )
    if batch.images is not None and batch.image_masks is not None:
        mask = batch.image_masks
        slots = slots_for(config.image_mask, mask.unsqueeze(1), device)
        pixels = augment.to_encoder_images(frames["images"], config.model.pixels)
        inputs["images"] = MaskedInput(pixels, mask, codes["images"], slots)
    return inputs


def _codes(
    frames: dict[str, Tensor], chosen: dict[str, np.ndarray], tokenizer: Tokenizer, view: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Codes (N, h, w) of each stream's frames (N, H, W, 3), tokenised together, only where chosen; and those alone."""
    index = {stream: augment.sent(numbers, frames[stream].device) for stream, numbers in chosen.items()}
    views = torch.cat([frames[stream].index_select(0, numbers) for stream, numbers in index.items()])
    new = tokenizer.encode(augment.tokenizer_view(views, view))
    parts = new.split([len(numbers) for numbers in index.values()])
    codes = {
        stream: new.new_full((len(frames[stream]), *new.shape[1:]), NO_TOKEN).index_copy_(0, numbers, part)
        for (stream, numbers), part in zip(index.items(), parts)
    }
    return codes, new


def slots_for(config: MaskConfig, mask: Tensor, device: torch.device) -> int:
    """Slots for the masked positions of (B, D, h, w): all that there can be, so that shapes do not depend on the mask.

    On a CPU as many as there are: counting them costs nothing there, and the others would cost a quarter more.
    """
    if device.type == "cpu":
        return int(mask.numpy().sum())  # NumPy: see `_frames`
    depth, height, width = mask.shape[1:]
    return len(mask) * masking.capacity(config, (depth, height, width))


def _frames(mask: Tensor, everything: bool, tubelet: int) -> np.ndarray:
    """Numbers of the frames (of images, for (M, h, w)) that hold a masked position, or of all."""
    if mask.device.type != "cpu":
        raise ValueError(
            f"masks must be on the CPU until the step moves them (bevt/data/batch.py), these are on {mask.device}"
        )
    used = mask.numpy().any((-2, -1)) | everything  # NumPy: what reads values here must not be what waits on a GPU
    if mask.ndim == 4:
        used = used.repeat(tubelet, 1).reshape(-1)
    return used.nonzero()[0]


_DROP_PATH = 2**32
"""Sequence of a sample's random numbers that is drop path's, behind those of its mask (`bevt.masking`)."""


def drop_factors(config: AnyModel, seeds: np.ndarray) -> np.ndarray:
    """Drop path of samples as encoders take it: (blocks, branches, B) float32, 0 or 1 / (1 - rate).

    A function of each sample's seed, so of neither the number of processes nor the size of a micro-batch.
    """
    rates = np.array(config.drop_path_rates)[:, None, None]
    drawn = draws.uniform(draws.sequence(draws.keys(seeds), _DROP_PATH), np.arange(config.branches * len(rates)))
    return ((drawn.T.reshape(len(rates), config.branches, -1) >= rates) / (1 - rates)).astype(np.float32)


def autocast(config: AnyConfig, device: torch.device) -> torch.autocast:
    """The context of a forward pass in `config.train.precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bfloat16")


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device; read it when it is logged."""

    values: dict[str, Tensor]
    """Scalars: loss, loss_* and accuracy_* of each stream, grad_norm (before clipping); with a token cache
    tokens_cached, the share of the frames with a masked position that it had. The mean over processes is the step's."""
    finite: Tensor
    """Bool scalar: loss and all gradients were finite, on every process. Where it is False, the update was skipped."""
    worst: Tensor
    """Int scalar: index, in the order of `model.parameters()`, of the last non-finite gradient; -1: all are finite."""


class Step:
    """What makes a step of a model from micro-batches; this part of it clips and applies the gradients."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: AnyConfig,
        world: World,
        phases: Phases | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.world = model, optimizer, config, world
        self.phases = phases or Phases(model, world.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, lr: float, batches: Sequence[Batch]) -> StepResult:
        """One step at learning rate `lr`. `batches` are this process's micro-batches, as loaded."""
        raise NotImplementedError

    def _update(self, lr: float, sums: dict[str, Tensor]) -> StepResult:
        """Clip and apply the gradients, or skip the update on the device where anything is not finite."""
        grads = [cast(Tensor, p.grad) for p in self.parameters]
        norms = self.world.norms(grads)
        total = torch.linalg.vector_norm(norms)
        order = torch.arange(len(grads), device=norms.device)
        worst = torch.where(norms.isfinite(), -1, order).amax()
        # Of all processes: one that skips what another applies would leave them with different weights.
        finite = self.world.all(sums["loss"].isfinite() & (worst < 0))
        if self.config.optim.clip_grad > 0:
            torch._foreach_mul_(grads, (self.config.optim.clip_grad / (total + 1e-6)).clamp(max=1.0))
        optim.update(self.optimizer, lr, finite)
        self._clear(grads)
        return StepResult({**sums, "grad_norm": total}, finite, worst)

    def _clear(self, grads: list[Tensor]) -> None:
        for p in self.parameters:
            p.grad = None


class MeanStep(Step):
    """A step whose loss is the mean of those of its micro-batches, which are equally large."""

    def inputs(self, batch: Batch) -> tuple[dict[str, Any], Any]:
        """What the model takes, and what `losses` needs besides."""
        raise NotImplementedError

    def losses(self, outputs: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the scalars that are logged, `loss` among them."""
        raise NotImplementedError

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
                    outputs = self.model(**inputs)
                loss, values = self.losses(outputs, targets)
                self.phases.mark("head")
                with record_function("bevt: backward"):
                    (loss * share).backward()
            self.phases.mark("encoder")
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * share
        with record_function("bevt: optimizer"):
            result = self._update(lr, sums)
        self.phases.mark("optimizer")
        return result


class TrainStep(Step):
    """Forward, backward and update over the micro-batches of one step.

    A stream's loss is the mean over all masked positions of the global batch, whatever shares of them the micro-batches
    and processes have. Each stream of a micro-batch has its backward pass before the other's forward, so that one
    stream's activations are alive at a time; the reference path has one backward pass for both, as the official code.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        optimizer: torch.optim.Optimizer,
        config: Config,
        world: World,
        cache: TokenCache | None = None,
        phases: Phases | None = None,
    ) -> None:
        super().__init__(model, optimizer, config, world, phases)
        self.config: Config = config
        self.tokenizer, self.cache = tokenizer, cache
        self.streams: list[Stream] = [s for s in STREAMS if getattr(config.train, s)]
        self.passes = [self.streams] if config.path == "reference" else [[s] for s in self.streams]
        if config.train.cuda_graphs:  # gradients are added to what is there: autograd would keep those in a graph's
            for p in self.parameters:  # memory, which the next micro-batch's replay overwrites
                p.grad = torch.zeros_like(p)

    def __call__(self, lr: float, batches: Sequence[Batch]) -> StepResult:
        """One step at learning rate `lr`. `batches` are this process's micro-batches, as loaded."""
        self.phases.mark("data")
        if self.config.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        weights = self._weights(batches)
        sums = {
            f"{what}_{stream}": torch.zeros((), dtype=torch.float64, device=self.world.device)
            for stream in self.streams
            for what in ("loss", "accuracy")
        }
        for i, batch in enumerate(batches):
            with record_function("bevt: tokenizer"):
                inputs = masked_inputs(batch, self.tokenizer, self.config, self.world.device, self.cache)
            self.phases.mark("tokenizer")
            for streams in self.passes:
                last = i == len(batches) - 1 and streams is self.passes[-1]
                given = {s: self._dropped(inputs.pop(s), getattr(batch, f"{s[:-1]}_seeds")) for s in streams}
                shares = {s: weights[i, self.streams.index(s)] for s in streams}
                for name, value in self.run(given, shares, last).items():
                    sums[name] = sums[name] + value
        loss = torch.zeros((), device=self.world.device)
        for stream in self.streams:
            loss = loss + self._lambda(stream) * sums[f"loss_{stream}"]
        sums = {"loss": loss, **sums}
        if self.cache is not None:
            sums["tokens_cached"] = torch.full((), self.cache.share(), device=self.world.device)  # a kernel, not a copy
        with record_function("bevt: optimizer"):
            result = self._update(lr, sums)
        self.phases.mark("optimizer")
        return result

    def run(self, inputs: dict[Stream, MaskedInput], weights: dict[Stream, Tensor], last: bool) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch's streams; their shares, by `weights`, of the step's figures."""
        with self.world.synchronising(self.model, last):
            with record_function("bevt: forward"), autocast(self.config, self.world.device):
                out = self.model(**inputs)
            self.phases.mark("head")
            shares = [out[f"loss_{s}"] * (weight * self._lambda(s)) for s, weight in weights.items()]
            with record_function("bevt: backward"):
                sum(shares[1:], shares[0]).backward()
            self.phases.mark("encoder")
        return {name: value.detach() * weights[cast(Stream, name.rpartition("_")[2])] for name, value in out.items()}

    def _lambda(self, stream: Stream) -> float:
        return self.config.train.loss_weight if stream == "clips" else 1.0

    def _weights(self, batches: Sequence[Batch]) -> Tensor:
        """(micro-batches, streams): what makes the sum of means, averaged over processes, the mean over all positions.

        Counted on the host, where the masks are, and summed over processes on the device: nobody waits for it.
        """
        counts = np.array(
            [[getattr(batch, f"{stream[:-1]}_masks").numpy().sum() for stream in self.streams] for batch in batches]
        )
        own = augment.sent(counts.astype(np.float64), self.world.device)
        return own / self.world.mean(own.sum(0)).clamp(min=1 / self.world.size)

    def _dropped(self, inputs: MaskedInput, seeds: Tensor | None) -> MaskedInput:
        """`inputs` with drop path's factors, where there are any."""
        if seeds is None or self.config.model.drop_path == 0:
            return inputs
        return replace(inputs, drop=augment.sent(drop_factors(self.config.model, seeds.numpy()), self.world.device))

    def _clear(self, grads: list[Tensor]) -> None:
        if self.config.train.cuda_graphs:
            torch._foreach_zero_(grads)
        else:
            super()._clear(grads)
