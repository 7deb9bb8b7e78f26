"""From a configuration to micro-batches: which samples make a step, who decodes them, and what happens when one fails.

Step s covers the stream positions s * C .. (s + 1) * C - 1, C = `train.clips` (likewise images). Its micro-batches, in
order, take equal consecutive shares of them, and within each the ranks do. So the set of samples of a step depends on
neither the number of devices nor the size of a micro-batch, and nothing depends on the number of worker processes.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bevt import masking
from bevt.config import Config, ConfigError, MaskConfig, UserError
from bevt.data import DataError, pyav
from bevt.data.batch import BadFile, Batch
from bevt.data.manifest import Manifest, open_source
from bevt.data.processes import context, end, initialize
from bevt.data.sampling import STREAMS, Request, Sampler, Stream

MOST_SUBSTITUTES = 10
"""Unreadable files in a row for one position after which the data counts as broken."""

READERS: dict[str, Callable[[Request], np.ndarray]] = {"pyav": pyav.read}
"""Decoding backends by name."""

FRAMES_PER_CLIP = 4
"""Frames that `frame_batches` takes from one clip: decoding costs most of the way to the last one anyway."""

_NEVER_REPLACED = "held-out data is never replaced: repair the file or remove it"

_log = logging.getLogger("bevt.data")


def build_loader(config: Config, *, rank: int = 0, world_size: int = 1) -> StepLoader:
    """The training data of one device, from step 0 on (`load_state_dict` continues elsewhere).

    A file that turns out unreadable is logged and listed in `Batch.bad`; those that the index knows already are in
    `unreadable`. Raises ConfigError where the batch sizes do not divide, the backend does not exist or a mask does not
    fit the crop, DataError where a source holds nothing that can be read.
    """
    return StepLoader(config, rank, world_size)


class StepLoader:
    """`bevt.data.batch.Loader` over worker processes. Iterate once at a time: a new iteration ends the one before."""

    accumulation: int
    """Micro-batches in one optimizer step."""
    steps_per_epoch: float

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self.accumulation = _accumulation(config, world_size)
        self.num_workers = config.data.workers
        self._decoder = _Decoder(config, [stream for stream in STREAMS if getattr(config.train, stream)])
        self._samplers = _samplers(config, config.train.clips > 0, config.train.images > 0, train=True)
        self.clips, self.images = (len(self._samplers.get(stream, ())) for stream in STREAMS)
        """Files of each stream."""
        self.unreadable = tuple(
            BadFile(stream, -1, sampler.manifest.locate(entry), entry.error, "the next readable file of the epoch")
            for stream, sampler in self._samplers.items()
            for entry in sampler.manifest.entries
            if entry.error
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
        batches = _serve(self._decoder, self._samplers, self._plans(self._start), self._config)
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

    def _step(self) -> int:
        return self._start + self._served // self.accumulation

    def _identity(self) -> dict[str, Any]:
        """All that decides which sample a step's position is."""
        out: dict[str, Any] = {"seed": self._config.train.seed}
        for stream in STREAMS:
            sampler = self._samplers.get(stream)
            out[f"{stream} a step"] = getattr(self._config.train, stream)
            out[f"{stream} in the source"] = len(sampler) if sampler else 0
            out[f"fingerprint of the {stream}"] = sampler.manifest.fingerprint() if sampler else ""
        return out

    def _plans(self, step: int) -> Iterator[_Plan]:
        """What this rank decodes, micro-batch by micro-batch, without end."""
        train = self._config.train
        shares: tuple[tuple[Stream, int, int], ...] = (
            ("clips", train.clips, train.micro_clips),
            ("images", train.images, train.micro_images),
        )
        while True:
            for micro in range(self.accumulation):
                share = micro * self._world_size + self._rank
                yield _Plan(
                    *(
                        [self._samplers[stream].request(step * total + share * size + i) for i in range(size)]
                        if total
                        else []
                        for stream, total, size in shares
                    )
                )
            step += 1


def check_held_out(manifest: Manifest) -> None:
    """Raise DataError where a file cannot be read: in held-out data nothing is replaced."""
    for entry in manifest.entries:
        if entry.error:
            raise DataError(f"{manifest.locate(entry)}: {entry.error}; {_NEVER_REPLACED}")


