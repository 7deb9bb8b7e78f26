"""What a recipe costs: the real modules are run on fake tensors, their products and saved tensors are counted.

Multiply-adds are those of matrix products and convolutions (`torch.utils.flop_counter`; the project's ops by their own
formulas). Forward + backward is three times the forward for all that is trained; the tokenizer runs forward only.
"Before" is the reference path (`bevt.models.reference`): every frame tokenized, attention materialised, decoders and
head on all positions, all logits kept. Memory is `bevt.train.memory`'s prediction. Nothing here is a measurement.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bevt import masking
from bevt.config import Config, ConfigError, FinetuneConfig, MaskConfig, VideoMAEConfig, ViTConfig, check, plain
from bevt.data.build import accumulation, samples
from bevt.models.bevt import BEVT, MaskedInput, Stream, TimeSformerBEVT
from bevt.models.classifier import build as build_classifier
from bevt.models.videomae import VideoMAE
from bevt.models.vit import grid_of
from bevt.train import memory
from bevt.train.memory import GIB, PARTS
from bevt.train.optim import total_steps

ROWS = (
    "patch embedding", "encoder", "  projections", "  attention", "  MLP", "  merging", "decoders", "head and loss",
)  # fmt: skip
"""Of the model; indented ones are parts of the one above."""

BEHIND = ("decoders", "head and loss")
"""Rows of what comes behind the encoder, where the official way is another."""


Trained = Config | VideoMAEConfig | FinetuneConfig
"""What a budget is made of."""


class Counts(NamedTuple):
    """What may differ between two ways of a component; as in `Component`."""

    clip_gmac: float
    image_gmac: float
    kept: int


@dataclass(frozen=True)
class Component:
    """One row of the budget."""

    name: str
    """Indented: part of the row above that is not."""
    parameters: int
    clip_gmac: float
    """Forward, one clip, in 10**9 multiply-adds."""
    image_gmac: float
    before: Counts
    """The same by the official code's way."""
    kept: int = 0
    """Bytes that are kept for the backward pass of one micro-batch, in the stream that keeps most."""
    trained: bool = True
    """Whether it is trained (three times the forward) or frozen (forward only)."""

    @property
    def states(self) -> int:
        """Bytes of weights and, where trained, gradients and AdamW's two moments, in float32."""
        return self.parameters * (16 if self.trained else 4)

    def step_flop(self, clips: int, images: int, before: bool = False) -> float:
        """Floating-point operations of one optimizer step over all devices."""
        gmac = self.before if before else self
        return 2e9 * (3 if self.trained else 1) * (clips * gmac.clip_gmac + images * gmac.image_gmac)


def components(config: Config, gpus: int = 1, device: str = "cuda") -> list[Component]:
    """Tokenizer, encoder by kind of product, decoders and head, for a clip and an image of the recipe's size.

    Memory is that of one of `gpus` devices of type `device`.
    """
    rows = counted(config)
    # Behind the encoder alone the official way multiplies other numbers.
    shallow = replace(memory.swin_of(config), depths=(1, 1, 1, 1))
    upstream = _counts(replace(_before(config), model=shallow))
    frame, (now, before) = rows[0], (memory.predict(c, gpus, device, again=a) for c, a in _ways(config))
    gmac = frame.image_gmac or frame.clip_gmac / masked_frames(config)
    clips, images = bool(config.train.clips), bool(config.train.images)
    done = [replace(frame, before=Counts(gmac * config.data.frames * clips, gmac * images, 0))]
    for row in rows[1:]:
        kept = now.kept().get(row.name, 0), before.kept().get(row.name, 0)
        counts = {s: upstream[s].get(row.name, 0.0) if s in upstream else 0.0 for s in ("clips", "images")}
        own = {"clips": row.clip_gmac, "images": row.image_gmac}
        chosen = counts if row.name in BEHIND else own
        done.append(replace(row, before=Counts(chosen["clips"], chosen["images"], kept[1]), kept=kept[0]))
    return done


