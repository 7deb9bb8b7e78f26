"""From a configuration to micro-batches: which samples make a step, who decodes them, and what happens when one fails.

Step s covers the stream positions s * C .. (s + 1) * C - 1, C = `train.clips` (likewise images). Its micro-batches, in
order, take equal consecutive shares of them, and within each the ranks do. So the set of samples of a step depends on
neither the number of devices nor the size of a micro-batch, and nothing depends on the number of worker processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from bevt.config import AnyConfig, Config, ConfigError, ContrastConfig, DataConfig, FinetuneConfig, VideoMAEConfig
from bevt.data import DataError, pyav, torchcodec
from bevt.data.batch import BadFile, Batch
from bevt.data.check import changed
from bevt.data.decoding import Backend, Masks, Plan, Processes
from bevt.data.files import ReadError
from bevt.data.manifest import Kind, Manifest, open_source, probe_source
from bevt.data.sampling import NEVER_REPLACED, STREAMS, Request, Sampler, Stream

MOST_SUBSTITUTES = 10
"""Unreadable files in a row for one position after which the data counts as broken."""

BACKENDS = ("dali", "torchcodec", "pyav")
"""Decoders by name."""

CANDIDATES = ("dali", "pyav")
"""Those that `auto` chooses from: what has been compared with each other on real files."""

MOST_LISTED = 500
"""Unreadable held-out files that an error lists."""

TRIAL_SECONDS = 3.0
"""How long `choose_backend` times each candidate, from its second micro-batch on."""

FRAMES_PER_CLIP = 4
"""Frames that `frame_batches` takes from one clip: decoding costs most of the way to the last one anyway."""

_NOTHING = "it decoded none of the first samples"

_log = logging.getLogger("bevt.data")


def build_loader(
    config: AnyConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    prefer: str = "",
    kept: bool = False,
    labels: np.ndarray | None = None,
) -> StepLoader:
    """The training data of one device, from step 0 on (`load_state_dict` continues elsewhere).

    `labels`: class numbers of the one stream's files (`bevt.data.classes`), where classes are learned.

    A file that turns out unreadable is logged and listed in `Batch.bad`; those that the index knows already are in
    `unreadable`. `prefer` as in `choose_backend`, `kept` as in `probe_source`. Raises ConfigError where the batch sizes
    do not divide, the backend cannot serve or a mask does not fit the crop, DataError where a source holds nothing that
    can be read.
    """
    return StepLoader(config, rank, world_size, prefer, kept, labels)


def source_kind(data: DataConfig, stream: Stream) -> Kind:
    """What the files of a stream's source are: videos for images too, where those are frames of them."""
    return "clips" if stream == "images" and data.image_source == "frames" else stream


def held_out_sources(config: AnyConfig) -> list[tuple[Kind, str]]:
    """(kind of its files, path) of what a run will score."""
    found = []
    for stream in STREAMS:
        source = getattr(config.data, f"val_{stream}")
        scored = getattr(config.train, f"eval_{stream}", True)
        if source and scored and getattr(config.train, stream):
            found.append((source_kind(config.data, stream), source))
    return found


class Choice(NamedTuple):
    """A backend, and why it is the one."""

    name: str
    why: str


def make_backend(name: str, data: DataConfig) -> Backend:
    """The backend of that name, on the current GPU where it uses one. Raises DataError where it does not import."""
    if name == "dali":
        from bevt.data import dali

        return dali.Pipelines(data, _device_id())
    return Processes(name, data)


def refusal(name: str, manifests: Iterable[Manifest]) -> str:
    """Why the backend cannot serve these files here; empty where it can."""
    try:
        if name == "dali":
            from bevt.data import dali

            dali.library()
            return next(filter(None, (dali.refusal(manifest, _device_id()) for manifest in manifests)), "")
        (torchcodec if name == "torchcodec" else pyav).library()
    except DataError as error:
        return str(error)
    return ""