def eval_batches(
    config: Config, *, micro_clips: int | None = None, micro_images: int | None = None
) -> Generator[Batch, None, None]:
    """Held-out data, in a fixed order: `data.val_clips` in batches without images, then `data.val_images` alone.

    The first `train.eval_clips` and `train.eval_images` files (or all, where there are fewer), each once; batches hold
    `micro_clips` or `micro_images` of them (default: those of `train`), the last one what is left. The sample of a
    file, mask included, is always the same. Raises DataError where a file cannot be read: nothing is replaced here.
    """
    data, train = config.data, config.train
    held_out = dataclasses.replace(data, clips=data.val_clips, images=data.val_images)
    config = dataclasses.replace(config, data=held_out)
    samplers = _samplers(
        config, bool(data.val_clips and train.eval_clips), bool(data.val_images and train.eval_images), train=False
    )

    for sampler in samplers.values():
        check_held_out(sampler.manifest)
    sizes: dict[Stream, tuple[int, int]] = {
        "clips": (train.eval_clips, micro_clips or train.micro_clips),
        "images": (train.eval_images, micro_images or train.micro_images),
    }

    def plans() -> Iterator[_Plan]:
        for stream, sampler in samplers.items():
            count, size = sizes[stream]
            requests = [sampler.request(position) for position in range(min(count, len(sampler)))]
            for i in range(0, len(requests), size):
                yield _Plan(**{"clips": [], "images": [], stream: requests[i : i + size]})

    return _serve(_Decoder(config, samplers), samplers, plans(), config, substitute=False)


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

    def plans() -> Iterator[_Plan]:
        step = 0
        while True:
            yield _Plan(
                [_thinned(samplers["clips"].request(step * clips + i)) for i in range(clips)],
                [samplers["images"].request(step * images + i) for i in range(images)],
            )
            step += 1

    batches = _serve(_Decoder(config, masked=()), samplers, plans(), config, adapt=_thinned)
    with contextlib.closing(batches):
        for batch in batches:
            parts = [] if batch.clips is None else [batch.clips.flatten(0, 1)[:from_clips]]
            yield torch.cat(parts if batch.images is None else [*parts, batch.images])


class _Plan(NamedTuple):
    """The samples of one micro-batch."""

    clips: list[Request]
    images: list[Request]


class _Decoded(NamedTuple):
    """What a worker makes of a plan; rows of files that could not be read are zero."""

    clips: Tensor | None
    clip_masks: Tensor | None
    images: Tensor | None
    image_masks: Tensor | None
    failures: list[tuple[Stream, int, str]]
    """(stream, row, reason)."""


class _Crash(NamedTuple):
    """What a worker returns in place of `_Decoded` where it met an exception that no rule covers."""

    message: str | None
    """Of an error for the user; None: a defect of this program."""
    traceback: str