def step_flop(config: Trained, classes: int = 400) -> tuple[float, float]:
    """Counted floating-point operations of one optimizer step over all devices: the tokenizer's, and all others;
    `classes` of a classifier.

    Decoders, head and tokenizer at masked positions and frames, as many as there are on average; without what is
    computed again to save memory.
    """
    clips, images = samples(config)
    flop = {row.name: row.step_flop(clips, images) for row in _whole(counted(config, classes))}
    tokenizer = sum(n for name, n in flop.items() if name.startswith("tokenizer"))
    return tokenizer, sum(flop.values()) - tokenizer


def _whole(rows: list[Component]) -> list[Component]:
    """Those that are no part of another."""
    return [row for row in rows if not row.name.startswith(" ")]


def counted(config: Trained, classes: int = 400) -> list[Component]:
    """The rows, but for memory and for what was before; `classes` of a classifier's head."""
    if not isinstance(config, Config):
        return _parts_counted(config, classes)
    tokenizer = memory.tokenizer_of(config)
    module = tokenizer.module if config.tokenizer.kind == "dalle" else tokenizer.module.get_submodule("encoder")
    view = config.data.crop // 2
    frame = _gmac(module, torch.empty(1, 3, view, view, device="meta"))
    clips, images = bool(config.train.clips), bool(config.train.images)
    none = Counts(0.0, 0.0, 0)
    rows = [
        Component(
            f"tokenizer ({config.tokenizer.kind})",
            _size(module),
            frame * masked_frames(config) * clips,
            frame * images,
            none,
            trained=False,
        )
    ]
    if isinstance(config.model, ViTConfig):
        return rows + _parts_counted(config, classes)
    model = memory.meta_model(config, tokenizer.vocab_size, reference_ops=True)
    counts = _counts(config, model)
    for name in ROWS:
        size = sum(_size(getattr(model, m)) for m in PARTS.get(name, ()) if hasattr(model, m))
        gmac = [counts[s].get(name, 0.0) if s in counts else 0.0 for s in ("clips", "images")]
        rows.append(Component(name, size, gmac[0], gmac[1], none))
    return rows


def _counts(config: Config, model: BEVT | None = None) -> dict[str, dict[str, float]]:
    """GMAC of a clip and an image by row."""
    if model is None:
        model = memory.meta_model(config, memory.tokenizer_of(config).vocab_size, reference_ops=True)
    return {stream: _count(model, stream, _inputs(config, stream)) for stream in model.streams}


def _before(config: Config) -> Config:
    """The reference path of `config`."""
    return replace(config, path="reference", train=replace(config.train, memory_budget=0.0))


def _ways(config: Config) -> tuple[tuple[Config, bool], tuple[Config, bool]]:
    """Now and before, and whether recomputation is asked for."""
    return (config, config.path != "reference"), (_before(config), False)


