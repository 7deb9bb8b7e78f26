"""The training loop, from a configuration to a finished run folder, for whatever is trained (`Task`).

A run folder holds `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` (with `last`), `bad_files.jsonl`
where a file could not be read, `nonfinite.json` where a loss was not finite, and what the task adds at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from bevt_kernels import NoImplementation, Spec
from bevt_kernels.baselines.common import compile_reasons
from torch import Tensor, nn

import bevt
from bevt.config import AnyConfig, ConfigError, command_of, from_dict, to_dict
from bevt.data import DataError
from bevt.data.batch import Batch, Loader
from bevt.data.build import StepLoader, build_loader, check_held_out, held_out_sources, source_kind
from bevt.data.manifest import probe_source
from bevt.data.sampling import STREAMS
from bevt.devices import BFLOAT16
from bevt.models.region import compile_regions
from bevt.train import checkpoint, optim
from bevt.train.distributed import World, join_world
from bevt.train.metrics import BadFiles, Display, Meter, MetricsWriter, RunError, counting
from bevt.train.optim import learning_rate, total_steps
from bevt.train.profile import STEPS, Profile
from bevt.train.step import Step

M = TypeVar("M", bound=nn.Module)

FREE_ON_RESUME = {
    "data.workers", "data.prefetch", "data.worker_death", "data.backend", "train.log_every", "train.checkpoint_every",
    "train.keep", "train.threads", "train.compile", "train.cuda_graphs", "train.parallel", "train.memory_budget",
    "train.micro_clips", "train.micro_images", "train.eval_clips", "train.eval_images", "train.eval_every",
    "test.clips", "test.crops", "test.memory", "test.short_side",
    "data.clips", "data.images", "data.val_clips", "data.val_images", "tokenizer.path", "tokenizer.cache", "init",
}  # fmt: skip
"""Keys a resumed run may change. Moved data is recognised by the loader's own fingerprint, not by its path."""


GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says where another process has ended."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    steps: int
    checkpoint: Path
    evaluation: dict[str, float]
    """Held-out figures of the task; empty without held-out data or where the run was stopped."""

    @property
    def finished(self) -> bool:
        """False where SIGTERM or SIGINT ended it early."""
        return self.step >= self.steps


class Task:
    """What a run trains. The loop calls the methods in about this order, in every process."""

    config: AnyConfig
    labels: np.ndarray | None = None
    """Class numbers of the training files."""
    fixed_on_resume: frozenset[str] = frozenset()
    """Keys of `FREE_ON_RESUME` that this task may not change."""

    def prepare(self, world: World, saved: dict[str, Any] | None) -> None:
        """What can be refused before any file is looked at; `saved`: the state of the checkpoint to continue from."""
        raise NotImplementedError

    def look(self, saved: dict[str, Any] | None) -> None:
        """What the files' manifests, which are there now, have to say."""

    def attach(self, loader: StepLoader, steps: int, stack: ExitStack) -> None:
        """The data is open, and so the run's length known; `stack` ends with the run."""

    def build(self, *, fresh: bool) -> tuple[nn.Module, str]:
        """The model, from `config.init` where the run is `fresh`; and what to tell of that."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Of the wrapped model's parameters."""
        raise NotImplementedError

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        """What makes a step of the wrapped model."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside model and optimizer; they are read back in place."""
        return {}

    def implementations(self) -> dict[str, str]:
        """Of what is no part of the model."""
        return {}

    def notes(self) -> Iterator[str]:
        """Lines to print before the first step."""
        return iter(())

    def flop(self) -> tuple[float, float]:
        """Counted operations of a step over all devices: of a tokenizer, and of all else; 0: not counted."""
        return 0.0, 0.0

    def explained(self) -> AbstractContextManager[None]:
        """A context that says more of errors in a step."""
        return nullcontext()

    def saving(self) -> None:
        """A checkpoint is about to be written."""

    def plain(self) -> dict[str, Any]:
        """What a checkpoint's `state.json` says of the task."""
        raise NotImplementedError

    def due(self, step: int) -> bool:
        """Whether an evaluation comes after this step, which is not the last one."""
        return False

    def evaluate(self, model: nn.Module, config: AnyConfig, stop: Stop) -> dict[str, float]:
        """Held-out figures in the middle of a run; nothing where `stop` cut it short."""
        return {}

    def finish(
        self, model: nn.Module, config: AnyConfig, out: Path, step: int, writer: MetricsWriter | None
    ) -> dict[str, float]:
        """Held-out figures of the finished run, as a row in `writer` (the first process's) too; may be empty."""
        raise NotImplementedError


