"""Learning classes as a task of the loop: finetuning a pretrained encoder, or training heads on its frozen features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bevt.budget import step_flop
from bevt.config import AnyConfig, AnyModel, FinetuneConfig, ModelConfig, ViTConfig, check, from_dict
from bevt.data.build import StepLoader, source_kind
from bevt.data.classes import are_numbers, class_numbers, found_classes, read_classes, without_files
from bevt.data.manifest import Manifest, probe_source
from bevt.models import names, vit_names, vit_weights, weights
from bevt.models.classifier import Classifier, VideoSwinClassifier, build
from bevt.models.probes import Probes
from bevt.train import checkpoint, memory
from bevt.train.classify import ClassStep
from bevt.train.distributed import World
from bevt.train.loop import RunResult, Stop, Task, built, run
from bevt.train.metrics import MetricsWriter, RunError
from bevt.train.optim import Rule, build_optimizer, finetuning_rule, undecayed
from bevt.train.step import Step


def finetune(
    config: FinetuneConfig, out: Path, *, resume: bool = False, quiet: bool = False, profile: bool = False
) -> RunResult:
    """Run `config` into the folder `out`, or continue there with `resume`; signals and errors as `bevt.train.loop.run`.

    Held-out files are classified by one view each every `train.eval_every` epochs and at the end.
    """
    check(config)
    return run(Finetuning(config), out, resume=resume, quiet=quiet, profile=profile)


class Finetuning(Task):
    """`Task` of a `FinetuneConfig`."""

    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig) -> None:
        self.config, self.stream = config, config.stream
        self.average: dict[str, Tensor] = {}
        self.said: list[str] = []

    def prepare(self, world: World, saved: dict[str, Any] | None) -> None:
        self.world = world
        self.classes = read_classes(self.config.head.classes) if self.config.head.classes else ()

    def look(self, saved: dict[str, Any] | None) -> None:
        data = self.config.data
        source = getattr(data, self.stream)
        manifest = self._manifest(source)
        self.classes = self.classes or found_classes(manifest, source)
        numbered = bool(self.config.head.classes) or are_numbers(self.classes)
        self.labels = class_numbers(manifest, source, self.classes, numbered=numbered)
        if absent := without_files(self.labels, self.classes):
            self.said.append(f"{absent} have no training file: nothing is learned of them")
        held_out = getattr(data, f"val_{self.stream}")
        if held_out:
            self.held_out = self._manifest(held_out)
            self.held_out_labels = class_numbers(self.held_out, held_out, self.classes, numbered=numbered)
            if absent := without_files(self.held_out_labels, self.classes):
                self.said.append(f"{absent} have no held-out file")
        if saved and saved["classes"] != list(self.classes):
            raise RunError(
                f"the run cannot be resumed: it learned {len(saved['classes'])} classes, and these are "
                f"{len(self.classes)}, or others, or in another order; give the run's own data and --head.classes"
            )

    def _manifest(self, source: str) -> Manifest:
        return probe_source(source, source_kind(self.config.data, self.stream), kept=True)

    def build(self, *, fresh: bool) -> tuple[nn.Module, str]:
        model = build_classifier(self.config, len(self.classes), self.world.device)
        backbone = model.backbone if isinstance(model, Probes) else cast(Classifier, model)
        if self.config.init and fresh:
            return model, f"{self.config.init}: {initialise(backbone, self.config)}"
        return model, "from random weights, as there is no --init" if fresh else ""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, self.config.optim, rule=rule_of(self.config))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        if self.config.optim.ema:
            named = [(name.removeprefix("module."), p) for name, p in model.named_parameters()]
            self.average = {f"average.{name}": p.detach().clone() for name, p in named if p.requires_grad}
        return ClassStep(
            model, optimizer, self.config, self.world, len(self.classes), self.config.head.names, self.average
        )

    def flop(self) -> tuple[float, float]:
        return step_flop(self.config, len(self.classes))

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def notes(self) -> Iterator[str]:
        yield f"{len(self.classes)} classes: {', '.join(self.classes[:5])}{', ...' if len(self.classes) > 5 else ''}"
        yield from self.said

    def explained(self) -> AbstractContextManager[None]:
        return memory.advised(f"train.micro_{self.stream}")

    def plain(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    def attach(self, loader: StepLoader, steps: int, stack: ExitStack) -> None:
        self.steps_between = loader.steps_per_epoch * self.config.train.eval_every

    def due(self, step: int) -> bool:
        passed, before = (int(at / self.steps_between + 1e-9) for at in (step, step - 1))
        return bool(getattr(self.config.data, f"val_{self.stream}")) and passed > before

    def evaluate(self, model: nn.Module, config: AnyConfig, stop: Stop) -> dict[str, float]:
        return self._scores(model, cast(FinetuneConfig, config), lambda: stop.requested)

    def finish(
        self, model: nn.Module, config: AnyConfig, out: Path, step: int, writer: MetricsWriter | None
    ) -> dict[str, float]:
        if not getattr(config.data, f"val_{self.stream}"):
            return {}
        evaluation = self._scores(model, cast(FinetuneConfig, config), lambda: False)
        if writer:
            writer.write({"event": "eval", "step": step, **evaluation})
        return evaluation

    def _scores(self, model: nn.Module, config: FinetuneConfig, stopped: Callable[[], bool]) -> dict[str, float]:
        """Of the held-out files by one view each: the averaged weights' where there are such."""
        from bevt.evaluate.classification import classify
        from bevt.evaluate.scores import scores

        found = classify(
            self._whole(model),
            config,
            self.held_out,
            self.classes,
            self.world,
            views=(1, 1),
            labels=self.held_out_labels,
            stopped=stopped,
        )
        out: dict[str, float] = {}
        for (head, _), predictions in found.items():
            reached = scores(predictions)
            for what in ("top1", "top5", "mean_class"):
                if (value := getattr(reached, what)) is not None:
                    out[f"val_{what}{f' {head}' if head else ''}"] = value
        return out

    def _whole(self, model: nn.Module) -> nn.Module:
        """What is tested: `model`, or a copy that has the averaged weights, or all of those that are sharded."""
        average = {name.partition(".")[2]: value for name, value in self.average.items()}
        sharded = self.world.size > 1 and self.config.train.parallel == "fsdp"
        if not average and not sharded:
            return model
        state = {**model.state_dict(), **average}
        whole = build_classifier(self.config, len(self.classes), self.world.device)
        weights.load(whole, {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()})
        return whole