def budget(
    config: Trained,
    gpus: int,
    flops: float,
    efficiency: float,
    clips: int,
    images: int,
    device: str = "cuda",
    classes: int = 400,
) -> str:
    """The budget as a table for a terminal. `flops` in FLOP/s of one device; `clips` and `images` of one epoch;
    `classes` of a classifier.

    Raises ConfigError for a configuration that cannot be trained (but for its paths), or a number out of range.
    """
    if gpus < 1 or flops <= 0 or clips < 1 or images < 1 or not 0 < efficiency <= 1:
        raise ConfigError(
            "--gpus, --tflops, --clips and --images must be above 0 and --efficiency above 0 and at most 1, "
            f"got {gpus}, {flops / 1e12:g}, {clips}, {images} and {efficiency:g}"
        )
    check(replace(config, data=replace(config.data, clips="any", images="any")))
    # BEVT with a Video Swin alone has a reference path and a predicted memory.
    if isinstance(config, Config) and not isinstance(config.model, ViTConfig):
        rows = components(config, gpus, device)
        table, notes = _table(config, rows, before=True), _notes_of_both(config, gpus, device)
    else:
        rows = counted(config, classes)
        table, notes = _table(config, rows, before=False), _notes(config, rows)
    step = sum(row.step_flop(*samples(config)) for row in _whole(rows))
    console = Console(file=io.StringIO(), width=110, highlight=False)
    console.print(table)
    console.print("\n".join([*notes, *_length(config, step, gpus, flops, efficiency, clips, images)]))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _table(config: Trained, rows: list[Component], before: bool) -> Table:
    """`rows` and their sum; `before`: with what was before and with memory."""
    made, whole = samples(config), _whole(rows)
    step = sum(row.step_flop(*made) for row in whole)
    columns = [("", ""), ("parameters", "M"), ("a clip", "GMAC"), ("an image", "GMAC"), ("a step", "TFLOP")]
    columns += [("share", "%")]
    if before:
        columns += [("before", "TFLOP"), ("states", "GiB"), ("kept", "GiB"), ("kept before", "GiB")]

    def cells(these: list[Component], part: bool = False) -> list[str]:
        """Of their sum; of a part only what is its own."""
        flop = sum(row.step_flop(*made) for row in these)
        shown = [
            "" if part else f"{sum(row.parameters for row in these) / 1e6:.2f}",
            f"{sum(row.clip_gmac for row in these):.2f}",
            f"{sum(row.image_gmac for row in these):.2f}",
            f"{flop / 1e12:.1f}",
            f"{100 * flop / step:.0f}",
        ]
        if before:
            shown.append(f"{sum(row.step_flop(*made, before=True) for row in these) / 1e12:.1f}")
            sizes = ([r.states for r in these], [r.kept for r in these], [r.before.kept for r in these])
            shown += ["" if part else f"{sum(each) / GIB:.2f}" for each in sizes]
        return shown

    title = f"{config.recipe}: {config.train.clips} clips + {config.train.images} images a step"
    table = Table(title=title, title_justify="left")
    for column, _ in columns:
        table.add_column(column, justify="right" if column else "left")
    table.add_row(*(unit for _, unit in columns), style="dim")
    for row in rows:
        part = row.name.startswith(" ")
        table.add_row(row.name, *cells([row], part), style="dim" if part else None)
    table.add_section()
    table.add_row("sum", *cells(whole))
    return table


def _notes_of_both(config: Config, gpus: int, device: str) -> list[str]:
    """What the columns say where there is a reference path, and the predicted memory."""
    t = config.train
    per_device = (t.clips / t.micro_clips if t.clips else t.images / t.micro_images) / gpus
    return [
        "a clip, an image: forward; a step: forward, and the backward of what is trained, of the whole step",
        "states: weights, gradients and AdamW's moments; kept: for the backward pass of the stream that keeps most, of "
        f"a micro-batch of {t.micro_clips * bool(t.clips)} clips + {t.micro_images * bool(t.images)} images in "
        f"{t.precision}, {math.ceil(per_device)} of which make a step on each of {gpus} devices",
        _memory(config, gpus, device),
        "before: with every frame tokenized, attention materialised, decoders and head on all positions; now: on "
        "masked positions, as many as there are on average (on a GPU as many as there can be, to keep shapes static)",
    ]


def _notes(config: Trained, rows: list[Component]) -> list[str]:
    """What the columns say of a model without a reference path."""
    notes = ["a clip, an image: forward; a step: forward and backward"]
    if isinstance(config, FinetuneConfig):
        gmac = max(sum(row.clip_gmac for row in _whole(rows)), sum(row.image_gmac for row in _whole(rows)))
        clips, crops = config.views
        each = f"{clips} x {crops} views of {gmac:.1f} GMAC"
        notes.append(f"a test of a file: {each}, {clips * crops * gmac / 1e3:.2f} TMAC")
        if config.head.probes:
            notes.append("the encoder is frozen; the probes on it are not counted")
        if config.augment.repeats > 1:
            notes.append(f"each file is cut {config.augment.repeats} times a step")
    return notes


