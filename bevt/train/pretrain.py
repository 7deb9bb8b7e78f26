"""Pretraining as a task of the loop: masked tokens of clips, images or both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from bevt import tokenizers
from bevt.budget import step_flop
from bevt.config import AnyConfig, Config, check, tokenizer_settings
from bevt.data.build import StepLoader
from bevt.models import weights
from bevt.models.bevt import BEVT, Stream
from bevt.models.reference import ReferenceBEVT
from bevt.tokenizers.cache import TokenCache
from bevt.train import checkpoint, memory
from bevt.train.distributed import World
from bevt.train.loop import RunResult, Task, built, run
from bevt.train.metrics import MetricsWriter, RunError
from bevt.train.optim import build_optimizer
from bevt.train.step import TrainStep


def pretrain(
    config: Config, out: Path, *, resume: bool = False, quiet: bool = False, profile: bool = False
) -> RunResult:
    """Run `config` into the folder `out`, or continue there with `resume`; signals and errors as `bevt.train.loop.run`.

    At the end held-out data is scored (`bevt.evaluate.masked_tokens`), and `out/pictures` has curves and strips.
    """
    check(config)
    return run(Pretraining(config), out, resume=resume, quiet=quiet, profile=profile)


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
        return build_optimizer(model, self.config.optim, fused=self.config.path == "fused")

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainStep:
        if self.recomputed:
            memory.recompute(self.model, self.recomputed)
        return TrainStep(model, self.tokenizer, optimizer, self.config, self.world, self.cache)

    def implementations(self) -> dict[str, str]:
        return self.tokenizer.implementations

    def notes(self) -> Iterator[str]:
        if self.recomputed:
            yield f"{self.recomputed}"

    def flop(self) -> tuple[float, float]:
        return step_flop(self.config)

    def explained(self) -> AbstractContextManager[None]:
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
        whole = self._whole(cast(BEVT, model))
        if whole is None:
            return {}
        from bevt.evaluate.masked_tokens import evaluate
        from bevt.pictures.report import draw

        config, device = cast(Config, config), self.world.device
        evaluation = evaluate(config, whole, self.tokenizer, device)
        if writer:
            writer.write({"event": "eval", "step": step, **evaluation})
        draw(config, out, whole, self.tokenizer, device)
        return evaluation

    def _whole(self, model: BEVT) -> BEVT | None:
        """`model` with whole parameters in the first process; None in the others, which take part in gathering them."""
        state: dict[str, Tensor] = {}
        sharded = self.world.size > 1 and self.config.train.parallel == "fsdp"
        if sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
        if not self.world.main:
            return None
        if sharded:
            model = build_model(self.config, self.tokenizer.vocab_size, self.world.device)
            weights.load(model, state)
        return model


def build_model(config: Config, vocab_size: int, device: torch.device) -> BEVT:
    """The model of a configuration with only the streams that it trains, on `device`.

    Raises ConfigError where an implementation that the configuration names cannot serve.
    """
    streams: list[Stream] = []
    if config.train.clips:
        streams.append("clips")
    if config.train.images:
        streams.append("images")
    kind = ReferenceBEVT if config.path == "reference" else BEVT
    return built(lambda dtype: kind(config.model, vocab_size, streams, device=device, dtype=dtype), config, device)


def initialise(model: BEVT, config: Config, tokenizer: str) -> weights.Report:
    """Start `model` from the checkpoint `config.init`: of the same stage, or of the image stage (2D windows), inflated.

    `tokenizer` is the digest of the one whose codes will be predicted. Raises CheckpointError for a file that is no
    checkpoint and WeightsError for a model of another size, or one that learned another tokenizer's codes.
    """
    path = Path(config.init)
    saved = checkpoint.load(path, optimizer=False)
    state, window = saved["model"], tuple(saved["config"]["model"]["window_size"])
    missing, unused = [], []
    try:
        if saved["tokenizer"] != tokenizer:
            raise weights.WeightsError(
                f"its head predicts the codes of another tokenizer than {config.tokenizer.path}: "
                "start from a run with the same one"
            )
        if "clips" in model.streams and "clips" not in saved["streams"]:
            if window[0] == 1:
                state = weights.inflate(state, config.model.window_size)
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
    except weights.WeightsError as error:
        raise weights.WeightsError(f"{path}: {error}") from error
