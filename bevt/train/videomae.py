"""VideoMAE's pretraining as a task of the loop: pixels of hidden patches, from clips."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from bevt.budget import step_flop
from bevt.config import AnyConfig, VideoMAEConfig
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.models import vit_names, weights
from bevt.models.videomae import VideoMAE
from bevt.models.vit import grid_of
from bevt.train import checkpoint, memory
from bevt.train.distributed import World, gathered
from bevt.train.loop import Task, built
from bevt.train.metrics import MetricsWriter
from bevt.train.optim import build_optimizer, pretraining_rule
from bevt.train.step import MeanStep, Step


class PixelPretraining(Task):
    """`Task` of a `VideoMAEConfig`."""

    config: VideoMAEConfig

    def __init__(self, config: VideoMAEConfig) -> None:
        self.config = config

    def prepare(self, world: World, saved: dict[str, Any] | None) -> None:
        self.world = world

    def build(self, *, fresh: bool) -> tuple[nn.Module, str]:
        model = build_model(self.config, self.world.device)
        if self.config.init and fresh:
            return model, f"{self.config.init}: {initialise(model, Path(self.config.init))}"
        return model, ""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        rule = pretraining_rule(self.config.optim, self.config.model)
        return build_optimizer(model, self.config.optim, rule=rule)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        return PixelStep(model, optimizer, self.config, self.world)

    def flop(self) -> tuple[float, float]:
        return step_flop(self.config)

    def explained(self) -> AbstractContextManager[None]:
        return memory.advised("train.micro_clips")

    def plain(self) -> dict[str, Any]:
        return {}

    def finish(
        self, model: nn.Module, config: AnyConfig, out: Path, step: int, writer: MetricsWriter | None
    ) -> dict[str, float]:
        config = cast(VideoMAEConfig, config)
        if not config.data.val_clips:
            return {}
        device = self.world.device
        whole = gathered(model, self.world, config.train.parallel, lambda: build_model(self.config, device))
        if whole is None:
            return {}
        from bevt.evaluate.pixels import evaluate
        from bevt.pictures.report import draw_pixels

        evaluation = evaluate(config, cast(VideoMAE, whole), device)
        if writer:
            writer.write({"event": "eval", "step": step, **evaluation})
        draw_pixels(config, out, cast(VideoMAE, whole), device)
        return evaluation


class PixelStep(MeanStep):
    """A step of `VideoMAE`: the mean over clips, which hide as many patches each."""

    config: VideoMAEConfig

    def inputs(self, batch: Batch) -> tuple[dict[str, Any], None]:
        """What the model takes."""
        return pixel_inputs(batch, self.config, self.world.device), None

    def losses(self, outputs: dict[str, Tensor], targets: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's."""
        return outputs["loss_clips"], {"loss": outputs["loss_clips"], **outputs}


def pixel_inputs(batch: Batch, config: VideoMAEConfig, device: torch.device) -> dict[str, Any]:
    """A micro-batch of the loader as `VideoMAE.forward` takes it. Masks are looked at on the host."""
    masks = cast(Tensor, batch.clip_masks)
    if masks.device.type != "cpu":
        raise ValueError(f"masks must be on the CPU until the step moves them, these are on {masks.device}")
    flat = masks.numpy().reshape(len(masks), -1)
    visible, hidden = (np.nonzero(chosen)[1].reshape(len(flat), -1) for chosen in (~flat, flat))
    clips = cast(Tensor, batch.clips).to(device, non_blocking=True)
    return {
        "pixels": augment.to_encoder_clips(clips, config.model.pixels),
        "visible": augment.sent(visible, device),
        "hidden": augment.sent(hidden, device),
        "pixel_std": augment.sent(np.array(config.model.pixels.std, np.float32) / 255, device),
    }


def build_model(config: VideoMAEConfig, device: torch.device) -> VideoMAE:
    """The model of a configuration. Raises ConfigError where an implementation that it names cannot serve."""
    grid = grid_of(config.model, config.data.frames, config.data.crop)
    return built(lambda dtype: VideoMAE(config.model, config.decoder, grid, device=device, dtype=dtype), config, device)


def initialise(model: VideoMAE, path: Path) -> str:
    """Start from a checkpoint of this project or a file of VideoMAE's pretrained weights; what was loaded, in words.

    Raises CheckpointError for a folder that is no checkpoint and WeightsError for weights that do not fit.
    """
    state = checkpoint.load(path, optimizer=False)["model"] if path.is_dir() else weights.read_file(path)
    try:
        source = vit_names.recognise(state, whole=True)
        return f"{source.what}: {weights.load(model, source.state)}"
    except weights.WeightsError as error:
        raise weights.WeightsError(f"{path}: {error}") from error
