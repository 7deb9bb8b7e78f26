"""How fast a source's own files become samples here: every backend, its parts apart, and a bare decoder beside it.

Whole paths run one after the other, as the trainer would run them. What is compared on one core is interleaved, sample
by sample, and of two goes at a sample the quicker counts: on a shared machine the rest is other people's work.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bevt.config import Config, ConfigError, DataConfig, TrainConfig, check_frames
from bevt.data import DataError, pyav, torchcodec
from bevt.data.build import BACKENDS, CANDIDATES, Choice, choose_backend, fastest, make_backend, refusal
from bevt.data.cut import cut, places
from bevt.data.decoding import READERS, Backend, Masks, Plan, Processes, shape
from bevt.data.entry import Kind
from bevt.data.files import ReadError
from bevt.data.manifest import open_source
from bevt.data.sampling import Request, Sampler, Stream

MOST_NAMED = 20
"""Files that could not be read that a report names; the others are counted."""


class Parts(NamedTuple):
    """Milliseconds a sample, with one worker or thread (on a GPU: of it)."""

    decode: float
    """Open, read, decode, convert to RGB."""
    augment: float
    """Resize, crop, flip."""
    hand_over: float
    """Drawing the request and moving pixels from a worker process to the trainer; of DALI: from it to torch."""


class Row(NamedTuple):
    """One backend's figures."""

    rate: float
    """Samples a second that reach the trainer."""
    megabytes: float
    """A second: the sizes of the files that the samples come from, whole."""
    parts: Parts


@dataclass(frozen=True)
class Report:
    """What `bench` found."""

    title: str
    rows: dict[str, Row]
    """By backend."""
    refused: dict[str, str]
    """Why the other backends serve nothing here."""
    bare: dict[str, float]
    """Milliseconds a sample of each yardstick (`_BARE`); empty where PyAV cannot serve."""
    about_bare: str
    """How the yardsticks were measured."""
    bad: dict[str, str]
    """What was wrong with the files, by name, that the index took for good and that could not be read."""
    choice: Choice
    """The named backend, or `fastest` of these figures."""

    def __rich__(self) -> Group:
        """The tables, and a closing line."""
        paths = _table("backend", "samples/s", "MB/s", "decode, ms", "augment, ms", "hand-over, ms")
        for name, row in self.rows.items():
            parts = (f"{milliseconds:.2f}" for milliseconds in row.parts)
            paths.add_row(name, f"{row.rate:.1f}", f"{row.megabytes:.1f}", *parts)
        cores = _table("on one core", "samples/s", "pyav's decode", "with augment")
        if self.bare:
            decode, augment, _ = self.rows["pyav"].parts
            for name, bare in self.bare.items():
                shares = (f"{100 * bare / own:.0f} %" for own in (decode, decode + augment))
                cores.add_row(name, f"{1000 / bare:.1f}", *shares)
        unsaid = [f"not {name}: {why}" for name, why in self.refused.items() if why not in self.choice.why]
        out: list[str | Table] = [self.title, "", paths, *unsaid]
        out += [_ABOUT_PATHS, "", *((cores, self.about_bare, "") if self.bare else ())]
        if self.bad:
            out.append(f"{len(self.bad)} files cannot be read (`bevt data check --whole` says more):")
            out += [f"  {path}: {why}" for path, why in itertools.islice(self.bad.items(), MOST_NAMED)]
        if len(self.bad) > MOST_NAMED:
            out.append(f"  ... and {len(self.bad) - MOST_NAMED} more")
        out.append(f"data.backend: {self.choice.name} ({self.choice.why})")
        return Group(*(Text(part) if isinstance(part, str) else part for part in out))  # a path is no markup


_ABOUT_PATHS = (
    "samples/s, MB/s: what reaches the trainer, without masks; MB of the samples' files, whole. Milliseconds a sample, "
    "of one worker or thread: decode (open, read, decode, to RGB); augment (resize, crop, flip); hand-over (request to "
    "a worker, pixels to the trainer; DALI: to torch), during which other workers decode."
)
_SEEKING = ", from the key frame before the clip where the index has one"
_ABOUT_BARE = (
    "The library alone in a simple loop, one thread{}; per cent: pyav's rate as a share of it, decoding alone and with "
    "the augmentation, in the same run."
)


