"""From plans (what a micro-batch holds) to pixels and masks, in worker processes that may die.

A backend that decodes one file at a time (`READERS`) is run here, one process a micro-batch; `dali` has threads of its
own and lives in `bevt.data.dali`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bevt import masking
from bevt.config import AnyConfig, Config, DataConfig, MaskConfig, UserError, VideoMAEConfig
from bevt.data import DataError, pyav, torchcodec
from bevt.data.files import ReadError
from bevt.data.processes import context, end, initialize, undisturbed
from bevt.data.sampling import Request, Stream

READERS: dict[str, Callable[[Sequence[Request], Sequence[Tensor]], None]] = {
    "pyav": pyav.read,
    "torchcodec": torchcodec.read,
}
"""By name: decode one file, cut every request's pixels from it into its tensor. They raise ReadError."""

_log = logging.getLogger("bevt.data")


class Plan(NamedTuple):
    """The samples of one micro-batch."""

    clips: list[Request]
    images: list[Request]

    def __str__(self) -> str:
        """The first of its files, for messages."""
        names = list(dict.fromkeys(request.path for request in (*self.clips, *self.images)))
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Decoded(NamedTuple):
    """What becomes of a plan; rows of files that could not be read are zero. Shapes as in `bevt.data.batch.Batch`."""

    clips: Tensor | None
    clip_masks: Tensor | None
    images: Tensor | None
    image_masks: Tensor | None
    failures: list[tuple[Stream, int, str]]
    """(stream, row, reason)."""