def run(task: Task, out: Path, *, resume: bool = False, quiet: bool = False, profile: bool = False) -> RunResult:
    """Run the task into the folder `out`, or continue there with `resume`; `profile` records a few steps into it.

    SIGTERM and SIGINT end training after the current step, with a checkpoint; what comes before, looking at the files,
    and after, evaluation, they end as they end any program, and `resume` takes it up again. Raises ConfigError,
    DataError, CheckpointError, WeightsError or RunError with a message for a person.
    """
    with joined() as world, ExitStack() as stack:
        saved = _open_run(task, out, world, stack, resume)
        return _train(task, out, world, stack, saved, quiet, profile)


@contextmanager
def joined() -> Iterator[World]:
    """The world while the context lasts. Where another process has ended, RunError says so."""
    world = join_world()
    try:
        yield world
    except RuntimeError as error:
        if world.size == 1 or not any(said in str(error) for said in GONE):
            raise
        raise RunError("another process of this run has ended; what it said tells why") from error
    finally:
        world.close()


def _train(
    task: Task,
    out: Path,
    world: World,
    stack: ExitStack,
    saved: dict[str, Any] | None,
    quiet: bool,
    profiled: bool,
) -> RunResult:
    config = task.config
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    start = saved["step"] if saved else 0
    task.prepare(world, saved)
    _probe_sources(config, world, quiet)
    task.look(saved)
    stop = stack.enter_context(Stop())
    bad_files = BadFiles(out, world)
    loader = _build_loader(task, world, prefer=saved["implementations"].get("decoding", "") if saved else "")
    stack.callback(loader.close)
    steps = total_steps(config.optim, loader.steps_per_epoch)
    task.attach(loader, steps, stack)
    if profiled and steps - start < STEPS:
        raise RunError(
            f"--profile takes {STEPS} steps, and this run has {max(steps - start, 0)} left: leave it out, or start a "
            "new run with a larger optim.max_steps"
        )
    display = Display(config.recipe, start, steps, enabled=world.main and not quiet)
    stack.callback(display.close)
    torch.manual_seed(config.train.seed)
    model, said = task.build(fresh=saved is None)
    if said:
        display.note(said)
    compiled = _compile(config, model, world.device)
    wrapped = world.wrap(model, config.train.parallel)
    optimizer = task.optimizer(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    gpu = world.device.type == "cuda"
    tokenizing, training = task.flop() if gpu else (0.0, 0.0)
    meter = Meter(config, world, names, out, flop=training, tokenizing=tokenizing, peak=_rate(config, world.device))
    implementations = {**cast("dict[str, str]", model.implementations), **task.implementations()}
    implementations |= {"decoding": loader.backend, "encoder": compiled}
    train_step = task.step(wrapped, optimizer)
    checkpoints = checkpoint.Checkpoints(out / "checkpoints", world, config.train.keep)
    stack.callback(checkpoints.close)
    if saved:
        assert checkpoints.newest is not None
        with _naming_a_way_on():
            checkpoint.restore(checkpoints.newest, model, optimizer, task.tensors())
        optim.resume(optimizer, start)
        meter.load_state_dict(saved["meter"])
        try:
            loader.load_state_dict(saved["loader"])
        except ValueError as error:
            raise RunError(f"{out} cannot be resumed: {error}") from error
        display.note(f"resumed {out} at step {start}")
        for op, was, now in _differences(saved["implementations"], implementations):
            display.note(f"{op} was {was}, is {now}: from here on the run rounds differently than it would have")
    display.note(_describe(config, model, implementations, loader, world, steps))
    if compiled != "eager":
        display.note("compiling: the first step takes a minute or more")
    for note in task.notes():
        display.note(note)
    if config.data.backend == "auto":
        display.note(f"decoding by {loader.backend}: {loader.choice.why}")
    if world.main:
        bad_files.add(loader.unreadable)
    writer = MetricsWriter(out, start) if world.main else None
    if writer:
        stack.callback(writer.close)

    def save(step: int) -> Path:
        meter.check_finite()
        task.saving()
        plain = {
            "command": command_of(config),
            "config": to_dict(config),
            **task.plain(),
            "loader": loader.state_dict(),
            "meter": meter.state_dict(),
            "versions": {
                "bevt": bevt.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            "implementations": implementations,
        }
        return checkpoints.save(step, model, optimizer, plain, task.tensors())

    profile = Profile(out, world.device) if profiled and world.main else None
    if profile:
        stack.callback(profile.close)
    batches: Iterator[Batch] = iter(loader)
    step = start
    meter.start()
    train_step.phases.start()
    while step < steps and not world.any(stop.requested):
        if step and task.due(step):  # here, and not after the step, so that a resumed run makes it too
            with meter.paused(train_step.phases):
                evaluation = task.evaluate(model, loader.config, stop)
            if world.any(stop.requested):
                break
            if writer:
                writer.write({"event": "eval", "step": step, **evaluation})
            display.note(f"step {step}: {_figures(evaluation)}")
        try:
            micro = [meter.wait_for(batches) for _ in range(loader.accumulation)]
        except DataError:
            if world.size == 1 and step > start:  # several processes could not meet to write it
                kept = save(step)
                checkpoints.wait()
                display.note(f"what was trained is kept in {kept}")
            raise
        with task.explained():
            result = train_step(learning_rate(config.optim, step, steps), micro)
        step += 1
        meter.add(step, micro, result)
        display.step(step)
        if profile:
            with meter.paused(train_step.phases) if profile.busy else nullcontext():
                profile.step()
        bad_files.add(entry for batch in micro for entry in batch.bad)
        checkpointed = step % config.train.checkpoint_every == 0 or step == steps
        # A checkpoint closes a row, so that the rows after it do not depend on whether the run was cut short.
        logged = step % config.train.log_every == 0 or checkpointed
        if logged or world.device.type == "cpu":
            meter.check_finite()
        if logged:
            row = meter.row(step, learning_rate(config.optim, step - 1, steps), train_step.phases.read())
            if writer:
                writer.write(row)
            display.row(row, eta_seconds=(steps - step) * row["step_seconds"])
        if checkpointed or (checkpoints.writing and world.any(checkpoints.failed)):
            save(step)
        if logged:
            train_step.phases.start()
    if step < steps:
        save(step)
    checkpoints.wait()
    last = checkpoints.newest
    if profile:
        display.note(
            f"profile: {profile.folder}" if profile.done else "--profile recorded nothing: the run was stopped"
        )
    loader.close()
    stop.end()
    if step == steps and world.any(stop.requested):  # too late for the steps, not for what comes after them
        display.note(f"the run is complete and kept in {last}; --resume evaluates it")
        signal.raise_signal(stop.number or signal.SIGTERM)
    evaluation = {}
    if step == steps:
        try:
            evaluation = task.finish(model, loader.config, out, step, writer)
        except (DataError, KeyboardInterrupt) as error:
            mended = "with the data mended, " if isinstance(error, DataError) else ""
            display.note(f"the run is complete and kept in {last}; {mended}--resume evaluates it")
            raise
    assert last is not None
    return RunResult(step, steps, last, evaluation)


def _build_loader(task: Task, world: World, prefer: str) -> StepLoader:
    """The data of this process, decoded by what the first one settles on; `prefer`: what the run began with."""
    config = task.config
    loader = None
    if world.main:
        loader = build_loader(config, prefer=prefer, world_size=world.size, kept=True, labels=task.labels)
    name = world.broadcast(loader.backend if loader else "")
    if loader:
        return loader
    settled = replace(config, data=replace(config.data, backend=cast(Any, name)))
    return build_loader(settled, rank=world.rank, world_size=world.size, kept=True, labels=task.labels)


def built(make: Callable[[torch.dtype], M], config: AnyConfig, device: torch.device) -> M:
    """The model that `make` makes for products in the run's precision, on `device` and in its parameters' type.

    Raises ConfigError where an implementation that the configuration names cannot serve.
    """
    dtype = getattr(torch, config.train.precision)
    try:
        return make(dtype).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    except NoImplementation as error:
        raise ConfigError(f"model: {error}") from error


def _compile(config: AnyConfig, model: nn.Module, device: torch.device) -> str:
    """Compile the encoder's regions where `train.compile` says so; how they run then, for people and checkpoints.

    Raises ConfigError where it says so and they cannot be compiled.
    """
    train, fused = config.train, getattr(config, "path", "fused") == "fused"
    graphs = getattr(train, "cuda_graphs", False)
    if graphs and device.type != "cuda":
        raise ConfigError(f"train.cuda_graphs needs a CUDA GPU, this runs on the {device.type}: leave it out")
    if not (train.compile == "yes" or (train.compile == "auto" and device.type == "cuda" and fused)):
        return "eager"
    if reasons := compile_reasons(Spec(device.type, torch.float32)):
        raise ConfigError(f"train.compile: {'; '.join(reasons)}; or set it to 'no'")
    compile_regions(model, cuda_graphs=graphs)
    return "compiled, CUDA graphs" if graphs else "compiled"


def _rate(config: AnyConfig, device: torch.device) -> float:
    """FLOP/s of the device's matrix products in the run's precision; 0: not known."""
    if device.type != "cuda" or config.train.precision != "bfloat16":
        return 0.0
    return BFLOAT16.get(torch.cuda.get_device_name(device), 0.0)


def _probe_sources(config: AnyConfig, world: World, quiet: bool) -> None:
    """Look at every file of the run's data once, held-out data included, in one process before the others need it."""
    for stream in STREAMS if world.main else ():
        if getattr(config.train, stream):
            with counting(f"probing {stream}", enabled=not quiet) as progress:
                probe_source(getattr(config.data, stream), source_kind(config.data, stream), progress=progress)
    for kind, source in held_out_sources(config) if world.main else ():
        with counting(f"probing held-out {kind}", enabled=not quiet) as progress:
            check_held_out(probe_source(source, kind, progress=progress), config.data.backend)
    world.barrier()


def _open_run(task: Task, out: Path, world: World, stack: ExitStack, resume: bool) -> dict[str, Any] | None:
    """Make or reopen the run folder, held by this run until `stack` ends; what the newest checkpoint says, if any."""
    config = task.config
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file; name a folder")
    try:
        if world.main:
            out.mkdir(parents=True, exist_ok=True)
            hold(out, stack)
    except OSError as error:
        raise RunError(f"cannot write to --out {out}: {error.strerror}; name a folder that can be written") from error
    world.barrier()
    found = checkpoint.latest(out / "checkpoints")
    if not resume and ((out / "metrics.jsonl").exists() or found):
        raise RunError(f"{out} already holds a run: continue it with --resume, or name another folder with --out")
    with _naming_a_way_on():
        saved = checkpoint.read_state(found) if found else None
    if saved:
        kind = saved.get("command", "pretrain")
        if kind != command_of(config):
            raise RunError(
                f"{out} holds a run of `bevt {kind}`: continue it with that, or name another folder with --out"
            )
        if set(saved["config"]) != set(to_dict(config)):
            raise RunError(
                f"{out} holds a run of another kind, of recipe {saved['config'].get('recipe')!r}: continue it with "
                "that, or name another folder with --out"
            )
        changed = [
            f"{key} = {old!r}, now {new!r}"
            for key, old, new in _differences(to_dict(from_dict(saved["config"], type(config))), to_dict(config))
            if key not in FREE_ON_RESUME - task.fixed_on_resume
        ]
        if changed:
            raise RunError(
                f"{out} cannot be resumed with another configuration: {'; '.join(changed)}. "
                "Give the run's own values, or start a new run from its weights with --init"
            )
    if world.main:
        (out / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    world.barrier()
    return saved


@contextmanager
def _naming_a_way_on() -> Iterator[None]:
    """Where the newest checkpoint of a run is refused."""
    try:
        yield
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(
            f"{error}; to continue at the checkpoint before it, if there is one, delete that folder and resume again"
        ) from error


def hold(out: Path, stack: ExitStack) -> None:
    """Keep other processes from working in the same folder: a lock that ends with this process, however it ends."""
    lock = stack.enter_context((out / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"another process is at work in {out}: wait for it, end it, or name another --out") from error


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{where}{key}.")
        elif a != b:
            yield where + key, a, b


def _figures(evaluation: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in evaluation.items())


def _describe(
    config: AnyConfig, model: nn.Module, implementations: dict[str, str], loader: Loader, world: World, steps: int
) -> str:
    """What is about to run, in three lines."""
    million = sum(p.numel() for p in model.parameters()) / 1e6
    train = config.train
    streams = [stream for stream in STREAMS if getattr(train, stream)]
    chosen = ", ".join(f"{op} {impl}" for op, impl in implementations.items())
    batch = " + ".join(f"{getattr(train, stream)} {stream}" for stream in STREAMS)
    return (
        f"{config.recipe}: {' + '.join(streams)}, {million:.1f} M parameters, {train.precision}, "
        f"{world.size} x {world.device}\n"
        f"implementations: {chosen}\n"
        f"{steps} steps of {batch}, {loader.steps_per_epoch:.1f} steps an epoch, "
        f"{loader.accumulation} micro-batches a step and process"
    )


class Stop:
    """Context in which SIGTERM and SIGINT ask the loop to end after its step, a second SIGINT at once."""

    def __init__(self) -> None:
        self.number = 0
        """The first signal that came."""

    @property
    def requested(self) -> bool:
        """One has come."""
        return self.number != 0

    def __enter__(self) -> Stop:
        self._old = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self.requested and signum == signal.SIGINT:
            before = self._old[signal.SIGINT]
            (before if callable(before) else signal.default_int_handler)(signum, frame)
        self.number = self.number or signum
        # os.write: a print could interrupt one that is under way.
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C once more abandons it\n")

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        """Leave the signals to whoever had them before; idempotent."""
        while self._old:
            signal.signal(*self._old.popitem())