def rule_of(config: FinetuneConfig) -> Callable[[str], Rule]:
    """The rates and decays of the parameters of the configuration's model, by name."""
    return _probing_rule(config) if config.head.probes else finetuning_rule(config.optim, config.model)


def rates(config: FinetuneConfig, classes: int) -> dict[str, Rule]:
    """Every trained parameter's, by name, in the order of the model; nothing is allocated."""
    rule = rule_of(config)
    check(as_if_trained(config))
    with torch.device("meta"):
        model = build_classifier(config, classes, torch.device("meta"))
    return {name: rule(name) for name, p in model.named_parameters() if p.requires_grad}


def as_if_trained(config: FinetuneConfig) -> FinetuneConfig:
    """`config` for `check` where nothing is trained, and so no training files are named."""
    stream = config.stream
    source: Any = {stream: getattr(config.data, stream) or "none"}
    return replace(config, data=replace(config.data, **source))


def _probing_rule(config: FinetuneConfig) -> Callable[[str], Rule]:
    """Of `Probes`."""
    rates = [rate for _ in config.head.probes for rate in config.head.probe_lrs]
    decay = config.optim.weight_decay
    return lambda name: Rule(rates[int(name.split(".")[1])], 0.0 if undecayed(name) else decay)


def build_classifier(config: FinetuneConfig, classes: int, device: torch.device) -> nn.Module:
    """The model of a configuration on `device`: a classifier, or `Probes` on a frozen one.

    Raises ConfigError where an implementation that the configuration names cannot serve.
    """

    def make(dtype: torch.dtype) -> nn.Module:
        model = build(config, classes, device=device, dtype=dtype)
        kinds = [kind for kind in config.head.probes for _ in config.head.probe_lrs]
        return Probes(model, kinds) if kinds else model

    return built(make, config, device)