def choose_backend(
    config: AnyConfig, samplers: dict[Stream, Sampler], prefer: str = "", others: Iterable[Manifest] = ()
) -> Choice:
    """The backend that `data.backend` names; for `auto` the fastest of those that can read these files.

    `auto` lets each of them decode the first samples of an epoch for TRIAL_SECONDS, with the run's own workers and
    micro-batches; where only one can serve, or `prefer` (what a resumed run began with) still can, none is timed.
    The calling process times alone: where several share the cores, PyAV comes out faster than it will be. `others` are
    to be read too, and not timed. Raises ConfigError where a named one cannot serve, with what can, DataError where
    none can.
    """
    manifests = [*(sampler.manifest for sampler in samplers.values()), *others]
    wanted = config.data.backend
    refusals = {name: refusal(name, manifests) for name in (CANDIDATES if wanted == "auto" else BACKENDS)}
    able = [name for name in refusals if not refusals[name]]
    if wanted != "auto":
        if wanted not in BACKENDS:
            raise ConfigError(
                f"data.backend {wanted!r} does not exist; known: 'auto', {', '.join(map(repr, sorted(BACKENDS)))}"
            )
        if wanted not in able:
            rest = f"{', '.join(able)} can" if able else "nor can any other"
            raise ConfigError(f"data.backend {wanted!r} cannot read this data: {refusals[wanted]}; {rest}")
        return Choice(wanted, "as configured")
    if prefer in able:
        return Choice(prefer, "as the run began")
    rates = {}
    for name in able if len(able) > 1 else ():
        try:
            rates[name] = _trial(config, samplers, make_backend(name, config.data))
        except DataError as error:
            refusals[name] = str(error)
    return fastest(rates, refusals)


def fastest(rates: Mapping[str, float], refusals: Mapping[str, str]) -> Choice:
    """What `auto` makes of its candidates' samples a second and of the reasons why some cannot serve ("": it can).

    One that can serve need not have a rate where it is alone. Raises DataError where none can serve.
    """
    reasons = {name: why or ("" if rates.get(name, 1) else _NOTHING) for name, why in refusals.items()}
    able = [name for name, why in reasons.items() if not why]
    unable = "".join(f"; not {name}: {why}" for name, why in reasons.items() if why)
    if not able:
        raise DataError(f"nothing here can decode this data{unable}")
    if len(able) == 1:
        return Choice(able[0], f"the only one that can read this data here{unable}")
    listed = ", ".join(f"{name} {rates[name]:.1f}" for name in sorted(able, key=lambda name: -rates[name]))
    return Choice(max(able, key=lambda name: rates[name]), f"fastest on this data, samples a second: {listed}{unable}")


def _trial(config: AnyConfig, samplers: dict[Stream, Sampler], backend: Backend) -> float:
    """Samples a second that the backend decodes, for TRIAL_SECONDS after its first micro-batch."""
    sizes: dict[Stream, int] = {"clips": config.train.micro_clips, "images": config.train.micro_images}

    def plans() -> Iterator[Plan]:
        position = 0
        while True:
            yield Plan(
                *(
                    [samplers[stream].request(position * size + i) for i in range(size)] if stream in samplers else []
                    for stream, size in sizes.items()
                )
            )
            position += 1

    done, begin = 0, 0.0
    with contextlib.closing(backend.decode(plans(), Masks(config, ()))) as running:
        for plan, decoded in running:
            if begin == 0:
                begin = time.perf_counter()  # what starts up and fills the queues is not the rate
                continue
            done += len(plan.clips) + len(plan.images) - len(decoded.failures)
            if (elapsed := time.perf_counter() - begin) >= TRIAL_SECONDS:
                return done / elapsed
    raise AssertionError("the plans do not end")


def _device_id() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


