"""Contrastive learning of images as a task of the loop: MoBY, the paper's baseline without labels and without masks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from bevt_kernels import NoImplementation
from torch import Tensor, nn
from torch.profiler import record_function

from bevt.config import AnyConfig, ConfigError, ContrastConfig, check
from bevt.data.batch import Batch
from bevt.data.build import StepLoader
from bevt.data.views import byol
from bevt.models.moby import MoBY, key_momentum
from bevt.train import memory
from bevt.train.distributed import World
from bevt.train.loop import RunResult, Task, run
from bevt.train.metrics import MetricsWriter, RunError
from bevt.train.optim import build_optimizer, total_steps
from bevt.train.step import Step, StepResult, autocast, drop_factors, sent


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

    def attach(self, loader: StepLoader, stack: ExitStack) -> None:
        self.steps = total_steps(self.config.optim, loader.steps_per_epoch)

    def build(self, *, fresh: bool) -> tuple[nn.Module, str]:
        c, device, dtype = self.config, self.world.device, getattr(torch, self.config.train.precision)
        try:
            self.model = MoBY(
                c.model,
                queue=c.moby.queue,
                temperature=c.moby.temperature,
                processes=self.world.size,
                device=device,
                dtype=dtype,
            )
        except NoImplementation as error:
            raise ConfigError(f"model: {error}") from error
        return self.model.to(device, torch.float64 if dtype == torch.float64 else torch.float32), ""

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


class ContrastStep(Step):
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
        self.phases.mark("data")
        share = 1 / len(batches)
        self.inner.update_keys(key_momentum(self.at, self.steps, self.config.moby.momentum))
        sums: dict[str, Tensor] = {}
        keys: list[Tensor] = []
        for i, batch in enumerate(batches):
            with record_function("bevt: augmentation"):
                inputs = self.inputs(batch)
            self.phases.mark("data")
            with self.world.synchronising(self.model, last=i == len(batches) - 1):
                with record_function("bevt: forward"), autocast(self.config, self.world.device):
                    out = self.model(**inputs)
                keys.append(out.pop("keys"))
                self.phases.mark("head")
                with record_function("bevt: backward"):
                    (out["loss_images"] * share).backward()
            self.phases.mark("encoder")
            for name, value in {"loss": out["loss_images"], **out}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() * share
        with record_function("bevt: optimizer"):
            result = self._update(lr, sums)
            self.inner.enqueue(self.world.concatenate(torch.cat(keys, 1), 1), self.at)
        self.at += 1
        self.phases.mark("optimizer")
        return result

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model takes: the first and second cuts, which lie in turn in the batch, and drop path's factors."""
        device = self.world.device
        images = cast(Tensor, batch.to(device).images)
        seeds = cast(Tensor, batch.image_seeds).numpy()
        drop: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.config.model.drop_path:
            first, second = (sent(drop_factors(self.config.model, seeds[i::2]), device) for i in (0, 1))
            drop = first, second
        return {
            "first": byol(images[::2], seeds[::2], second=False),
            "second": byol(images[1::2], seeds[1::2], second=True),
            "drop": drop,
        }
