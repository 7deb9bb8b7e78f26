"""Memory of a training step on one device: predicted, kept under a budget by recomputation, explained where it ran out.

The real step runs on fake tensors, and the storages that are alive are counted; so are transients, and what autograd
keeps. Two blocks of a stage (the unshifted and the shifted one) stand for all of it: what a block adds while it runs
and leaves behind does not depend on the others, so that the peak of every choice of blocks to recompute is a sum.

Not in it: the interpreter, the libraries and what they allocate for themselves (an allocator's fragments, NCCL, cuDNN,
the compiler), the decoding processes, and what torch.compile keeps otherwise: the uncompiled step is what is run here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, cast
from weakref import finalize

import numpy as np
import torch
from bevt_kernels import linear_argmax
from bevt_kernels.conv3x3 import ops as conv3x3
from bevt_kernels.window_attention import ops, reference
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bevt import masking
from bevt.config import Config, ConfigError, FinetuneConfig, ModelConfig, ViTConfig, plain, tokenizer_settings
from bevt.data import augment
from bevt.data.sampling import STREAMS
from bevt.models.bevt import BEVT, MaskedInput, Stream
from bevt.models.classifier import build
from bevt.models.reference import ReferenceBEVT
from bevt.models.video_swin import SwinBlock, SwinStage
from bevt.tokenizers.dalle import DalleEncoder, DalleTokenizer
from bevt.tokenizers.frozen import FrozenTokenizer
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train.distributed import World
from bevt.train.metrics import RunError
from bevt.train.optim import build_optimizer
from bevt.train.phases import Phases
from bevt.train.step import TrainStep, _codes

GIB = 2**30

PARTS: dict[str, tuple[str, ...]] = {
    "patch embedding": ("patch_embed", "patch_embed_2d"),
    "encoder": ("encoder",),
    "decoders": ("video_decoder", "image_decoder", "norm"),
    "head and loss": ("head",),
}
"""Components of a model, and the children of `BEVT` that they are, in the order of the forward pass."""

BlockNumber = tuple[int, int]
"""Stage and block in it, from 0."""


class Peak(NamedTuple):
    """The most that a step holds at a time, in bytes."""

    total: int
    phase: str
    """Where: tokenizer, forward or backward of a stream, update."""
    states: int
    """Of it weights (the tokenizer's too), AdamW's moments, and gradients of passes before."""
    activations: int
    """Of it what the backward pass of the stream needs, at most as much as its forward pass left."""

    def __str__(self) -> str:
        rest = self.total - self.states - self.activations
        return (
            f"{self.total / GIB:.2f} GiB in {self.phase} (states {self.states / GIB:.2f}, activations "
            f"{self.activations / GIB:.2f}, rest {rest / GIB:.2f})"
        )


class _Span(NamedTuple):
    """What was allocated between two marks, in bytes above the first."""

    phase: str
    part: str
    block: BlockNumber | None
    rise: int
    """At the most."""
    left: int
    """At the end."""
    flop: int


@dataclass(frozen=True)
class Prediction:
    """A step of a configuration on one device, and what becomes of it where blocks are recomputed."""

    depths: tuple[int, ...]
    base: int
    """Bytes of states and the loaded batch: what is there before the step."""
    states: int
    """Of it the states."""
    gradient_bytes: int
    """Bytes of gradients that the step adds to it."""
    plain: list[_Span]
    again: list[_Span] = field(default_factory=list)
    """The same step with every block recomputed; empty where nobody asked."""

    def peak(self, recomputed: frozenset[BlockNumber] = frozenset()) -> Peak:
        """With these blocks recomputed."""
        live, states, kept = self.base, self.states, 0
        stream, start = "tokenizer", live
        tops: list[Peak] = []
        for span in self._spans(recomputed):
            if span.phase.split()[0] != stream:
                if stream != "tokenizer":  # what a pass leaves is gradients
                    states += live - start
                stream, start, kept = span.phase.split()[0], live, 0
            top = live + span.rise
            live += span.left
            if "forward" in span.phase:
                kept += span.left
            tops.append(Peak(top, span.phase, states, max(0, min(kept, top - states))))
        tops.append(Peak(self.base + self.gradient_bytes, "update", self.states + self.gradient_bytes, 0))
        return max(tops)

    @property
    def least(self) -> Peak:
        """The lowest peak that recomputation gives."""
        order = self.blocks
        return min(self.peak(frozenset(order[:count])) for count in range(len(order) + 1))

    @property
    def blocks(self) -> list[BlockNumber]:
        """All, those first that free most for each operation that is repeated, in the stream that needs most."""
        stream = self.peak().phase.split()[0]
        again = {(span.phase, span.block): span for span in self.again}
        worth: dict[int, float] = {}
        for stage in range(len(self.depths)):
            spans = [span for span in self.plain if span.block == (stage, 0) and "forward" in span.phase]
            most = [span for span in spans if span.phase.startswith(stream)] or spans
            freed = sum(span.left - again[span.phase, span.block].left for span in most)
            worth[stage] = freed / sum(span.flop for span in spans)
        stages = sorted(worth, key=lambda stage: -worth[stage])
        return [(stage, j) for stage in stages for j in range(self.depths[stage])]

    def flop(self, recomputed: frozenset[BlockNumber]) -> float:
        """Share of a step's floating-point operations, without the tokenizer's, that recomputation adds."""
        trained = [span for span in self._spans(frozenset()) if span.phase != "tokenizer"]
        whole = sum(span.flop for span in trained)
        return sum(s.flop for s in trained if "forward" in s.phase and s.block in recomputed) / whole

    def kept(self) -> dict[str, int]:
        """Bytes that the stream which leaves most has left at the end of its forward pass, by component."""
        streams: dict[str, dict[str, int]] = {}
        for span in self._spans(frozenset()):
            if "forward" in span.phase:
                parts = streams.setdefault(span.phase, dict.fromkeys(PARTS, 0))
                parts[span.part] += span.left
        return max(streams.values(), key=lambda parts: sum(parts.values()))

    def _spans(self, recomputed: frozenset[BlockNumber]) -> Iterator[_Span]:
        """The whole model's: each block of the traces stands for every second one of its stage."""
        traces = [{(s.phase, *s.block): s for s in spans if s.block} for spans in (self.plain, self.again)]
        done = set()
        for span in self.plain:
            if span.block is None:
                yield span
                continue
            stage = span.block[0]
            if (span.phase, stage) in done:
                continue
            done.add((span.phase, stage))
            order = range(self.depths[stage])
            for j in order if "forward" in span.phase else reversed(order):
                trace = traces[(stage, j) in recomputed]
                yield trace[span.phase, stage, j % 2]._replace(block=(stage, j))


@dataclass(frozen=True)
class Choice:
    """Which blocks are recomputed for `train.memory_budget`, and what it gives."""

    blocks: frozenset[BlockNumber]
    depths: tuple[int, ...]
    peak: Peak
    plain: Peak
    """Without recomputation."""
    flop: float
    """Share of a step's floating-point operations that it adds."""

    def __str__(self) -> str:
        if not self.blocks:
            return f"recomputation: of no block; predicted peak {self.peak}"
        counts = [sum(stage == i for stage, _ in self.blocks) for i in range(len(self.depths))]
        listed = ", ".join(f"{n} of {d} in stage {i + 1}" for i, (n, d) in enumerate(zip(counts, self.depths)) if n)
        return (
            f"recomputation: {len(self.blocks)} of {sum(self.depths)} blocks run again in the backward pass ({listed}; "
            f"{100 * self.flop:.0f} % more operations); predicted peak {self.peak}, "
            f"without {self.plain.total / GIB:.2f}"
        )


@lru_cache(maxsize=8)
def predict(config: Config, processes: int, device: str, *, again: bool = False) -> Prediction:
    """One step of `config` in one of `processes`, on a device of type `device`; which need not be there.

    With `again` also with every block recomputed. Masks hide as much as they can. Raises ConfigError where the
    configuration cannot be served.
    """
    t, m = config.train, swin_of(config)
    full = meta_model(config, tokenizer_of(config).vocab_size)
    sizes = [p.nbytes for p in full.parameters()]
    accumulation = max(round(getattr(t, s) / (getattr(t, f"micro_{s}") * processes)) for s in STREAMS if getattr(t, s))
    whole = sum(sizes)  # of the weights; as much of gradients and of each moment
    held = 4 * whole
    sharded = t.parallel == "fsdp" and processes > 1
    if sharded:
        held = held // processes + _gathered(full)
    elif processes > 1:
        held += whole  # DDP's buckets: the gradients of passes before the last one lie beside them
    # Gradients that are there from the start: of earlier micro-batches, in shards, or outside of CUDA graphs.
    there = accumulation > 1 or sharded or t.cuda_graphs
    if not there:
        held -= whole
    traces = [_trace(config, device, there, recompute) for recompute in ((False, True) if again else (False,))]
    states = held + traces[0][1]
    loaded = (accumulation - 1) * _loaded(config) if device == "cpu" else 0
    return Prediction(
        tuple(m.depths), states + loaded, states, 0 if there else whole, traces[0][0], traces[1][0] if again else []
    )


def choose(config: Config, processes: int, device: str) -> Choice:
    """The fewest blocks with which the predicted peak is at most `config.train.memory_budget`, all as in `predict`.

    Raises ConfigError where all of them are not enough: what is, and micro-batches that fit.
    """
    room = config.train.memory_budget
    predicted = predict(config, processes, device, again=True)
    order = predicted.blocks
    for count in range(len(order) + 1):
        chosen = frozenset(order[:count])
        peak = predicted.peak(chosen)
        if peak.total <= room * GIB:
            return Choice(chosen, predicted.depths, peak, predicted.peak(), predicted.flop(chosen))
    raise ConfigError(
        f"train.memory_budget = {room:g} GiB is too little: with blocks recomputed a step still needs at least "
        f"{predicted.least}. {_that_fits(config, processes, device, room)}"
    )


def recompute(model: BEVT, choice: Choice) -> None:
    """Have the blocks of `choice` recomputed."""
    for stage, block in choice.blocks:
        cast(SwinBlock, cast(SwinStage, model.encoder.layers[stage]).blocks[block]).recompute = True


@lru_cache(maxsize=8)
def views_at_once(config: FinetuneConfig, classes: int, device: str) -> int:
    """As many views as a forward pass without gradients takes below `config.test.memory` GiB by prediction; at least 1.

    The model's weights do not count. What a view adds is the difference of two views and one.
    """
    one, two = (_forward_peak(config, classes, views, device) for views in (1, 2))
    return max(1, 1 + int((config.test.memory * GIB - one) / max(two - one, 1)))


def _forward_peak(config: FinetuneConfig, classes: int, views: int, device: str) -> int:
    """Bytes that a forward pass of so many views holds at the most, pixels included."""
    d, clips = config.data, config.stream == "clips"
    model = plain(config.model) if device != "cpu" else config.model
    dtype = getattr(torch, config.train.precision)
    with torch.device("meta"):
        classifier = build(replace(config, model=model), classes, dtype=dtype)
    live = _Live(plain=device == "cpu" or config.model.attention_impl == "reference")
    with FakeTensorMode(allow_non_fake_inputs=True), live, torch.no_grad():
        faked(classifier.to(torch.float64) if dtype == torch.float64 else classifier)
        live.begin("forward")
        frames = torch.empty(views, d.frames if clips else 1, d.crop, d.crop, 3, dtype=torch.uint8)
        pixels = augment.to_encoder_clips(frames, config.model.pixels)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            classifier(pixels if clips else pixels.squeeze(2))
        live.mark()
    return live.spans[-1].rise


@contextmanager
def advised(key: str) -> Iterator[None]:
    """A context in which running out of memory is a RunError that says which key to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        said = str(error).strip().splitlines()
        raise RunError(f"out of memory ({said[0] if said else type(error).__name__}): lower {key}") from error


@contextmanager
def explained(config: Config, world: World) -> Iterator[None]:
    """A context in which running out of memory is a RunError that says what needs it and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the step's tensors, and what follows needs memory
        said = str(error).strip().splitlines()
        message = _explanation(config, world, said[0] if said else type(error).__name__)
        raise RunError(message) from error


def _ran_out(error: BaseException) -> bool:
    """On CUDA, on the CPU, in Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(said in str(error) for said in ("can't allocate memory", "not enough memory", "bad_alloc"))


def _explanation(config: Config, world: World, said: str) -> str:
    t, reference_path = config.train, config.path == "reference"
    predicted = predict(config, world.size, world.device.type, again=not reference_path)
    budget = t.memory_budget and choose(config, world.size, world.device.type)
    peak = budget.peak if budget else predicted.peak()
    cures = []
    halves = _halved(config)
    if halves:
        less = predict(halves, world.size, world.device.type).peak().total
        cures.append(
            f"{_micro(halves)} ({less / GIB:.2f} GiB; the global batch and the results stay, in more micro-batches)"
        )
    if not reference_path:
        least = predicted.least.total
        room = 0.75 * peak.total
        if world.device.type == "cuda":
            room = min(room, 0.9 * torch.cuda.get_device_properties(world.device).total_memory)
        if least < peak.total:
            cures.append(
                f"--train.memory-budget {max(room, least) / GIB + 0.005:.2f} (blocks are run again in the backward "
                f"pass; at least {least / GIB:.2f})"
            )
    if world.size > 1 and t.parallel != "fsdp":
        cures.append("--train.parallel fsdp (weights, gradients and moments in shards)")
    cure = ", or ".join(cures) or "a smaller model or crop, or more memory"
    return (
        f"out of memory in a step ({said}). A process of this run needs {peak}, its interpreter and libraries not "
        f"counted. Take {cure}; --resume continues from the last checkpoint"
    )


def _that_fits(config: Config, processes: int, device: str, room: float) -> str:
    """The largest of the halved micro-batches that fits, as a sentence."""
    smaller = _halved(config)
    while smaller is not None:
        least = predict(smaller, processes, device, again=True).least
        if least.total <= room * GIB:
            return f"{_micro(smaller)} fit ({least.total / GIB:.2f} GiB), or raise it"
        smaller = _halved(smaller)
    return "No smaller micro-batch fits: raise it, or take a smaller model or crop"


def _halved(config: Config) -> Config | None:
    """With micro-batches of half the size, in all streams that there are; None where one cannot be halved."""
    t = config.train
    micro = {f"micro_{s}": getattr(t, f"micro_{s}") for s in STREAMS if getattr(t, s)}
    if any(n % 2 for n in micro.values()):
        return None
    return replace(config, train=replace(t, **{key: n // 2 for key, n in micro.items()}))


def _micro(config: Config) -> str:
    t = config.train
    return " ".join(f"--train.micro-{s} {getattr(t, f'micro_{s}')}" for s in STREAMS if getattr(t, s))


def _gathered(model: BEVT) -> int:
    """Bytes that FSDP2 holds whole: weights and gradients of what is in no block, and of two blocks under way."""
    blocks = [module for module in model.modules() if isinstance(module, SwinBlock)]
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    root = sum(p.nbytes for p in model.parameters()) - sum(sizes)
    return 2 * (root + 2 * max(sizes))


def _loaded(config: Config) -> int:
    """Bytes of a micro-batch as it is loaded."""
    t, d = config.train, config.data
    clips, images = t.micro_clips * bool(t.clips), t.micro_images * bool(t.images)
    return 3 * d.crop**2 * (clips * d.frames + images)


def swin_of(config: Config) -> ModelConfig:
    """The configuration's Video Swin, the one encoder whose memory is predicted; ConfigError for another."""
    if isinstance(config.model, ViTConfig):
        raise ConfigError(f"memory is predicted for a Video Swin alone, not for model.kind {config.model.kind!r}")
    return config.model


def tokenizer_of(config: Config) -> FrozenTokenizer:
    """The configuration's tokenizer without data: the published size, or the fitted file's own."""
    settings = replace(tokenizer_settings(config), compile="no")
    if settings.kind == "dalle":
        with torch.device("meta"):
            return DalleTokenizer(DalleEncoder(), settings)
    size = VQTokenizer.load(settings.path).model.config if settings.path else VQConfig()
    with torch.device("meta"):
        return VQTokenizer(VQModel(size), settings)


class FakeReferenceBEVT(ReferenceBEVT):
    """The reference path for tensors without data."""

    def masked_positions(self, stream: Stream, inputs: MaskedInput) -> Tensor:
        """As many as there are slots: there is no mask to look at."""
        return torch.arange(inputs.slots, device=inputs.codes.device)


def meta_model(config: Config, vocab_size: int, *, reference_ops: bool = False) -> BEVT:
    """The configuration's model on "meta": initialisation looks at values, which fake tensors have not."""
    streams: list[Stream] = [s for s in STREAMS if getattr(config.train, s)]
    model = swin_of(config)
    if reference_ops:
        model = plain(model)
    dtype = getattr(torch, config.train.precision)
    kind = FakeReferenceBEVT if config.path == "reference" else BEVT
    with torch.device("meta"):
        built = kind(model, vocab_size, streams, dtype=dtype)
    return built.to(torch.float64) if dtype == torch.float64 else built


def faked(module: nn.Module) -> nn.Module:
    """`module` with new parameters and buffers of the current fake mode on the CPU (`to_empty` cannot swap them in)."""
    for child in module.modules():
        for name, p in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
        for name, b in child.named_buffers(recurse=False):
            setattr(child, name, torch.empty(b.shape, dtype=b.dtype))
    return module


def _trace(config: Config, device: str, gradients: bool, again: bool) -> tuple[list[_Span], int]:
    """A micro-batch on fake tensors, where blocks are alike two of a stage; and bytes of what is frozen or constant.

    `gradients`: those of an earlier micro-batch are there. `again`: every block is recomputed.
    """
    m = swin_of(config)
    config = replace(config, train=replace(config.train, cuda_graphs=False))
    whole = config.path == "reference"  # whose streams are alive together: no block stands for another
    if not whole:
        config = replace(config, model=replace(m, depths=tuple(min(d, 2) for d in m.depths)))
    tokenizer = _Piece(config, device)
    model = meta_model(config, tokenizer.inner.vocab_size, reference_ops=device != "cpu")
    cpu = torch.device("cpu")  # where fake tensors are taken for the device's
    # Fills the resize's cache with true numbers: fake ones would stay in it for the run.
    augment.tokenizer_view(
        torch.zeros(1, config.data.crop, config.data.crop, 3, dtype=torch.uint8), config.data.crop // 2
    )
    live = _Live(plain=device == "cpu" or m.attention_impl == "reference")
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        faked(model)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if gradients else None
        trained = live.live
        faked(tokenizer.inner.module)
        tokenizer.inner.settle(device)
        if config.path == "reference":  # makes constants, which stay
            with torch.no_grad():
                for stream in model.streams:
                    model(**{stream: unseen(config, stream, 1)})
        constant = live.live - trained
        step = TrainStep(
            model,
            cast(Any, tokenizer),
            build_optimizer(model, replace(config.optim, impl="torch")),
            config,
            World(0, 1, cpu),
            phases=_Marks(model, live),
        )
        _watch(model, live, again, blocks=not whole)
        live.begin("tokenizer")
        inputs, loaded = _prepare(config, tokenizer, model.streams)
        if device != "cpu":  # there the step's copy ends with the tokenizer, on the host there is none
            del loaded
        live.mark()
        for streams in step.passes:
            live.begin(f"{'+'.join(streams)} forward")
            given = {stream: inputs.pop(stream) for stream in streams}
            step.run(given, {stream: torch.empty((), dtype=torch.float64) for stream in streams}, last=True)
            live.mark()
    return live.spans, constant


def _prepare(config: Config, tokenizer: _Piece, streams: Sequence[Stream]) -> tuple[dict[Stream, MaskedInput], Any]:
    """As `bevt.train.step.masked_inputs`, which looks at masks: with every frame tokenized. And the loaded frames."""
    t, d = config.train, config.data
    frames: dict[str, Tensor] = {}
    if "clips" in streams:
        frames["clips"] = torch.empty(t.micro_clips * d.frames, d.crop, d.crop, 3, dtype=torch.uint8)
    if "images" in streams:
        frames["images"] = torch.empty(t.micro_images, d.crop, d.crop, 3, dtype=torch.uint8)
    loaded = dict(frames)
    if "images" in streams and d.jitter > 0:
        frames["images"] = augment.color_jitter(frames["images"], torch.empty(t.micro_images, 6))
    everything = {stream: np.arange(len(x)) for stream, x in frames.items()}
    codes, _ = _codes(frames, everything, cast(Any, tokenizer), d.crop // 2)
    inputs: dict[Stream, MaskedInput] = {}
    for stream in streams:
        given = unseen(config, stream, getattr(t, f"micro_{stream}"), pixels=False)
        if stream == "clips":
            pixels = augment.to_encoder_clips(frames[stream].unflatten(0, (-1, d.frames)), config.model.pixels)
        else:
            pixels = augment.to_encoder_images(frames[stream], config.model.pixels)
        inputs[stream] = replace(given, pixels=pixels, codes=codes[stream].view(given.codes.shape))
    return inputs, loaded


def unseen(config: Config, stream: Stream, batch: int, *, pixels: bool = True) -> MaskedInput:
    """`batch` clips or images of the recipe's size, with as many slots as masks can need."""
    d, side = config.data, config.data.crop // 16
    m = config.model
    drop = torch.empty(len(m.drop_path_rates), m.branches, batch) if m.drop_path else None
    depth, frames = (d.frames // m.tubelet, d.frames) if stream == "clips" else (1, 1)
    settings = config.clip_mask if stream == "clips" else config.image_mask
    slots = batch * masking.capacity(settings, (depth, side, side)) * (m.tubelet if stream == "clips" else 1)
    shape: tuple[int, ...] = (batch, depth) if stream == "clips" else (batch,)
    times: tuple[int, ...] = (frames,) if stream == "clips" else ()
    return MaskedInput(
        torch.empty((batch, 3, *times, d.crop, d.crop) if pixels else 0),
        torch.empty(*shape, side, side, dtype=torch.bool),
        torch.empty(batch, *times, side, side, dtype=torch.int64),
        slots,
        drop,
    )


class _Piece:
    """In place of a tokenizer: one of the pieces that it encodes in, of all frames' codes."""

    def __init__(self, config: Config, device: str) -> None:
        self.inner, self.device = tokenizer_of(config), device

    def encode(self, pixels: Tensor) -> Tensor:
        """As `FrozenTokenizer.encode`."""
        m, _, h, w = pixels.shape
        codes = torch.empty(m, h // self.inner.downsample, w // self.inner.downsample, dtype=torch.int64)
        with torch.no_grad():
            rows = self.inner.rows(pixels[: self.inner.piece(self.device, h, w)])
            linear_argmax(rows, *self.inner.tail, impl="reference")
        return codes


class _Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most at a time, from mark to mark.

    Own code: torch.distributed's MemTracker is private, follows modules instead of phases, and knows no scratch.
    """

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        """An op's reference is itself where it is named, else it stands for Triton's kernel."""
        self.live = 0
        self.spans: list[_Span] = []
        self._seen: set[int] = set()
        self.begin("")

    def begin(self, phase: str) -> None:
        """Start a phase."""
        self.phase, self.part = phase, next(iter(PARTS))
        self._first = self._most = self.live
        self._flop = 0

    def mark(self, block: BlockNumber | None = None) -> None:
        """What was done since the last mark belonged to the part that is set, and to `block`."""
        self.spans.append(
            _Span(self.phase, self.part, block, self._most - self._first, self.live - self._first, self._flop)
        )
        self._first = self._most = self.live
        self._flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.plain and func in _PLAIN and args[-1] == "reference":
            with self:
                return _PLAIN[func](*args[:-1])
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        formula = flop_registry.get(func.overloadpacket)
        if formula:
            self._flop += formula(*args, **(kwargs or {}), out_val=out)
        if func.name() == "bevt_kernels::masked_linear_cross_entropy_forward":
            self._most = max(self._most, self.live + self._loss_scratch(*args))
        if func.name() == "bevt_kernels::conv3x3":
            self._most = max(self._most, self.live + conv3x3.native_scratch(args[1], torch.get_num_threads()))
        return out

    def _loss_scratch(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, _: Any, impl: str
    ) -> int:
        """Bytes, as its implementations' own sources have them."""
        slots, (classes, channels) = len(index), weight.shape
        if not self.plain:  # Triton: the logits of a chunk, and the rows of all slots
            return hidden.itemsize * (min(slots * classes, 2**24) + slots * channels)
        if impl == "reference":  # four tensors of a chunk's 2**20 logits, and a chunk's share of the weight's gradient
            return 4 * (4 * 2**20 + weight.numel())
        return max(4 * slots * classes // 8, 2**22)  # C++: an eighth of all logits, at least 4 MiB

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self._most = max(self._most, self.live)
        finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


_PLAIN: dict[Any, Callable[..., Any]] = {ops.forward: reference.forward, ops.backward: reference.backward}


class _Marks(Phases):
    """A step's marks, on `live`."""

    def __init__(self, model: nn.Module, live: _Live) -> None:
        self.live = live
        super().__init__(model, torch.device("cpu"))

    def mark(self, phase: str) -> None:
        """As `Phases.mark`; the first "head" of a pass ends its forward."""
        self.live.mark()
        if phase == "head" and "forward" in self.live.phase:
            self.live.begin(self.live.phase.replace("forward", "backward"))


def _watch(model: BEVT, live: _Live, again: bool, *, blocks: bool) -> None:
    """Marks around every part of `model`, and with `blocks` around these, which are recomputed or not."""

    def enter(part: str) -> None:
        live.mark()
        live.part = part

    for part, names in PARTS.items():
        for name in names:
            if hasattr(model, name):
                getattr(model, name).register_forward_pre_hook(lambda *_, part=part: enter(part))
    model.norm.register_forward_pre_hook(lambda *_: enter("head and loss"))  # what it makes, the head takes
    for i, stage in enumerate(model.encoder.layers if blocks else ()):
        own = cast(SwinStage, stage).blocks
        for j, block in enumerate(own):
            cast(SwinBlock, block).recompute = again
            block.register_forward_pre_hook(lambda _, args, at=(i, j): _begins(live, args[0], at))
            last = j == len(own) - 1
            block.register_forward_hook(lambda _, args, out, at=(i, j), last=last: _ends(live, out, at, last))


def _begins(live: _Live, x: Tensor, at: BlockNumber) -> None:
    live.mark()
    if x.requires_grad:

        def done(_: Tensor) -> None:
            live.mark(at)

        x.register_hook(done)


def _ends(live: _Live, out: Tensor, at: BlockNumber, last: bool) -> None:
    live.mark(at)
    if last and out.requires_grad:  # in the backward pass the others begin where the next one has ended

        def begins(_: Tensor) -> None:
            live.mark()

        out.register_hook(begins)