class _Decoder(Dataset["_Decoded | _Crash"]):
    """Plans in, pixels and masks (of the streams `masked`) out; what a worker process holds. It knows no manifest.

    Raises ConfigError where the backend does not exist or a mask does not fit the crop.
    """

    def __init__(self, config: Config, masked: Collection[Stream]) -> None:
        if config.data.backend not in ("auto", *READERS):
            raise ConfigError(
                f"data.backend {config.data.backend!r} does not exist; known: 'auto', {', '.join(map(repr, READERS))}"
            )
        self.backend = "pyav" if config.data.backend == "auto" else config.data.backend
        side = config.data.crop // 16  # the map of stage 3, and the tokenizer's codes at half the resolution
        kinds: dict[Stream, tuple[MaskConfig, tuple[int, int, int]]] = {
            "clips": (config.clip_mask, (config.data.frames // 2, side, side)),
            "images": (config.image_mask, (1, side, side)),
        }
        self.masks = {stream: kinds[stream] for stream in masked}
        for mask, grid in self.masks.values():
            masking.capacity(mask, grid)  # raises here, not in a worker

    def __getitem__(self, plan: _Plan) -> _Decoded | _Crash:
        failures: list[tuple[Stream, int, str]] = []
        try:
            clips = self._pixels(plan.clips, failures)
            images = self._pixels(plan.images, failures)
            clip_masks = self._masks("clips", plan.clips)
            image_masks = self._masks("images", plan.images)
        except Exception as error:  # whatever it is, torch would raise another one in its place, without a type
            return _Crash(str(error) if isinstance(error, UserError) else None, traceback.format_exc())
        return _Decoded(clips, clip_masks, images, None if image_masks is None else image_masks.squeeze(1), failures)

    def read(self, request: Request) -> Tensor:
        """One sample's pixels. Raises ReadError; DataError where memory does not suffice."""
        try:
            return torch.from_numpy(np.ascontiguousarray(READERS[self.backend](request)))
        except MemoryError as error:
            raise DataError(
                f"{request.path}: not enough memory to decode it; lower data.workers or data.prefetch, or remove the "
                "file if its pictures are huge"
            ) from error

    def _masks(self, stream: Stream, requests: list[Request]) -> Tensor | None:
        """(samples, d, h, w) bool."""
        if not requests or stream not in self.masks:
            return None
        mask, grid = self.masks[stream]
        return torch.from_numpy(masking.generate(mask, _seeds(requests), grid))

    def _pixels(self, requests: list[Request], failures: list[tuple[Stream, int, str]]) -> Tensor | None:
        if not requests:
            return None
        first = requests[0]
        frames = (len(first.frames),) if first.stream == "clips" else ()
        out = torch.zeros(len(requests), *frames, first.size, first.size, 3, dtype=torch.uint8)
        for row, request in enumerate(requests):
            try:
                out[row] = self.read(request)
            except pyav.ReadError as error:
                failures.append((request.stream, row, error.reason))
        return out


def _serve(
    decoder: _Decoder,
    samplers: dict[Stream, Sampler],
    plans: Iterable[_Plan],
    config: Config,
    *,
    substitute: bool = True,
    adapt: Callable[[Request], Request] = lambda request: request,
) -> Generator[Batch, None, None]:
    """Batches of the plans, in order, decoded by `data.workers` processes; ends them when it ends or is closed.

    Replacements are decoded here, in the calling process, which alone holds the manifests: they are rare, and workers
    that need no manifest start fast and stay small. Raises DataError where a worker dies, RuntimeError with the
    worker's traceback where it meets a defect of this program.
    """
    workers = config.data.workers
    queue: deque[_Plan] = deque()  # plans handed to the workers, oldest first

    def remember() -> Iterator[_Plan]:
        for plan in plans:
            queue.append(plan)
            yield plan

    loader: DataLoader[_Decoded | _Crash] = DataLoader(
        decoder,
        batch_size=None,
        sampler=remember(),
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=config.data.prefetch if workers else None,
        multiprocessing_context=context() if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=initialize,
    )
    running: list[Iterator[_Decoded | _Crash]] = []
    helpers: list[BaseProcess] = []

    def stop() -> None:
        running.clear()  # the only reference, whose end ends the workers, unless a traceback holds another
        end(helpers)

    atexit.register(stop)
    try:
        others = set(multiprocessing.active_children())
        try:
            running.append(iter(loader))
        finally:
            helpers += [child for child in multiprocessing.active_children() if child not in others]
        while True:
            try:
                decoded = next(running[0])
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker (pid" not in str(error):
                    raise
                raise DataError(
                    f"a decoding process died ({error}): killed from outside, out of memory (lower data.workers or "
                    "data.prefetch), or a file that crashes the decoder (`bevt data check`)"
                ) from error
            plan = queue.popleft()
            if isinstance(decoded, _Crash):
                if decoded.message is not None:
                    raise DataError(decoded.message)
                names = ", ".join(request.path for request in (*plan.clips, *plan.images))
                raise RuntimeError(f"a defect of bevt, met while decoding one of {names}:\n{decoded.traceback}")
            bad: list[BadFile] = []
            for name, row, reason in decoded.failures:
                request = getattr(plan, name)[row]
                if not substitute:
                    raise DataError(f"{request.path}: {reason}; {_NEVER_REPLACED}")
                used = _replace(decoder, samplers[name], request, reason, adapt, getattr(decoded, name)[row], bad)
                getattr(plan, name)[row] = used
            for report in bad:
                _log.warning("%s: %s; read in its place: %s", report.path, report.error, report.replaced_by)
            yield Batch(
                clips=decoded.clips,
                clip_masks=decoded.clip_masks,
                images=decoded.images,
                image_masks=decoded.image_masks,
                image_jitter=torch.tensor([request.jitter for request in plan.images]) if plan.images else None,
                clip_ids=tuple(request.id for request in plan.clips),
                image_ids=tuple(request.id for request in plan.images),
                bad=tuple(bad),
            )
    finally:
        stop()
        atexit.unregister(stop)


def _replace(
    decoder: _Decoder,
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
        other = adapt(sampler.request(request.position, substitute=k))
        try:
            into.copy_(decoder.read(other))
        except pyav.ReadError as error:
            failed.append((error.path, error.reason))
            continue
        bad.extend(BadFile(request.stream, request.position, path, why, other.path) for path, why in failed)
        return other
    listed = "\n".join(f"  {path}: {why}" for path, why in failed)
    raise DataError(
        f"{len(failed)} files in a row cannot be read, at position {request.position} of the {request.stream} "
        f"(run `bevt data check` on the source):\n{listed}"
    )


def _samplers(config: Config, clips: bool, images: bool, *, train: bool) -> dict[Stream, Sampler]:
    """The samplers of the streams that take part."""
    samplers = {}
    wanted: tuple[tuple[Stream, bool], ...] = (("clips", clips), ("images", images))
    for stream, used in wanted:
        if used:
            manifest = open_source(getattr(config.data, stream), stream)
            samplers[stream] = Sampler(manifest, config.data, stream, config.train.seed, train=train)
    return samplers


def _accumulation(config: Config, world_size: int) -> int:
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


def _seeds(requests: list[Request]) -> np.ndarray:
    return np.array([request.mask_seed for request in requests], np.int64)


def _unchanged(decoded: Any) -> Any:
    return decoded