class StepLoader:
    """`bevt.data.batch.Loader` over worker processes. Iterate once at a time: a new iteration ends the one before."""

    accumulation: int
    """Micro-batches in one optimizer step."""
    steps_per_epoch: float

    def __init__(
        self, config: AnyConfig, rank: int, world_size: int, prefer: str, kept: bool, labels: np.ndarray | None
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self.accumulation = accumulation(config, world_size)
        self._streams: list[Stream] = [stream for stream in STREAMS if getattr(config.train, stream)]
        Masks(config, self._streams)  # raises here, not when the first batch is asked for
        self._samplers = _samplers(
            config, config.train.clips > 0, config.train.images > 0, train=True, kept=kept, labels=labels
        )
        self._cuts = 2 if isinstance(config, ContrastConfig) else 1
        if isinstance(config, FinetuneConfig):
            self._cuts = config.augment.repeats
        self._labels = "" if labels is None else hashlib.sha256(labels.tobytes()).hexdigest()[:16]
        held_out = [probe_source(source, kind, kept=True) for kind, source in held_out_sources(config)]
        self.choice = choose_backend(config, self._samplers, prefer, held_out)
        self.backend = self.choice.name
        settled = dataclasses.replace(config.data, backend=cast(Any, self.choice.name))
        self.config = dataclasses.replace(config, data=settled)
        """The run's, with the backend that was chosen."""
        self._named: set[str] = set()
        self.clips, self.images = (len(self._samplers.get(stream, ())) for stream in STREAMS)
        """Files of each stream."""
        self.unreadable = tuple(
            BadFile(
                stream, -1, sampler.manifest.locate(entry), entry.error or "", "the next readable file of the epoch"
            )
            for stream, sampler in self._samplers.items()
            for number in sampler.manifest.unreadable.tolist()
            for entry in (sampler.manifest.entries[number],)
        )
        if "clips" in self._samplers:
            self.steps_per_epoch = self.clips / config.train.clips
        else:
            self.steps_per_epoch = self.images / config.train.images
        self._start = self._served = 0
        self._running: Generator[Batch, None, None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._start, self._served = self._step(), 0
        self._running = self._batches()
        return self._running

    def _batches(self) -> Generator[Batch, None, None]:
        batches = _serve(
            self.config,
            self._samplers,
            self._plans(self._start),
            self._streams,
            backend=make_backend(self.backend, self.config.data),
            named=self._named,
        )
        with contextlib.closing(batches):
            for batch in batches:
                self._served += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The step of which not every micro-batch has been handed out, and what the positions depend on."""
        return {"step": self._step(), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state`. Raises ValueError, naming what differs, where its positions mean other samples here."""
        differs = [
            f"{key} was {state.get(key)!r}, is {value!r}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if differs:
            raise ValueError("the data position belongs to another run: " + "; ".join(differs))
        self.close()
        self._start, self._served = int(state["step"]), 0

    def close(self) -> None:
        """End the workers; idempotent."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    @property
    def slots(self) -> dict[Stream, int]:
        """By stream, files * `data.views`: how many different views there are; 0 where they are not fixed."""
        return {stream: len(sampler) * self.config.data.views for stream, sampler in self._samplers.items()}

    def views(self, stream: Stream) -> dict[str, Any]:
        """What decides a stream's fixed views, as JSON takes it: the files' names and sizes, the cut, the decoder."""
        keys = ["crop", "short_side", "flip", "views", "backend"]
        keys += ["crop_area"] if self.config.data.crop_area[1] else []
        keys += ["crop_scales"] if self.config.data.crop_scales else []
        keys += ["frames", "stride", "sampling"] if stream == "clips" else ["jitter", "image_source"]
        values = {f"data.{key}": getattr(self.config.data, key) for key in keys}
        return {"fingerprint of the files": self._samplers[stream].manifest.fingerprint(), **values}

    def _step(self) -> int:
        return self._start + self._served // self.accumulation

    def _identity(self) -> dict[str, Any]:
        """All that decides which sample a step's position is."""
        out: dict[str, Any] = {"seed": self.config.train.seed}
        for stream in STREAMS:
            sampler = self._samplers.get(stream)
            out[f"{stream} a step"] = getattr(self.config.train, stream)
            out[f"{stream} in the source"] = len(sampler) if sampler else 0
            out[f"fingerprint of the {stream}"] = sampler.manifest.fingerprint() if sampler else ""
        if self._labels:
            out["digest of the labels"] = self._labels
        return out

    def _plans(self, step: int) -> Iterator[Plan]:
        """What this rank decodes, micro-batch by micro-batch, without end."""
        train = self.config.train
        shares: tuple[tuple[Stream, int, int], ...] = (
            ("clips", train.clips, train.micro_clips),
            ("images", train.images, train.micro_images),
        )
        while True:
            for micro in range(self.accumulation):
                share = micro * self._world_size + self._rank
                yield Plan(
                    *(
                        [
                            self._samplers[stream].request(step * total + share * size + i, cut=cut)
                            for i in range(size)
                            for cut in range(self._cuts)
                        ]
                        if total
                        else []
                        for stream, total, size in shares
                    )
                )
            step += 1


def check_held_out(manifest: Manifest, backend: str, first: int | None = None) -> None:
    """Raise DataError where not all can be read, listing the files: in held-out data nothing is replaced.

    Likewise where `backend`, unless it is `auto`, cannot serve them. Whether they have changed since they were indexed
    is asked of all, or of the `first` ones: a call to the system each.
    """
    if backend != "auto" and (reason := refusal(backend, [manifest])):
        raise DataError(f"data.backend {backend!r} cannot read the held-out data in {manifest.root}: {reason}")
    bad = []
    asked = range(len(manifest.entries))[:first]
    for number in sorted({*asked, *manifest.unreadable.tolist()}):
        entry = manifest.entries[number]
        problem = ("", entry.error) if entry.error else changed(manifest, entry)
        if problem is not None:
            bad.append((manifest.locate(entry), problem[1]))
    if bad:
        raise DataError(_refused(bad, len({entry.path for entry in manifest.entries})))


def _refused(bad: list[tuple[str, str]], total: int) -> str:
    """The message for held-out files of `total` that cannot be read, (path, reason) of each view; lists the first."""
    reasons: dict[str, str] = {}
    for path, reason in bad:
        reasons.setdefault(path, reason)
    bad = list(reasons.items())
    listed = "".join(f"\n  {path}: {reason}" for path, reason in bad[:MOST_LISTED])
    more = f"\n  ... and {len(bad) - MOST_LISTED} more" if len(bad) > MOST_LISTED else ""
    return f"{len(bad)} of {total} files cannot be read; {NEVER_REPLACED}:{listed}{more}"


def eval_batches(
    config: Config | VideoMAEConfig, *, micro_clips: int | None = None, micro_images: int | None = None
) -> Generator[Batch, None, None]:
    """Held-out data, in a fixed order: `data.val_clips` in batches without images, then `data.val_images` alone.

    The first `train.eval_clips` and `train.eval_images` files (or all, where there are fewer), each once; batches hold
    `micro_clips` or `micro_images` of them (default: those of `train`), the last one what is left. The sample of a
    file, mask included, is always the same. Raises DataError where a file cannot be read: nothing is replaced here.
    """
    data, train = config.data, config.train
    held_out = dataclasses.replace(data, clips=data.val_clips, images=data.val_images)
    config = dataclasses.replace(config, data=held_out)
    eval_images = getattr(train, "eval_images", 0)
    samplers = _samplers(
        config, bool(data.val_clips and train.eval_clips), bool(data.val_images and eval_images), train=False
    )

    for stream, sampler in samplers.items():
        check_held_out(sampler.manifest, "auto", getattr(train, f"eval_{stream}"))
    sizes: dict[Stream, tuple[int, int]] = {
        "clips": (train.eval_clips, micro_clips or train.micro_clips),
        "images": (eval_images, micro_images or train.micro_images),
    }

    def plans(stream: Stream) -> Iterator[Plan]:
        (count, size), sampler = sizes[stream], samplers[stream]
        requests = [sampler.request(position) for position in range(min(count, len(sampler)))]
        for i in range(0, len(requests), size):
            yield Plan(**{"clips": [], "images": [], stream: requests[i : i + size]})

    backend = make_backend(choose_backend(config, samplers).name, config.data)
    Masks(config, samplers)  # raises here, not when the first batch is asked for

    def run() -> Generator[Batch, None, None]:
        for stream in samplers:
            yield from _serve(config, samplers, plans(stream), [stream], backend=backend, substitute=False)

    return run()


def frame_batches(config: Config, batch_size: int, seed: int) -> Generator[Tensor, None, None]:
    """Frames to fit a tokenizer on: (batch_size, crop, crop, 3) uint8 RGB, without end, a function of (config, seed).

    Cut like training samples (without colour jitter) from `data.clips`, FRAMES_PER_CLIP evenly spaced frames of each
    sampled clip, and `data.images`, half of a batch each where both are given. Unreadable files are logged and replaced
    as in training. Raises ConfigError where the configuration names neither, DataError as `build_loader`.
    """
    data = dataclasses.replace(config.data, jitter=0.0)
    if not data.clips and not data.images:
        raise ConfigError("data.clips and data.images are both empty: name a folder to take frames from")
    config = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, seed=seed))
    samplers = _samplers(config, bool(data.clips), bool(data.images), train=True)
    from_clips = 0 if not data.clips else batch_size if not data.images else (batch_size + 1) // 2
    clips, images = -(-from_clips // FRAMES_PER_CLIP), batch_size - from_clips

    def plans() -> Iterator[Plan]:
        step = 0
        while True:
            yield Plan(
                [_thinned(samplers["clips"].request(step * clips + i)) for i in range(clips)],
                [samplers["images"].request(step * images + i) for i in range(images)],
            )
            step += 1

    backend = make_backend(choose_backend(config, samplers).name, config.data)
    batches = _serve(config, samplers, plans(), (), backend=backend, adapt=_thinned)
    with contextlib.closing(batches):
        for batch in batches:
            parts = [] if batch.clips is None else [batch.clips.flatten(0, 1)[:from_clips]]
            yield torch.cat(parts if batch.images is None else [*parts, batch.images])


def view_batches(
    config: AnyConfig,
    stream: Stream,
    manifest: Manifest,
    numbers: Sequence[int],
    *,
    clips: int,
    crops: int,
    files: int,
    labels: np.ndarray | None = None,
) -> Generator[Batch, None, None]:
    """The test views (`Sampler.grid`) of the manifest's files `numbers`, in order: of `files` files in a batch, the
    last one of what is left, each file's views together, clip by clip.

    Raises DataError, when all are read, that lists the files that cannot be: nothing is replaced.
    """
    sampler = Sampler(manifest, _tested(config), stream, config.train.seed, train=False, labels=labels)

    def plans() -> Iterator[Plan]:
        for i in range(0, len(numbers), files):
            views = [view for number in numbers[i : i + files] for view in sampler.grid(number, clips, crops)]
            yield Plan(**{"clips": [], "images": [], stream: views})

    backend = make_backend(view_backend(config, stream, manifest).name, config.data)
    return _serve(config, {stream: sampler}, plans(), (), backend=backend, substitute=False)


def view_backend(config: AnyConfig, stream: Stream, manifest: Manifest) -> Choice:
    """What decodes test views: `choose_backend` on the manifest alone."""
    return choose_backend(config, {stream: Sampler(manifest, _tested(config), stream, config.train.seed, train=False)})


def _tested(config: AnyConfig) -> DataConfig:
    """How held-out files are cut where classes are learned."""
    side = config.test.short_side if isinstance(config, FinetuneConfig) else 0
    return dataclasses.replace(config.data, short_side=(side, side)) if side else config.data


def _serve(
    config: AnyConfig,
    samplers: dict[Stream, Sampler],
    plans: Iterable[Plan],
    masked: Collection[Stream],
    *,
    backend: Backend,
    substitute: bool = True,
    adapt: Callable[[Request], Request] = lambda request: request,
    named: set[str] | None = None,
) -> Generator[Batch, None, None]:
    """Batches of the plans, in order; ends the backend's helpers when it ends or is closed.

    Replacements are decoded here, in the calling process, which alone holds the manifests: they are rare, and workers
    that need no manifest start fast and stay small. The log names an unreadable file once; `named` holds those that it
    has named already. Without `substitute`, no batch follows an unreadable file, and when all plans are
    read a DataError lists all such files.
    """
    named = set() if named is None else named
    lost: list[tuple[str, str]] = []
    asked: set[str] = set()
    with contextlib.closing(backend.decode(plans, Masks(config, masked))) as running:
        for plan, decoded in running:
            bad: list[BadFile] = []
            if not substitute:
                asked.update(request.path for request in (*plan.clips, *plan.images))
                lost += [(getattr(plan, name)[row].path, reason) for name, row, reason in decoded.failures]
            if lost:  # go on reading, so that all of them can be named
                continue
            for name, row, reason in decoded.failures:
                request = getattr(plan, name)[row]
                used = _replace(backend, samplers[name], request, reason, adapt, getattr(decoded, name)[row], bad)
                getattr(plan, name)[row] = used
            for report in bad:
                if report.path not in named:
                    named.add(report.path)
                    _log.warning("%s: %s; read in its place: %s", report.path, report.error, report.replaced_by)
            yield Batch(
                clips=decoded.clips,
                clip_masks=decoded.clip_masks,
                images=decoded.images,
                image_masks=decoded.image_masks,
                image_jitter=torch.tensor([request.jitter for request in plan.images]) if plan.images else None,
                clip_seeds=_seeds(plan.clips),
                image_seeds=_seeds(plan.images),
                clip_slots=_slots(plan.clips),
                image_slots=_slots(plan.images),
                clip_labels=_labels(plan.clips),
                image_labels=_labels(plan.images),
                clip_ids=tuple(request.id for request in plan.clips),
                image_ids=tuple(request.id for request in plan.images),
                bad=tuple(bad),
            )
    if lost:
        raise DataError(_refused(lost, len(asked)))


def _seeds(requests: list[Request]) -> Tensor | None:
    """(samples,) int64; None where there are no samples."""
    return torch.tensor([request.mask_seed for request in requests]) if requests else None


def _labels(requests: list[Request]) -> Tensor | None:
    """(samples,) int64; None where there are no samples, or they have no class."""
    if not requests or requests[0].label < 0:
        return None
    return torch.tensor([request.label for request in requests])


def _slots(requests: list[Request]) -> Tensor | None:
    """(samples,) int64; None where there are no samples, or their views are not fixed."""
    if not requests or requests[0].slot < 0:
        return None
    return torch.tensor([request.slot for request in requests])


def _replace(
    backend: Backend,
    sampler: Sampler,
    request: Request,
    reason: str,
    adapt: Callable[[Request], Request],
    into: Tensor,
    bad: list[BadFile],
) -> Request:
    """Fill `into` from the next readable file of the epoch's order; what was read. Appends every failure to `bad`."""
    failed = [(request.path, reason)]
    for k in range(1, min(MOST_SUBSTITUTES, sampler.readable - 1) + 1):
        other = adapt(sampler.request(request.position, substitute=k, cut=request.cut))
        try:
            backend.read([other], [into])
        except ReadError as error:
            failed.append((error.path, error.reason))
            continue
        bad.extend(BadFile(request.stream, request.position, path, why, other.path) for path, why in failed)
        return other
    listed = "\n".join(f"  {path}: {why}" for path, why in failed)
    raise DataError(
        f"{len(failed)} files in a row cannot be read, at position {request.position} of the {request.stream} "
        f"(run `bevt data check --whole` on the source):\n{listed}"
    )


def _samplers(
    config: AnyConfig,
    clips: bool,
    images: bool,
    *,
    train: bool,
    kept: bool = False,
    labels: np.ndarray | None = None,
) -> dict[Stream, Sampler]:
    """The samplers of the streams that take part; `kept`: of the manifests that the first process has just made."""
    samplers = {}
    wanted: tuple[tuple[Stream, bool], ...] = (("clips", clips), ("images", images))
    for stream, used in wanted:
        if used:
            manifest = open_source(getattr(config.data, stream), source_kind(config.data, stream), kept=kept)
            samplers[stream] = Sampler(manifest, config.data, stream, config.train.seed, train=train, labels=labels)
    return samplers


def samples(config: AnyConfig) -> tuple[int, int]:
    """Clips and images that a step makes of its files: more than those where each is cut several times."""
    repeats = config.augment.repeats if isinstance(config, FinetuneConfig) else 1
    return config.train.clips * repeats, config.train.images * repeats


def accumulation(config: AnyConfig, world_size: int) -> int:
    """Micro-batches a step; ConfigError where the global batch does not divide into them."""
    counts = {}
    for stream in STREAMS:
        total, micro = getattr(config.train, stream), getattr(config.train, f"micro_{stream}")
        if not total:
            continue
        if micro <= 0 or total % (micro * world_size):
            raise ConfigError(
                f"train.{stream} = {total} is not a multiple of train.micro_{stream} * devices = {micro} * {world_size}"
            )
        counts[stream] = total // (micro * world_size)
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"the streams need equally many micro-batches a step, but clips make {counts['clips']} "
            f"({config.train.clips} / ({config.train.micro_clips} * {world_size})) and images {counts['images']} "
            f"({config.train.images} / ({config.train.micro_images} * {world_size})): change train.micro_clips or "
            "train.micro_images"
        )
    return next(iter(counts.values()))


def _thinned(request: Request) -> Request:
    """The request with FRAMES_PER_CLIP of its frames."""
    step = max(1, len(request.frames) // FRAMES_PER_CLIP)
    frames = request.frames[::step][:FRAMES_PER_CLIP]
    return dataclasses.replace(request, frames=frames)