def initialise(model: Classifier, config: FinetuneConfig) -> str:
    """Start `model` from `config.init`; what was loaded, kept and left out, in words.

    Raises CheckpointError for a folder that is no checkpoint and WeightsError for weights that do not fit.
    """
    path = Path(config.init)
    if not path.exists():
        raise weights.WeightsError(f"--init {path}: there is no such checkpoint and no such file of weights")
    source = read_weights(path, config.model)
    try:
        return f"{source.what}: {_start(model, source, config)}"
    except weights.WeightsError as error:
        raise weights.WeightsError(f"{path}: {error}") from error


def _start(model: Classifier, source: names.Source, config: FinetuneConfig) -> weights.Report:
    if isinstance(model, VideoSwinClassifier):
        own = cast(ModelConfig, config.model)
        norm = own.quirks == "official" or not source.masked
        return weights.start(model, source, own.window_size, config.stream, norm=norm)
    return vit_weights.start(model, source)


def read_weights(path: Path, model: AnyModel) -> names.Source:
    """The weights of a checkpoint of this project, of any stage, or of a file of somebody's, for such a model."""
    if not path.is_dir():
        state = weights.read_file(path)
    else:
        saved = checkpoint.load(path, optimizer=False)
        state = {**saved["model"], **saved.get("average", {})}
    try:
        own = {name.removeprefix("backbone."): value for name, value in state.items()} if path.is_dir() else state
        return vit_names.recognise(own) if isinstance(model, ViTConfig) else names.recognise(own)
    except weights.WeightsError as error:
        raise weights.WeightsError(f"{path}: {error}") from error


def restore(path: Path, config: FinetuneConfig, device: torch.device) -> tuple[nn.Module, tuple[str, ...]]:
    """A finetuned model as `config` describes it, averaged weights where there are such, and the names of its classes.

    `path` is a checkpoint, or a file of somebody's weights with a head. Raises CheckpointError or WeightsError where it
    is of another stage or does not fit.
    """
    if not path.is_dir():
        source = read_weights(path, config.model)
        if "head.weight" not in source.state:
            raise weights.WeightsError(
                f"{path}: {source.what} has no head for classes: finetune it first (--init {path})"
            )
        count = len(source.state["head.weight"])
        classes = read_classes(config.head.classes) if config.head.classes else tuple(map(str, range(count)))
        if len(classes) != count:
            raise weights.WeightsError(
                f"{path}: its head has {count} classes, {config.head.classes} names {len(classes)}"
            )
        model = build_classifier(config, count, device)
        try:
            weights.take(model, source)
        except weights.WeightsError as error:
            raise weights.WeightsError(f"{path}: {error}") from error
        return model, classes
    saved = checkpoint.load(path, optimizer=False)
    _of_classes(path, saved)
    classes = read_classes(config.head.classes) if config.head.classes else tuple(saved["classes"])
    if len(classes) != len(saved["classes"]):
        raise weights.WeightsError(
            f"{path} has learned {len(saved['classes'])} classes, {config.head.classes} names {len(classes)}"
        )
    model = build_classifier(config, len(classes), device)
    try:
        weights.load(model, {**saved["model"], **saved.get("average", {})})
    except weights.WeightsError as error:
        raise weights.WeightsError(f"{path}: {error}") from error
    return model, classes


def own_config(path: Path) -> FinetuneConfig:
    """The configuration of a finetuned model's checkpoint. Raises CheckpointError for another one."""
    saved = checkpoint.read_state(path)
    _of_classes(path, saved)
    return from_dict(saved["config"], FinetuneConfig)


def _of_classes(path: Path, saved: dict[str, Any]) -> None:
    """Raise CheckpointError where the checkpoint is not of a `Finetuning`."""
    if "classes" not in saved:
        kind = saved["config"]["model"].get("kind")
        recipe = f"{kind}_k400" if kind else "k400"
        raise checkpoint.CheckpointError(
            f"{path} is a checkpoint of pretraining ({saved['config'].get('recipe')!r}), which knows no classes: "
            f"finetune it first, as in `bevt finetune {recipe} --init {path}`"
        )
