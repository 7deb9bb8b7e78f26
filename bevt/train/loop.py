"""The training loop, from a configuration to a finished run folder.

A run folder holds `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` (with `last`), `bad_files.jsonl`
where a file could not be read, `nonfinite.json` where a loss was not finite, and `pictures/` at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from bevt_kernels import NoImplementation, Spec
from bevt_kernels.baselines.common import compile_reasons
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import bevt
from bevt import tokenizers
from bevt.budget import step_flop
from bevt.config import Config, ConfigError, check, from_dict, to_dict, tokenizer_settings
from bevt.data import DataError
from bevt.data.batch import Loader
from bevt.data.build import StepLoader, build_loader, check_held_out, source_kind
from bevt.data.manifest import Kind, probe_source
from bevt.devices import BFLOAT16
from bevt.models import weights
from bevt.models.bevt import BEVT, Stream
from bevt.models.reference import ReferenceBEVT
from bevt.models.region import compile_regions
from bevt.tokenizers.cache import TokenCache
from bevt.train import checkpoint, memory, optim
from bevt.train.distributed import World, join_world
from bevt.train.metrics import BadFiles, Display, Meter, MetricsWriter, RunError, counting
from bevt.train.optim import build_optimizer, learning_rate, total_steps
from bevt.train.profile import STEPS, Profile
from bevt.train.step import TrainStep

FREE_ON_RESUME = {
    "data.workers", "data.prefetch", "data.worker_death", "data.backend", "train.log_every", "train.checkpoint_every",
    "train.keep", "train.threads", "train.compile", "train.cuda_graphs", "train.parallel", "train.memory_budget",
    "train.micro_clips", "train.micro_images", "train.eval_clips", "train.eval_images",
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
    """Held-out figures (`bevt.evaluate.masked_tokens`); empty without held-out data or where the run was stopped."""

    @property
    def finished(self) -> bool:
        """False where SIGTERM or SIGINT ended it early."""
        return self.step >= self.steps


def pretrain(
    config: Config, out: Path, *, resume: bool = False, quiet: bool = False, profile: bool = False
) -> RunResult:
    """Run `config` into the folder `out`, or continue there with `resume`; `profile` records a few steps into it.

    SIGTERM and SIGINT end training after the current step, with a checkpoint; what comes before, looking at the files,
    and after, evaluation, they end as they end any program, and `resume` takes it up again. Raises ConfigError,
    DataError, CheckpointError, WeightsError or RunError with a message for a person.
    """
    check(config)
    world = join_world()
    try:
        with ExitStack() as stack:
            saved = _open_run(config, out, world, stack, resume)
            return _train(config, out, world, stack, saved, quiet, profile)
    except RuntimeError as error:
        if world.size == 1 or not any(said in str(error) for said in GONE):
            raise
        raise RunError("another process of this run has ended; what it said tells why") from error
    finally:
        world.close()


def _train(
    config: Config,
    out: Path,
    world: World,
    stack: ExitStack,
    saved: dict[str, Any] | None,
    quiet: bool,
    profiled: bool,
) -> RunResult:
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    recomputed = None
    if config.train.memory_budget:  # a budget that cannot be kept is refused before anything is read
        recomputed = memory.choose(config, world.size, world.device.type)
    tokenizer = tokenizers.build(tokenizer_settings(config), world.device)
    digest = tokenizers.digest(config.tokenizer)
    start = saved["step"] if saved else 0
    if saved and saved["tokenizer"] != digest:
        raise RunError(
            f"{out} cannot be resumed: {config.tokenizer.path} is not the tokenizer it predicts the codes of; "
            "give the run's own with --tokenizer.path"
        )
    _probe_sources(config, world, quiet)
    stop = stack.enter_context(Stop())
    bad_files = BadFiles(out, world)
    loader = _build_loader(config, world, prefer=saved["implementations"].get("decoding", "") if saved else "")
    stack.callback(loader.close)
    cache = None
    if config.tokenizer.cache:
        views: dict[str, tuple[dict[str, Any], int]] = {
            stream: (loader.views(stream), slots) for stream, slots in loader.slots.items()
        }
        cache = TokenCache.open(config, tokenizer, digest, world.device, views)
        stack.callback(cache.close)
    steps = total_steps(config.optim, loader.steps_per_epoch)
    if profiled and steps - start < STEPS:
        raise RunError(
            f"--profile takes {STEPS} steps, and this run has {max(steps - start, 0)} left: leave it out, or start a "
            "new run with a larger optim.max_steps"
        )
    display = Display(config.recipe, start, steps, enabled=world.main and not quiet)
    stack.callback(display.close)
    torch.manual_seed(config.train.seed)
    model = build_model(config, tokenizer.vocab_size, world.device)
    if config.init and not saved:
        display.note(f"{config.init}: {initialise(model, config, digest)}")
    compiled = _compile(config, model, world.device)
    wrapped = world.wrap(model, config.train.parallel)
    optimizer = build_optimizer(model, config.optim, fused=config.path == "fused")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    gpu = world.device.type == "cuda"
    tokenizing, training = step_flop(config) if gpu else (0.0, 0.0)
    rate = _rate(config, world.device)
    meter = Meter(config, world, names, out, flop=training, tokenizing=tokenizing, peak=rate)
    implementations = {**model.implementations, **tokenizer.implementations, "decoding": loader.backend}
    implementations["encoder"] = compiled
    checkpoints = checkpoint.Checkpoints(out / "checkpoints", world, config.train.keep)
    stack.callback(checkpoints.close)
    if saved:
        assert checkpoints.newest is not None
        with _naming_a_way_on():
            checkpoint.restore(checkpoints.newest, model, optimizer)
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
    if recomputed:
        memory.recompute(model, recomputed)
        display.note(f"{recomputed}")
    if config.data.backend == "auto":
        display.note(f"decoding by {loader.backend}: {loader.choice.why}")
    if world.main:
        bad_files.add(loader.unreadable)
    train_step = TrainStep(wrapped, tokenizer, optimizer, config, world, cache)
    writer = MetricsWriter(out, start) if world.main else None
    if writer:
        stack.callback(writer.close)

    def save(step: int) -> Path:
        meter.check_finite()
        if cache is not None:
            cache.flush()
        plain = {
            "config": to_dict(config),
            "tokenizer": digest,
            "streams": list(model.streams),
            "loader": loader.state_dict(),
            "meter": meter.state_dict(),
            "versions": {
                "bevt": bevt.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            "implementations": implementations,
        }
        return checkpoints.save(step, model, optimizer, plain)

    profile = Profile(out, world.device) if profiled and world.main else None
    if profile:
        stack.callback(profile.close)
    batches = iter(loader)
    step = start
    meter.start()
    train_step.phases.start()
    while step < steps and not world.any(stop.requested):
        try:
            micro = [meter.wait_for(batches) for _ in range(loader.accumulation)]
        except DataError:
            if world.size == 1 and step > start:  # several processes could not meet to write it
                kept = save(step)
                checkpoints.wait()
                display.note(f"what was trained is kept in {kept}")
            raise
        with memory.explained(config, world):
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
    evaluation: dict[str, float] = {}
    scored = step == steps and (config.data.val_clips or config.data.val_images)
    whole = _whole(model, config, tokenizer.vocab_size, world) if scored else model
    if scored and world.main:
        try:
            evaluation = _finish(loader.config, out, whole, tokenizer, world.device, step, writer)
        except (DataError, KeyboardInterrupt) as error:
            mended = "with the data mended, " if isinstance(error, DataError) else ""
            display.note(f"the run is complete and kept in {last}; {mended}--resume evaluates it")
            raise
    assert last is not None
    return RunResult(step, steps, last, evaluation)


def _build_loader(config: Config, world: World, prefer: str) -> StepLoader:
    """The data of this process, decoded by what the first one settles on; `prefer`: what the run began with."""
    loader = build_loader(config, prefer=prefer, world_size=world.size, kept=True) if world.main else None
    name = world.broadcast(loader.backend if loader else "")
    if loader:
        return loader
    settled = replace(config, data=replace(config.data, backend=cast(Any, name)))
    return build_loader(settled, rank=world.rank, world_size=world.size, kept=True)


def build_model(config: Config, vocab_size: int, device: torch.device) -> BEVT:
    """The model of a configuration with only the streams that it trains, on `device`.

    Raises ConfigError where an implementation that the configuration names cannot serve.
    """
    streams: list[Stream] = []
    if config.train.clips:
        streams.append("clips")
    if config.train.images:
        streams.append("images")
    dtype = getattr(torch, config.train.precision)
    kind = ReferenceBEVT if config.path == "reference" else BEVT
    try:
        model = kind(config.model, vocab_size, streams, device=device, dtype=dtype)
        return model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    except NoImplementation as error:
        raise ConfigError(f"model: {error}") from error


def _compile(config: Config, model: BEVT, device: torch.device) -> str:
    """Compile the encoder's regions where `train.compile` says so; how they run then, for people and checkpoints.

    Raises ConfigError where it says so and they cannot be compiled.
    """
    train = config.train
    if train.cuda_graphs and device.type != "cuda":
        raise ConfigError(f"train.cuda_graphs needs a CUDA GPU, this runs on the {device.type}: leave it out")
    wanted = train.compile == "yes" or (train.compile == "auto" and device.type == "cuda" and config.path == "fused")
    if not wanted:
        return "eager"
    if reasons := compile_reasons(Spec(device.type, torch.float32)):
        raise ConfigError(f"train.compile: {'; '.join(reasons)}; or set it to 'no'")
    compile_regions(model, cuda_graphs=train.cuda_graphs)
    return "compiled, CUDA graphs" if train.cuda_graphs else "compiled"


def _rate(config: Config, device: torch.device) -> float:
    """FLOP/s of the device's matrix products in the run's precision; 0: not known."""
    if device.type != "cuda" or config.train.precision != "bfloat16":
        return 0.0
    return BFLOAT16.get(torch.cuda.get_device_name(device), 0.0)


def _whole(model: BEVT, config: Config, vocab_size: int, world: World) -> BEVT:
    """`model` with whole parameters in the first process, for evaluation; the others take part in gathering them."""
    if world.size == 1 or config.train.parallel != "fsdp":
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not world.main:
        return model
    whole = build_model(config, vocab_size, world.device)
    weights.load(whole, cast("dict[str, torch.Tensor]", state))
    return whole


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


def _probe_sources(config: Config, world: World, quiet: bool) -> None:
    """Look at every file of the run's data once, held-out data included, in one process before the others need it."""
    kinds: tuple[Kind, ...] = ("clips", "images")
    for kind in kinds if world.main else ():
        if not getattr(config.train, kind):
            continue
        with counting(f"probing {kind}", enabled=not quiet) as progress:
            probe_source(getattr(config.data, kind), source_kind(config.data, kind), progress=progress)
        held_out = getattr(config.data, f"val_{kind}")
        if held_out and getattr(config.train, f"eval_{kind}"):
            with counting(f"probing held-out {kind}", enabled=not quiet) as progress:
                manifest = probe_source(held_out, source_kind(config.data, kind), progress=progress)
                check_held_out(manifest, config.data.backend)
    world.barrier()