def _length(
    config: Trained, step: float, gpus: int, flops: float, efficiency: float, clips: int, images: int
) -> list[str]:
    """The operations and hours of a whole run of steps of `step` FLOP, and why so many devices would be refused it."""
    t = config.train
    steps = total_steps(config.optim, (clips / t.clips) if t.clips else (images / t.images))
    seconds = steps * step / (gpus * flops * efficiency)
    lines = [
        f"{steps} steps: {steps * step / 1e18:.2f} EFLOP, {seconds / 3600:.1f} hours on {gpus} devices at "
        f"{100 * efficiency:.0f} % of {flops / 1e12:.0f} TFLOP/s (counted; the efficiency is assumed)"
    ]
    try:
        accumulation(config, gpus)
    except ConfigError as error:
        lines.append(f"as it is, a run on {gpus} devices would be refused: {error}")
    return lines


def _parts_counted(config: Trained, classes: int) -> list[Component]:
    """As `counted`, of a model of any kind but BEVT with a Video Swin; of probes what lies under them, frozen."""
    model, inputs = _on_meta(config, classes)
    frozen = isinstance(config, FinetuneConfig) and bool(config.head.probes)
    none = Counts(0.0, 0.0, 0)
    counts = {stream: _parts(model, given) for stream, given in inputs.items()}
    names = ("patch embedding", "encoder", "decoder", "head and loss")
    children: dict[str, list[int]] = {name: [] for name in names}
    for child, p in model.named_parameters():
        row = "head and loss"
        if child.startswith(("encoder.patch_embed.", "patch_embed.", "patch_embed_2d.")):
            row = "patch embedding"
        elif child.startswith("encoder."):
            row = "encoder"
        elif child.startswith(("decoder.", "encoder_to_decoder.")) and not child.startswith("decoder.head."):
            row = "decoder"
        children[row].append(p.numel())
    rows = []
    for row in ("patch embedding", "encoder", "  projections", "  attention", "  MLP", "decoder", "head and loss"):
        gmac = [counts[s][row] if s in counts else 0.0 for s in ("clips", "images")]
        size = sum(children.get(row, ()))
        if size or any(gmac):
            rows.append(Component(row, size, gmac[0], gmac[1], none, trained=not frozen))
    return rows


def _on_meta(config: Trained, classes: int) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """The model without data, in plain PyTorch, and what it takes of one clip or image, by stream."""
    data, model = config.data, plain(config.model)
    streams: list[Stream] = [s for s in ("clips", "images") if getattr(config.train, s)]
    with torch.device("meta"):
        clip, image = torch.empty(1, 3, data.frames, data.crop, data.crop), torch.empty(1, 3, data.crop, data.crop)
        pixels = {"clips": clip, "images": image}
        if isinstance(config, FinetuneConfig):
            classifier = build_classifier(replace(config, model=model), classes)
            return classifier, {s: {"pixels": pixels[s]} for s in streams}
        assert isinstance(model, ViTConfig)
        grid = grid_of(model, data.frames, data.crop)
        if isinstance(config, VideoMAEConfig):
            hidden = masking.capacity(config.clip_mask, grid)
            index = torch.empty(1, math.prod(grid), dtype=torch.int64)
            given = {"visible": index[:, hidden:], "hidden": index[:, :hidden], "pixel_std": torch.empty(3)}
            return VideoMAE(model, config.decoder, grid), {"clips": {"pixels": pixels["clips"], **given}}
        assert isinstance(config, Config)
        masked = TimeSformerBEVT(model, memory.tokenizer_of(config).vocab_size, streams, grid=grid)
        return masked, {s: {s: _inputs(config, s)} for s in streams}