class Masks:
    """Generates the masks of the streams `masked`, none where classes are learned.

    Raises ConfigError where a mask does not fit the crop.
    """

    def __init__(self, config: AnyConfig, masked: Collection[Stream]) -> None:
        self.kinds: dict[Stream, tuple[MaskConfig, tuple[int, int, int]]] = {}
        if isinstance(config, Config):
            side = config.data.crop // 16  # the map of stage 3, and the tokenizer's codes at half the resolution
            kinds: dict[Stream, tuple[MaskConfig, tuple[int, int, int]]] = {
                "clips": (config.clip_mask, (config.data.frames // config.model.tubelet, side, side)),
                "images": (config.image_mask, (1, side, side)),
            }
            self.kinds = {stream: kinds[stream] for stream in masked}
        elif isinstance(config, VideoMAEConfig):
            side = config.data.crop // config.model.patch
            grid = config.data.frames // config.model.tubelet, side, side
            self.kinds = {stream: (config.clip_mask, grid) for stream in masked}
        for mask, grid in self.kinds.values():
            masking.capacity(mask, grid)  # raises here, not in a worker

    def __call__(self, stream: Stream, requests: list[Request]) -> Tensor | None:
        """(clips, d, h, w) or (images, h, w) bool; None where there are no requests, or no masks in the stream."""
        if not requests or stream not in self.kinds:
            return None
        mask, grid = self.kinds[stream]
        seeds = np.array([request.mask_seed for request in requests], np.int64)
        drawn = torch.from_numpy(masking.generate(mask, seeds, grid))
        return drawn.squeeze(1) if stream == "images" else drawn


class Backend(Protocol):
    """What decodes, by name."""

    name: str

    def read(self, requests: Sequence[Request], into: Sequence[Tensor]) -> None:
        """Decode requests of one file into their tensors, now and here. Raises ReadError."""

    def decode(self, plans: Iterable[Plan], masks: Masks) -> Generator[tuple[Plan, Decoded], None, None]:
        """Every plan with its pixels and masks, in order, decoded ahead; ends its helpers when it is closed.

        All plans hold the same streams, none more samples of one than the first.
        """


class Processes:
    """`Backend` of a reader, run by worker processes."""

    def __init__(self, name: str, data: DataConfig) -> None:
        self.name, self._data = name, data

    def read(self, requests: Sequence[Request], into: Sequence[Tensor]) -> None:
        """Decode one file in this process. Raises ReadError; DataError where memory does not suffice."""
        try:
            READERS[self.name](requests, into)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # as torch says it
                raise
            raise DataError(
                f"{requests[0].path}: not enough memory to decode it; lower data.workers or data.prefetch, or remove "
                "the file if its pictures are huge"
            ) from error

    def decode(self, plans: Iterable[Plan], masks: Masks) -> Generator[tuple[Plan, Decoded], None, None]:
        """As `Backend.decode`, by `data.workers` processes.

        A process that dies is named. Then, by `data.worker_death`, DataError is raised, or what had been begun is
        decoded anew, one micro-batch at a time; one at whose turn processes die twice in a row is a DataError. Raises
        RuntimeError with the worker's traceback where one meets a defect of this program.
        """
        begun = Begun(plans)
        suspect: Plan | None = None
        while True:
            carefully = bool(begun.again)
            try:
                for decoded in self._processes(begun.hand_out(only_again=carefully), masks, carefully):
                    yield begun.finish(), decoded
                if not carefully:
                    return
            except _Died as died:
                plan = begun.oldest()
                what = (
                    f"{died}: killed from outside, out of memory (lower data.workers or data.prefetch), out of shared "
                    "memory (a container's --shm-size), or a file that crashes the decoder (`bevt data check --whole`"
                    f"). It was the turn of {plan}"
                )
                if self._data.worker_death == "stop" or plan is suspect:
                    raise DataError(f"{what}, at which another had died" if plan is suspect else what) from died
                suspect = plan
                _log.warning("%s; %d micro-batches that were begun are decoded anew", what, begun.start_over())

    def _processes(self, plans: Iterable[Plan], masks: Masks, carefully: bool) -> Generator[Decoded, None, None]:
        """What the workers make of the plans, in order; `carefully`: one worker, one plan ahead. Raises _Died."""
        workers = min(self._data.workers, 1) if carefully else self._data.workers
        loader: DataLoader[Decoded | _Crash] = DataLoader(
            _Worker(self, masks),
            batch_size=None,
            sampler=plans,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=(1 if carefully else self._data.prefetch) if workers else None,
            multiprocessing_context=context() if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=initialize,
        )
        running: list[Iterator[Decoded | _Crash]] = []
        helpers: list[BaseProcess] = []

        def stop() -> None:
            running.clear()  # the only reference, whose end ends the workers, unless a traceback holds another
            end(helpers)

        atexit.register(stop)
        try:
            others = set(multiprocessing.active_children())
            try:
                with undisturbed():
                    running.append(iter(loader))
            finally:
                helpers += [child for child in multiprocessing.active_children() if child not in others]
            while True:
                try:
                    decoded = next(running[0])
                except StopIteration:
                    return
                except Exception as error:  # torch's own, or that of a connection to the process that died
                    said = _epitaph(helpers)
                    if not said and "DataLoader worker (pid" not in str(error):
                        raise
                    raise _Died(said or str(error)) from error
                if isinstance(decoded, _Crash):
                    if decoded.message is not None:
                        raise DataError(decoded.message)
                    raise RuntimeError(f"a defect of bevt, met while decoding one of {decoded.traceback}")
                yield decoded
        finally:
            stop()
            atexit.unregister(stop)


class _Died(Exception):
    """A worker process ended by itself; the message says which and how."""


class _Crash(NamedTuple):
    """What a worker returns in place of `Decoded` where it met an exception that no rule covers."""

    message: str | None
    """Of an error for the user; None: a defect of this program."""
    traceback: str
    """The first of the plan's files, and where in the program."""


class _Worker(Dataset["Decoded | _Crash"]):
    """Plans in, pixels and masks out; what a worker process holds. It knows no manifest."""

    def __init__(self, backend: Processes, masks: Masks) -> None:
        self.backend, self.masks = backend, masks

    def __getitem__(self, plan: Plan) -> Decoded | _Crash:
        failures: list[tuple[Stream, int, str]] = []
        try:
            return Decoded(
                self._pixels(plan.clips, failures),
                self.masks("clips", plan.clips),
                self._pixels(plan.images, failures),
                self.masks("images", plan.images),
                failures,
            )
        except Exception as error:  # whatever it is, torch would raise another one in its place, without a type
            return _Crash(
                str(error) if isinstance(error, UserError) else None,
                f"{plan}:\n{traceback.format_exc()}",
            )

    def _pixels(self, requests: list[Request], failures: list[tuple[Stream, int, str]]) -> Tensor | None:
        """(requests, ...) uint8; in shared memory where another process receives it: handing it over copies nothing."""
        if not requests:
            return None
        out = torch.zeros(shape(requests), dtype=torch.uint8)
        if torch.utils.data.get_worker_info() is not None:
            out = out.share_memory_()
        rows: dict[Any, list[int]] = {}
        for row, request in enumerate(requests):
            rows.setdefault(request.file, []).append(row)
        for same in rows.values():  # one decode a file, however many views of it
            try:
                self.backend.read([requests[row] for row in same], [out[row] for row in same])
            except ReadError as error:
                failures.extend((requests[row].stream, row, error.reason) for row in same)
                out[same] = 0
        failures.sort(key=lambda failure: failure[1])
        return out


def shape(requests: Sequence[Request]) -> tuple[int, ...]:
    """Of the pixels of requests of one stream: (B, T, size, size, 3), or (M, size, size, 3) for images."""
    first = requests[0]
    frames = (len(first.frames),) if first.stream == "clips" else ()
    return (len(requests), *frames, first.size, first.size, 3)


class Begun:
    """Plans on their way through something that may fail: what it has begun can be handed out again."""

    def __init__(self, plans: Iterable[Plan]) -> None:
        self._rest = iter(plans)
        self._out: deque[Plan] = deque()  # handed out and not finished, oldest first
        self.again: deque[Plan] = deque()
        """To be handed out again, before all others."""

    def hand_out(self, only_again: bool = False) -> Iterator[Plan]:
        """The plans in order; `only_again`: no others than `again`."""
        while True:
            if self.again:
                plan = self.again.popleft()
            elif only_again or (plan := next(self._rest, None)) is None:  # type: ignore[assignment]
                return
            self._out.append(plan)
            yield plan

    def oldest(self) -> Plan:
        """The first that is not finished."""
        return self._out[0]

    def finish(self) -> Plan:
        """The oldest, which is done."""
        return self._out.popleft()

    def start_over(self) -> int:
        """Hand out again what was begun; how many plans that is."""
        count = len(self._out)
        self.again.extendleft(reversed(self._out))
        self._out.clear()
        return count


def _epitaph(helpers: list[BaseProcess]) -> str:
    """Which of the processes died, and of what; empty where none did."""
    said = []
    for child in helpers:
        child.join(0.1)
        if child.exitcode:
            how = f"exit status {child.exitcode}"
            if child.exitcode < 0:
                with contextlib.suppress(ValueError):
                    how = signal.Signals(-child.exitcode).name
            said.append(f"the decoding process {child.pid} died ({how})")
    return " and ".join(said)


def _unchanged(decoded: Any) -> Any:
    return decoded