def _table(*columns: str) -> Table:
    """Numbers to the right of names."""
    table = Table(columns[0], box=None)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def bench(source: str, kind: Kind, data: DataConfig, *, batch: int = 8, seconds: float = 5.0) -> Report:
    """Measure every backend that can read the source (where `data.backend` names one: that one) on its own files.

    Samples are those of a run with this `data` and seed 0, `batch` a micro-batch; single frames of videos where
    `data.image_source` is "frames". Each of some eight measurements takes `seconds`. Raises ConfigError where a number
    is out of range or the named backend cannot serve, DataError where no file can be read.
    """
    if batch < 1 or seconds <= 0:
        raise ConfigError(f"--batch and --seconds must be above 0, got {batch} and {seconds}")
    stream: Stream = "images" if data.image_source == "frames" else kind
    clips, images = (batch, 0) if stream == "clips" else (0, batch)
    train = TrainConfig(clips=clips, images=images, micro_clips=batch, micro_images=batch)
    config = Config(recipe="bench", data=data, train=train)
    check_frames(config)
    sampler = Sampler(open_source(source, kind), data, stream, train.seed)
    named = choose_backend(config, {stream: sampler}) if data.backend != "auto" else None
    names = (named.name,) if named else BACKENDS
    refused = {name: why for name in names if (why := refusal(name, [sampler.manifest]))}

    bad: dict[str, str] = {}
    rates: dict[str, tuple[float, float]] = {}
    good: dict[str, list[Request]] = {}
    for name in names:
        if name not in refused:
            rates[name], found = _whole(config, sampler, make_backend(name, data), seconds, bad)
            if found:
                good[name] = found
            else:
                refused[name] = "it decoded none of the files that were tried"
    if not good:
        listed = "\n".join(f"  {path}: {why}" for path, why in itertools.islice(bad.items(), 5))
        raise DataError(f"none of the {len(bad)} {kind} that were tried can be decoded:\n{listed}")
    measured = {name: rates[name][0] for name in good}
    choice = named or fastest(measured, {name: refused.get(name, "") for name in CANDIDATES})

    parts: dict[str, Parts] = {}
    bare: dict[str, float] = {}
    if readers := [name for name in good if name in READERS]:
        tasks: dict[str, _Task] = {name: partial(_read, name) for name in readers}
        yardsticks = _BARE[kind] if "pyav" in readers else {}
        times = _per_core({**tasks, **yardsticks}, good[readers[0]], seconds)
        one = replace(config, data=replace(data, workers=min(1, data.workers)))
        (empty, _), _ = _whole(one, sampler, _Nothing(readers[0], one.data), seconds, {})
        parts = {name: Parts(*times[name], 1000 / empty) for name in readers}
        bare = {name: sum(times[name]) for name in yardsticks}
    if "dali" in good:
        parts["dali"] = _dali_parts(data, good["dali"], batch, seconds)
    frames = f", {data.frames} frames of {data.sampling} sampling, stride {data.stride}" if stream == "clips" else ""
    if stream != kind:
        frames = ", single frames"
    return Report(
        f"{kind} of {source}{frames}, crop {data.crop}; {batch} a micro-batch, {data.workers} workers",
        {name: Row(*rates[name], parts[name]) for name in good},
        refused,
        bare,
        _ABOUT_BARE.format(_SEEKING if kind == "clips" else ""),
        bad,
        choice,
    )


def _whole(
    config: Config, sampler: Sampler, backend: Backend, seconds: float, bad: dict[str, str]
) -> tuple[tuple[float, float], list[Request]]:
    """(samples, megabytes) a second after a first micro-batch, and the requests that could be served; `bad` gets the
    other files.
    """
    size = getattr(config.train, sampler.stream)
    good: list[Request] = []
    counted, begin = 0, 0.0
    with contextlib.closing(backend.decode(_plans(sampler, size), Masks(config, ()))) as running:
        for plan, decoded in running:
            requests = plan.clips or plan.images
            lost = {row: reason for _, row, reason in decoded.failures}
            bad.update((requests[row].path, reason) for row, reason in lost.items())
            good += [request for row, request in enumerate(requests) if row not in lost]
            if begin == 0:
                counted, begin = len(good), time.perf_counter()
            elif (elapsed := time.perf_counter() - begin) >= seconds:
                sizes = (request.file.size or os.path.getsize(request.file.path) for request in good[counted:])
                return ((len(good) - counted) / elapsed, sum(sizes) / elapsed / 1e6), good
    raise AssertionError("the plans do not end")


def _plans(sampler: Sampler, size: int) -> Iterator[Plan]:
    """Micro-batches of an endless run."""
    for first in itertools.count(0, size):
        requests = [sampler.request(first + i) for i in range(size)]
        yield Plan(requests, []) if sampler.stream == "clips" else Plan([], requests)


class _Nothing(Processes):
    """Workers that decode nothing: what remains is the hand-over."""

    def read(self, requests: Sequence[Request], into: Sequence[Tensor]) -> None:
        """Leave the pixels as they are."""


_Task = Callable[[Request, Tensor], tuple[float, float]]
"""Does something with a request, perhaps into the tensor; seconds of decoding and of cutting."""