def _parts(model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """GMAC of one forward pass, by row."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs)
    flops, name = counter.get_flop_counts(), type(model).__name__
    total = sum(flops["Global"].values())

    def module(*suffixes: str) -> float:
        return sum(sum(v.values()) for k, v in flops.items() if k.endswith(suffixes))

    products = ("bmm", "scaled_dot_product", "window_attention")
    attends = [v for k, v in flops.items() if k.endswith((".attn", ".temporal_attn")) and f"{name}.encoder" in k]
    attention = sum(n for ops in attends for op, n in ops.items() if any(part in str(op) for part in products))
    embed = module(f"{name}.encoder.patch_embed", f"{name}.patch_embed", f"{name}.patch_embed_2d")
    encoder = module(f"{name}.encoder") - module(f"{name}.encoder.patch_embed")
    mlp = sum(sum(v.values()) for k, v in flops.items() if k.endswith(".mlp") and f"{name}.encoder" in k)
    decoder = module(f"{name}.decoder", f"{name}.encoder_to_decoder") - module(f"{name}.decoder.head")
    parts = {
        "patch embedding": embed,
        "encoder": encoder,
        "  projections": encoder - attention - mlp,
        "  attention": attention,
        "  MLP": mlp,
        "decoder": decoder,
        "head and loss": total - embed - encoder - decoder,
    }
    return {row: n / 2e9 for row, n in parts.items()}


def _memory(config: Config, gpus: int, device: str) -> str:
    """The predicted peak of one device, with recomputation and before, in lines."""
    now, before = (memory.predict(c, gpus, device, again=a) for c, a in _ways(config))
    lines = [f"peak of one device ({device}): {now.peak()}"]
    if now.again:
        lines.append(
            f"  with blocks recomputed down to {now.least.total / GIB:.2f} GiB (--train.memory-budget; all of them: "
            f"{100 * now.flop(frozenset(now.blocks)):.0f} % more operations)"
        )
    lines.append(f"  before {before.peak()}")
    if config.train.memory_budget:
        lines.append(f"{memory.choose(config, gpus, device)}")
    lines.append(
        "  predicted, uncompiled, masks as large as they get; not in it: interpreter, libraries, decoding processes"
    )
    return "\n".join(lines)


def _inputs(config: Config, stream: Stream) -> MaskedInput:
    """A clip or an image of the recipe's size, with as many slots as a mask covers on average."""
    tubelet = config.model.tubelet
    side, depth = config.data.crop // 16, config.data.frames // tubelet
    if stream == "images":
        slots = masked_positions(config.image_mask, (1, side, side))
    else:
        slots = tubelet * masked_positions(config.clip_mask, (depth, side, side))
    with torch.device("meta"):
        return replace(memory.unseen(config, stream, 1), slots=slots)


def masked_positions(config: MaskConfig, grid: tuple[int, int, int]) -> int:
    """Positions of the token grid that a mask covers on average, over 1024 draws."""
    return round(masking.generate(config, np.arange(1024), grid).sum() / 1024)


def masked_frames(config: Config) -> float:
    """Frames of a clip that hold a masked position, on average over 1024 draws."""
    side, tubelet = config.data.crop // 16, config.model.tubelet
    masks = masking.generate(config.clip_mask, np.arange(1024), (config.data.frames // tubelet, side, side))
    return tubelet * masks.any((2, 3)).sum() / 1024


def _count(model: BEVT, stream: Stream, inputs: MaskedInput) -> dict[str, float]:
    """GMAC of one forward pass by component."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**{stream: inputs})
    flops = counter.get_flop_counts()
    total = sum(flops["Global"].values())
    ops = {str(op): n for op, n in flops["Global"].items()}

    def module(*suffixes: str) -> float:
        return sum(sum(v.values()) for k, v in flops.items() if k.endswith(suffixes))

    head = sum(n for op, n in ops.items() if "masked_linear_cross_entropy" in op) + module("BEVT.head")
    attention = sum(n for op, n in ops.items() if "window_attention" in op)
    encoder = module("BEVT.encoder")
    embed = module("BEVT.patch_embed", "BEVT.patch_embed_2d")
    mlp, merging, attn = module(".mlp"), module(".downsample"), module(".attn")
    parts = {
        "patch embedding": embed,
        "encoder": encoder,
        "decoders": total - encoder - embed - head,
        "head and loss": head,
        "  projections": attn - attention,
        "  attention": attention,
        "  MLP": mlp,
        "  merging": merging,
    }
    return {name: n / 2e9 for name, n in parts.items()}


def _gmac(module: nn.Module, x: Tensor) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(x)
    return counter.get_total_flops() / 2e9


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