def _open_run(config: Config, out: Path, world: World, stack: ExitStack, resume: bool) -> dict[str, Any] | None:
    """Make or reopen the run folder, held by this run until `stack` ends; what the newest checkpoint says, if any."""
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file; name a folder")
    try:
        if world.main:
            out.mkdir(parents=True, exist_ok=True)
            _hold(out, stack)
    except OSError as error:
        raise RunError(f"cannot write to --out {out}: {error.strerror}; name a folder that can be written") from error
    world.barrier()
    found = checkpoint.latest(out / "checkpoints")
    if not resume and ((out / "metrics.jsonl").exists() or found):
        raise RunError(f"{out} already holds a run: continue it with --resume, or name another folder with --out")
    with _naming_a_way_on():
        saved = checkpoint.read_state(found) if found else None
    if saved:
        changed = [
            f"{key} = {old!r}, now {new!r}"
            for key, old, new in _differences(to_dict(from_dict(saved["config"])), to_dict(config))
            if key not in FREE_ON_RESUME
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


def _hold(out: Path, stack: ExitStack) -> None:
    """Keep other processes from training in the same folder: a lock that ends with this process, however it ends."""
    lock = stack.enter_context((out / ".lock").open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"another process is training in {out}: wait for it, end it, or name another --out") from error


def _differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{where}{key}.")
        elif a != b:
            yield where + key, a, b


def _describe(
    config: Config, model: BEVT, implementations: dict[str, str], loader: Loader, world: World, steps: int
) -> str:
    """What is about to run, in three lines."""
    million = sum(p.numel() for p in model.parameters()) / 1e6
    train = config.train
    chosen = ", ".join(f"{op} {impl}" for op, impl in implementations.items())
    return (
        f"{config.recipe}: {' + '.join(model.streams)}, {million:.1f} M parameters, {train.precision}, "
        f"{world.size} x {world.device}\n"
        f"implementations: {chosen}\n"
        f"{steps} steps of {train.clips} clips + {train.images} images, {loader.steps_per_epoch:.1f} steps an epoch, "
        f"{loader.accumulation} micro-batches a step and process"
    )


def _finish(
    config: Config,
    out: Path,
    model: BEVT,
    tokenizer: tokenizers.Tokenizer,
    device: torch.device,
    step: int,
    writer: MetricsWriter | None,
) -> dict[str, float]:
    """Score the held-out data and draw the pictures."""
    from bevt.evaluate.masked_tokens import evaluate
    from bevt.pictures.report import draw

    evaluation = evaluate(config, model, tokenizer, device)
    if writer:
        writer.write({"event": "eval", "step": step, **evaluation})
    draw(config, out, model, tokenizer, device)
    return evaluation


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
