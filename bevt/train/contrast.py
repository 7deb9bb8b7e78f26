"""Contrastive learning of images as a task of the loop: MoBY, the paper's baseline without labels and without masks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bevt.config import AnyConfig, ContrastConfig, check
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.data.build import StepLoader
from bevt.data.views import byol
from bevt.models.moby import MoBY, key_momentum
from bevt.train import memory
from bevt.train.distributed import World
from bevt.train.loop import RunResult, Task, built, run
from bevt.train.metrics import MetricsWriter, RunError
from bevt.train.optim import build_optimizer
from bevt.train.step import MeanStep, StepResult, drop_factors


def contrast(
    config: ContrastConfig, out: Path, *, resume: bool = False, quiet: bool = False, profile: bool = False
) -> RunResult:
    """Run `config` into the folder `out`, or continue there with `resume`; otherwise as `bevt.train.loop.run`."""
    check(config)
    return run(Contrasting(config), out, resume=resume, quiet=quiet, profile=profile)


class Contrasting(Task):
    """`Task` of a `ContrastConfig`."""

    config: ContrastConfig
    fixed_on_resume = frozenset({"train.micro_images"})

    def __init__(self, config: ContrastConfig) -> None:
        self.config = config

    def prepare(self, world: World, saved: dict[str, Any] | None) -> None:
        self.world, self.start = world, saved["step"] if saved else 0
        if saved and saved["processes"] != world.size:
            raise RunError(
                f"the run cannot be resumed by {world.size} processes: its heads' BatchNorm is over the images of "
                f"{saved['processes']}"
            )

    def explained(self) -> AbstractContextManager[None]:
        return memory.advised("train.micro_images")

    def attach(self, loader: StepLoader, steps: int, stack: ExitStack) -> None:
        self.steps = steps

    def build(self, *, fresh: bool) -> tuple[nn.Module, str]:
        c, device = self.config, self.world.device
        queue, temperature, processes = c.moby.queue, c.moby.temperature, self.world.size

        def make(dtype: torch.dtype) -> MoBY:
            return MoBY(c.model, queue=queue, temperature=temperature, processes=processes, device=device, dtype=dtype)

        self.model = built(make, c, device)
        return self.model, ""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, self.config.optim)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> ContrastStep:
        return ContrastStep(model, self.model, optimizer, self.config, self.world, self.start, self.steps)

    def plain(self) -> dict[str, Any]:
        return {"processes": self.world.size}

    def finish(
        self, model: nn.Module, config: AnyConfig, out: Path, step: int, writer: MetricsWriter | None
    ) -> dict[str, float]:
        return {}


class ContrastStep(MeanStep):
    """Keys, forward and backward, update and queue of one step; of `inner` and, where it is wrapped, `model`.

    `start` and `steps`: the first step that is made, and the run's length, on which the keys' momentum depends.
    """

    config: ContrastConfig

    def __init__(
        self,
        model: nn.Module,
        inner: MoBY,
        optimizer: torch.optim.Optimizer,
        config: ContrastConfig,
        world: World,
        start: int,
        steps: int,
    ) -> None:
        super().__init__(model, optimizer, config, world)
        self.inner, self.at, self.steps = inner, start, steps

    def __call__(self, lr: float, batches: Sequence[Batch]) -> StepResult:
        self.inner.update_keys(key_momentum(self.at, self.steps, self.config.moby.momentum))
        self.keys: list[Tensor] = []
        result = super().__call__(lr, batches)
        self.inner.enqueue(self.world.concatenate(torch.cat(self.keys, 1), 1), self.at)
        self.phases.mark("optimizer")
        self.at += 1
        return result

    def losses(self, outputs: dict[str, Tensor], targets: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's; its keys are kept for the queue."""
        self.keys.append(outputs.pop("keys"))
        return outputs["loss_images"], {"loss": outputs["loss_images"], **outputs}

    def inputs(self, batch: Batch) -> tuple[dict[str, Any], None]:
        """What the model takes: the first and second cuts, which lie in turn in the batch, and drop path's factors."""
        device = self.world.device
        images = cast(Tensor, batch.to(device).images)
        seeds = cast(Tensor, batch.image_seeds).numpy()
        drop: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.config.model.drop_path:
            first, second = (augment.sent(drop_factors(self.config.model, seeds[i::2]), device) for i in (0, 1))
            drop = first, second
        views = {
            "first": byol(images[::2], seeds[::2], second=False),
            "second": byol(images[1::2], seeds[1::2], second=True),
        }
        return {**views, "drop": drop}, None
