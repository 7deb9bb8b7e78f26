"""Pretraining as a task of the loop: masked tokens of clips, images or both (VideoMAE's: `bevt.train.videomae`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bevt import tokenizers
from bevt.budget import step_flop
from bevt.config import AnyConfig, Config, ModelConfig, VideoMAEConfig, ViTConfig, check, tokenizer_settings
from bevt.data.build import StepLoader
from bevt.data.sampling import STREAMS
from bevt.models import weights
from bevt.models.bevt import BEVT, MaskedTokens, TimeSformerBEVT
from bevt.models.reference import ReferenceBEVT
from bevt.models.vit import grid_of
from bevt.models.vit_weights import fitted
from bevt.tokenizers.cache import TokenCache
from bevt.train import checkpoint, memory
from bevt.train.distributed import World, gathered
from bevt.train.loop import RunResult, Task, built, run
from bevt.train.metrics import MetricsWriter, RunError
from bevt.train.optim import build_optimizer, pretraining_rule
from bevt.train.step import TrainStep
from bevt.train.videomae import PixelPretraining


def pretrain(
    config: Config | VideoMAEConfig, out: Path, *, resume: bool = False, quiet: bool = False, profile: bool = False
) -> RunResult:
    """Run `config` into the folder `out`, or continue there with `resume`; signals and errors as `bevt.train.loop.run`.

    At the end held-out data is scored (`bevt.evaluate.masked_tokens`, `pixels`), and `out/pictures` has curves and
    strips.
    """
    check(config)
    task = PixelPretraining(config) if isinstance(config, VideoMAEConfig) else Pretraining(config)
    return run(task, out, resume=resume, quiet=quiet, profile=profile)


class Pretraining(Task):
    """`Task` of a `Config`."""

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config
        self.recomputed: memory.Choice | None = None
        self.cache: TokenCache | None = None

    def prepare(self, world: World, saved: dict[str, Any] | None) -> None:
        config, self.world = self.config, world
        if config.train.memory_budget:  # a budget that cannot be kept is refused before anything is read
            self.recomputed = memory.choose(config, world.size, world.device.type)
        self.tokenizer = tokenizers.build(tokenizer_settings(config), world.device)
        self.digest = tokenizers.digest(config.tokenizer)
        if saved and saved["tokenizer"] != self.digest:
            raise RunError(
                f"the run cannot be resumed: {config.tokenizer.path} is not the tokenizer it predicts the codes of; "
                "give the run's own with --tokenizer.path"
            )

    def attach(self, loader: StepLoader, steps: int, stack: ExitStack) -> None:
        if self.config.tokenizer.cache:
            views: dict[str, tuple[dict[str, Any], int]] = {
                stream: (loader.views(stream), slots) for stream, slots in loader.slots.items()
            }
            self.cache = TokenCache.open(self.config, self.tokenizer, self.digest, self.world.device, views)
            stack.callback(self.cache.close)

    def build(self, *, fresh: bool) -> tuple[nn.Module, str]:
        model = self.model = build_model(self.config, self.tokenizer.vocab_size, self.world.device)
        if self.config.init and fresh:
            return model, f"{self.config.init}: {initialise(model, self.config, self.digest)}"
        return model, ""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        rule = pretraining_rule(self.config.optim, self.config.model)
        return build_optimizer(model, self.config.optim, fused=self.config.path == "fused", rule=rule)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainStep:
        if self.recomputed:
            memory.recompute(cast(BEVT, self.model), self.recomputed)
        return TrainStep(model, self.tokenizer, optimizer, self.config, self.world, self.cache)

    def implementations(self) -> dict[str, str]:
        return self.tokenizer.implementations

    def notes(self) -> Iterator[str]:
        if self.recomputed:
            yield f"{self.recomputed}"

    def flop(self) -> tuple[float, float]:
        return step_flop(self.config)

    def explained(self) -> AbstractContextManager[None]:
        if isinstance(self.config.model, ViTConfig):
            return memory.advised(" or ".join(f"train.micro_{stream}" for stream in self.model.streams))
        return memory.explained(self.config, self.world)

    def saving(self) -> None:
        if self.cache is not None:
            self.cache.flush()

    def plain(self) -> dict[str, Any]:
        return {"tokenizer": self.digest, "streams": list(self.model.streams)}

    def finish(
        self, model: nn.Module, config: AnyConfig, out: Path, step: int, writer: MetricsWriter | None
    ) -> dict[str, float]:
        if not (config.data.val_clips or config.data.val_images):
            return {}
        device = self.world.device
        whole = gathered(
            model,
            self.world,
            config.train.parallel,
            lambda: build_model(self.config, self.tokenizer.vocab_size, device),
        )
        if whole is None:
            return {}
        from bevt.evaluate.masked_tokens import evaluate
        from bevt.pictures.report import draw

        config, whole = cast(Config, config), cast(MaskedTokens, whole)
        evaluation = evaluate(config, whole, self.tokenizer, device)
        if writer:
            writer.write({"event": "eval", "step": step, **evaluation})
        draw(config, out, whole, self.tokenizer, device)
        return evaluation


def build_model(config: Config, vocab_size: int, device: torch.device) -> MaskedTokens:
    """The model of a configuration with only the streams that it trains, on `device`.

    Raises ConfigError where an implementation that the configuration names cannot serve.
    """
    streams = [stream for stream in STREAMS if getattr(config.train, stream)]

    def make(dtype: torch.dtype) -> MaskedTokens:
        model, data = config.model, config.data
        if isinstance(model, ViTConfig):
            grid = grid_of(model, data.frames, data.crop)
            return TimeSformerBEVT(model, vocab_size, streams, grid=grid, device=device, dtype=dtype)
        kind = ReferenceBEVT if config.path == "reference" else BEVT
        return kind(model, vocab_size, streams, device=device, dtype=dtype)

    return built(make, config, device)


def initialise(model: MaskedTokens, config: Config, tokenizer: str) -> weights.Report:
    """Start `model` from the checkpoint `config.init`: of the same stage, or of the image stage (2D windows), inflated.

    `tokenizer` is the digest of the one whose codes will be predicted. Raises CheckpointError for a file that is no
    checkpoint and WeightsError for a model of another size, or one that learned another tokenizer's codes.
    """
    path = Path(config.init)
    saved = checkpoint.load(path, optimizer=False)
    if "tokenizer" not in saved:
        raise checkpoint.CheckpointError(
            f"{path} is a checkpoint of recipe {saved['config'].get('recipe')!r}, which predicts no tokens"
        )
    try:
        if saved["tokenizer"] != tokenizer:
            raise weights.WeightsError(
                f"its head predicts the codes of another tokenizer than {config.tokenizer.path}: "
                "start from a run with the same one"
            )
        if isinstance(model, TimeSformerBEVT) != ("kind" in saved["config"]["model"]):
            raise weights.WeightsError(
                "its encoder is of another kind: a Video Swin and a TimeSformer share no weights"
            )
        if isinstance(model, TimeSformerBEVT):
            return _from_timesformer(model, saved["model"])
        return _from_swin(model, config, saved)
    except weights.WeightsError as error:
        raise weights.WeightsError(f"{path}: {error}") from error


def _from_timesformer(model: TimeSformerBEVT, state: dict[str, Tensor]) -> weights.Report:
    """Of images for clips: what attends over time starts as TimeSformer's does from an image model."""
    unused: list[str] = []
    if "clips" in model.streams:
        state, missing, _ = fitted(state, model.encoder.config, model.encoder.grid)
    else:
        missing, unused = [], [r"encoder\.time_embed", r"encoder\.blocks\.\d+\.temporal_.*"]
    return weights.load(model, state, missing=missing, unused=unused)


def _from_swin(model: MaskedTokens, config: Config, saved: dict[str, Any]) -> weights.Report:
    state, window = saved["model"], tuple(saved["config"]["model"]["window_size"])
    missing, unused = [], []
    if "clips" in model.streams and "clips" not in saved["streams"]:
        if window[0] == 1:
            state = weights.inflate(state, cast(ModelConfig, config.model).window_size)
        missing = [r"video_decoder\..*"]
        if window[0] != 1:
            raise weights.WeightsError(
                f"an image-only run with 3D windows {window} has no weights for clips; "
                "start from recipe 'image_stage' (window (1, h, w)) instead"
            )
    if "images" not in model.streams:
        unused = [r"patch_embed_2d\..*", r"image_decoder\..*"]
    if "clips" not in model.streams:
        unused = [r"patch_embed\..*", r"video_decoder\..*"]
    return weights.load(model, state, missing=missing, unused=unused)