def _per_core(tasks: dict[str, _Task], requests: list[Request], seconds: float) -> dict[str, tuple[float, float]]:
    """Milliseconds a sample of (decoding, cutting), by task, in one thread; `seconds` for each. Samples that one of the
    tasks cannot read do not count. Raises DataError where none is left.
    """
    into = torch.zeros(shape(requests[:1]), dtype=torch.uint8)[0]
    quickest: list[dict[str, tuple[float, float]]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        end = time.perf_counter() + seconds * len(tasks)
        for request in itertools.cycle(requests):
            with contextlib.suppress(ReadError):
                goes = [{name: task(request, into) for name, task in tasks.items()} for _ in range(2)]
                quickest.append({name: min((go[name] for go in goes), key=sum) for name in tasks})
            if time.perf_counter() >= end:
                break
    finally:
        torch.set_num_threads(threads)
    if not quickest:
        raise DataError(f"no file that each of {', '.join(tasks)} can read was met in {seconds * len(tasks):.0f} s")
    return {name: _mean([found[name] for found in quickest]) for name in tasks}


def _mean(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Milliseconds of seconds, each of the two."""
    first, second = (1000 * sum(column) / len(column) for column in zip(*times, strict=True))
    return first, second


def _read(name: str, request: Request, into: Tensor) -> tuple[float, float]:
    """What `READERS[name]` does, with a clock in it."""
    augment, begin = 0.0, time.perf_counter()
    if request.kind == "images":
        wanted = {0: [(request, into)]}
        pictures = ((0, pyav.picture([request])) for _ in range(1))
    else:
        wanted = places([request], [into])
        pictures = (torchcodec if name == "torchcodec" else pyav).pictures(request, list(wanted))
    for number, pixels in pictures:
        cutting = time.perf_counter()
        cut(pixels, wanted[number])
        augment += time.perf_counter() - cutting
    return time.perf_counter() - begin - augment, augment


def _bare_clip(convert: bool, request: Request, _: Tensor) -> tuple[float, float]:
    """Seek to the key frame before the first frame where the manifest has one, decode on to the last. Raises ReadError.

    `convert`: the wanted frames to RGB, by the library's own default.
    """
    av = pyav.library()
    begin = time.perf_counter()
    wanted, last, number = set(request.frames), max(request.frames), 0
    try:
        source = io.BytesIO(request.file.read()) if request.file.size else request.path
        with av.open(source, metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.thread_count = "NONE", 1
            if request.seeks and request.seeks[0][0] <= min(wanted):
                number, stamp = request.seeks[0]
                container.seek(stamp, stream=stream)
            for frame in container.decode(stream):
                if convert and number in wanted:
                    frame.to_ndarray(format="rgb24", **pyav.one_thread())
                if number == last:
                    break
                number += 1
    except av.error.FFmpegError as error:
        raise ReadError(request.path, f"a bare loop over it fails ({error.strerror})") from error
    return time.perf_counter() - begin, 0.0


def _bare_image(request: Request, _: Tensor) -> tuple[float, float]:
    begin = time.perf_counter()
    with Image.open(io.BytesIO(request.file.read()) if request.file.size else request.path) as image:
        image.convert("RGB")
    return time.perf_counter() - begin, 0.0


_BARE: dict[Kind, dict[str, _Task]] = {
    "clips": {
        "bare PyAV, decode to the last frame": partial(_bare_clip, False),
        "bare PyAV, and its frames to rgb24": partial(_bare_clip, True),
    },
    "images": {'bare Pillow, open(path).convert("RGB")': _bare_image},
}
"""What a few lines around the library do with a request, by name: the yardsticks."""


def _dali_parts(data: DataConfig, requests: list[Request], batch: int, seconds: float) -> Parts:
    """DALI's, with one thread: a pipeline that leaves the pictures as they are, and one that cuts them."""
    from bevt.data import dali

    backend = make_backend("dali", replace(data, workers=1, prefetch=1))
    assert isinstance(backend, dali.Pipelines)
    chunk: list[Request] = []
    samples: list[Any] = []
    kind, size = requests[0].kind, requests[0].size
    whole, cutting = (backend.pipeline(kind, itertools.repeat(samples), batch, side) for side in (0, size))

    def go() -> tuple[float, ...]:
        """Seconds of reading and decoding; of reading, decoding and cutting; of handing over."""
        times = [time.perf_counter()]
        samples[:] = map(dali.load, chunk)
        times.append(time.perf_counter())
        for pipeline in (whole, cutting):
            out = pipeline.run()[0]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        torch.from_dlpack(out.as_tensor())
        times.append(time.perf_counter())
        read, decode, both, over = (after - before for before, after in itertools.pairwise(times))
        return read + decode, read + both, over

    quickest: list[list[float]] = []
    endless = itertools.cycle(requests)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(quickest) < 2:
        chunk[:] = itertools.islice(endless, batch)
        goes = [go() for _ in range(2)]
        quickest.append([min(pair) for pair in zip(*goes, strict=True)])
    decode, both, over = (1000 * sum(column) / len(column) / batch for column in zip(*quickest[1:], strict=True))
    return Parts(decode, max(0.0, both - decode), over)
