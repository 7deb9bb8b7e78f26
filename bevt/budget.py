"""What a recipe costs: the real modules are run on fake tensors, their products and saved tensors are counted.

Multiply-adds are those of matrix products and convolutions (`torch.utils.flop_counter`; the project's ops by their own
formulas). Forward + backward is three times the forward for all that is trained; the tokenizer runs forward only.
"Before" is the official code's way: every frame tokenized, decoders and head on all positions, all logits kept. Memory
is counted for one micro-batch of one device: weights, gradients and the two moments in float32, and every tensor that
autograd keeps for the backward pass, not the workspace inside an op. Nothing here is a measurement.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bevt import masking
from bevt.config import Config, ConfigError, MaskConfig, check
from bevt.models.bevt import BEVT, PATCH, MaskedInput, Stream
from bevt.train.optim import total_steps

MODULES_OF: dict[str, tuple[str, ...]] = {
    "patch embedding": ("patch_embed", "patch_embed_2d"),
    "encoder": ("encoder",),
    "  projections": (),
    "  attention": (),
    "  MLP": (),
    "  merging": (),
    "decoders": ("video_decoder", "image_decoder", "norm"),
    "head and loss": ("head",),
}
"""Rows of the budget and the children of `BEVT` they stand for; indented rows are parts of the one above."""

BEHIND = ("decoders", "head and loss")
"""Rows of what comes behind the encoder, where the official way is another."""


class Counts(NamedTuple):
    """What may differ between two ways of a component; as in `Component`."""

    clip_gmac: float
    image_gmac: float
    kept: int


class UpstreamBEVT(BEVT):
    """The official code's way behind the encoder: logits of all positions, of which the masked ones are selected."""

    def stream_loss(self, stream: Stream, inputs: MaskedInput) -> tuple[Tensor, Tensor]:
        """As `BEVT.stream_loss`, of the first `slots` positions: tensors without data have no mask to look at."""
        logits = self.head(self.decode(stream, inputs.pixels, inputs.mask)).flatten(0, -2)
        index = torch.arange(inputs.slots)
        masked, targets = logits.index_select(0, index), inputs.codes.flatten().index_select(0, index)
        return F.cross_entropy(masked, targets), (masked.argmax(1) == targets).float().mean()


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
    """Bytes that autograd keeps for the backward pass of one micro-batch."""
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


def components(config: Config) -> list[Component]:
    """Tokenizer, encoder by kind of product, decoders and head, for a clip and an image of the recipe's size."""
    vocab_size, tokenizer = _tokenizer(config)
    view, frames = config.data.crop // 2, config.data.frames
    shallow = replace(config, model=replace(config.model, depths=(1, 1, 1, 1)))  # the encoder is not counted again
    with FakeTensorMode():
        model, upstream = _model(config, vocab_size, BEVT), _model(shallow, vocab_size, UpstreamBEVT)
        counts = [{s: _count(m, s, _inputs(config, s)) for s in m.streams} for m in (model, upstream)]
        frame = _gmac(_fake(tokenizer), torch.empty(1, 3, view, view))
    clips, images = bool(config.train.clips), bool(config.train.images)
    rows = [
        Component(
            f"tokenizer ({config.tokenizer.kind})",
            _size(tokenizer),
            frame * _masked_frames(config) * clips,
            frame * images,
            Counts(frame * frames * clips, frame * images, 0),
            trained=False,
        )
    ]
    kept = activation_bytes(config), activation_bytes(shallow, UpstreamBEVT)
    for name, modules in MODULES_OF.items():
        size = sum(_size(getattr(model, m)) for m in modules if hasattr(model, m))
        now, before = (
            Counts(count.get("clips", {}).get(name, 0.0), count.get("images", {}).get(name, 0.0), saved.get(name, 0))
            for count, saved in zip(counts, kept)
        )
        rows.append(Component(name, size, now.clip_gmac, now.image_gmac, before if name in BEHIND else now, now.kept))
    return rows


def activation_bytes(config: Config, kind: type[BEVT] = BEVT) -> dict[str, int]:
    """Bytes that autograd keeps between forward and backward of one micro-batch, by component, in its precision.

    Of the head they include the gradients that its op keeps in their place.
    """
    t = config.train
    counts: dict[Stream, int] = {"clips": t.micro_clips if t.clips else 0, "images": t.micro_images if t.images else 0}
    total: dict[str, int] = dict.fromkeys(MODULES_OF, 0)
    vocab_size, _ = _tokenizer(config)
    with FakeTensorMode():
        model = _model(config, vocab_size, kind)
        for stream, count in counts.items():
            if count:
                # Linear in the batch but for what autocast makes of the weights, which two points separate.
                one, two = (_saved_bytes(model, stream, _inputs(config, stream, n), t.precision) for n in (1, 2))
                for name in one:
                    total[name] += one[name] + (count - 1) * (two[name] - one[name])
    return total


def budget(config: Config, gpus: int, flops: float, efficiency: float, clips: int, images: int) -> str:
    """The budget as a table for a terminal. `flops` in FLOP/s of one device; `clips` and `images` of one epoch.

    Raises ConfigError for a configuration that cannot be trained (but for its paths), or a number out of range.
    """
    if gpus < 1 or flops <= 0 or clips < 1 or images < 1 or not 0 < efficiency <= 1:
        raise ConfigError(
            "--gpus, --tflops, --clips and --images must be above 0 and --efficiency above 0 and at most 1, "
            f"got {gpus}, {flops / 1e12:g}, {clips}, {images} and {efficiency:g}"
        )
    check(replace(config, data=replace(config.data, clips="any", images="any")))
    t = config.train
    rows = components(config)
    whole = [row for row in rows if not row.name.startswith(" ")]
    step, before = (sum(row.step_flop(t.clips, t.images, way) for row in whole) for way in (False, True))
    table = Table(title=f"{config.recipe}: {t.clips} clips + {t.images} images a step", title_justify="left")
    for column in (
        "",
        "parameters",
        "a clip",
        "an image",
        "a step",
        "share",
        "before",
        "states",
        "kept",
        "kept before",
    ):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("", "M", "GMAC", "GMAC", "TFLOP", "%", "TFLOP", "GiB", "GiB", "GiB", style="dim")
    for row in rows:
        flop = row.step_flop(t.clips, t.images)
        part = row.name.startswith(" ")
        table.add_row(
            row.name,
            "" if part else f"{row.parameters / 1e6:.2f}",
            f"{row.clip_gmac:.2f}",
            f"{row.image_gmac:.2f}",
            f"{flop / 1e12:.1f}",
            f"{100 * flop / step:.0f}",
            f"{row.step_flop(t.clips, t.images, before=True) / 1e12:.1f}",
            "" if part else f"{row.states / 2**30:.2f}",
            "" if part else f"{row.kept / 2**30:.2f}",
            "" if part else f"{row.before.kept / 2**30:.2f}",
            style="dim" if part else None,
        )
    table.add_section()
    table.add_row(
        "sum",
        f"{sum(row.parameters for row in whole) / 1e6:.2f}",
        f"{sum(row.clip_gmac for row in whole):.2f}",
        f"{sum(row.image_gmac for row in whole):.2f}",
        f"{step / 1e12:.1f}",
        "100",
        f"{before / 1e12:.1f}",
        f"{sum(row.states for row in whole) / 2**30:.2f}",
        f"{sum(row.kept for row in whole) / 2**30:.2f}",
        f"{sum(row.before.kept for row in whole) / 2**30:.2f}",
    )
    steps = total_steps(config.optim, (clips / t.clips) if t.clips else (images / t.images))
    seconds = steps * step / (gpus * flops * efficiency)
    per_device = (t.clips / t.micro_clips if t.clips else t.images / t.micro_images) / gpus
    console = Console(file=io.StringIO(), width=110, highlight=False)
    console.print(table)
    console.print(
        "a clip, an image: forward; a step: forward, and the backward of what is trained, of the whole step\n"
        "states: weights, gradients and AdamW's moments on one device; kept: for the backward pass of a micro-batch of "
        f"{t.micro_clips * bool(t.clips)} clips + {t.micro_images * bool(t.images)} images in {t.precision}, "
        f"{math.ceil(per_device)} of which make a step on each of {gpus} devices\n"
        "before: with every frame tokenized, decoders and head on all positions and their logits kept; now: on masked "
        "positions, as many as there are on average (on a GPU on as many as there can be, to keep shapes static)\n"
        f"{steps} steps: {steps * step / 1e18:.2f} EFLOP, {seconds / 3600:.1f} hours on {gpus} devices at "
        f"{100 * efficiency:.0f} % of {flops / 1e12:.0f} TFLOP/s (counted; the efficiency is assumed)"
    )
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _tokenizer(config: Config) -> tuple[int, nn.Module]:
    """Vocabulary and module of the recipe's tokenizer: the published DALL-E sizes, or the fitted file's own."""
    if config.tokenizer.kind == "dalle":
        from bevt.tokenizers.dalle import DalleEncoder

        with torch.device("meta"):
            return 8192, DalleEncoder()
    from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer

    if config.tokenizer.path:
        vq = VQTokenizer.load(config.tokenizer.path).model.config
    else:
        vq = VQConfig()
    with torch.device("meta"):
        return vq.vocab_size, VQModel(vq).encoder


def _model(config: Config, vocab_size: int, kind: type[BEVT]) -> BEVT:
    """The recipe's model in fake tensors: made on "meta" (initialisation looks at values), then moved to a fake CPU."""
    streams: list[Stream] = [s for s in ("clips", "images") if getattr(config.train, s)]
    with torch.device("meta"):
        model = kind(replace(config.model, attention_impl="reference", loss_impl="reference"), vocab_size, streams)
    _fake(model)
    return model


def _fake(module: nn.Module) -> nn.Module:
    """`module` with new parameters of the current fake mode on the CPU (`to_empty` cannot swap fake ones in)."""
    for child in module.modules():
        for name, p in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(torch.empty(p.shape)))
    return module


def _inputs(config: Config, stream: Stream, batch: int = 1) -> MaskedInput:
    """Clips or images of the recipe's size, with as many slots as a mask covers on average."""
    d, side = config.data, config.data.crop // 16
    if stream == "images":
        slots = _masked(config.image_mask, (1, side, side))
        mask, codes = (torch.empty(batch, side, side, dtype=t) for t in (torch.bool, torch.int64))
        return MaskedInput(torch.empty(batch, 3, d.crop, d.crop), mask, codes, batch * slots)
    depth = d.frames // PATCH[0]
    slots = PATCH[0] * _masked(config.clip_mask, (depth, side, side))
    mask = torch.empty(batch, depth, side, side, dtype=torch.bool)
    codes = torch.empty(batch, d.frames, side, side, dtype=torch.int64)
    return MaskedInput(torch.empty(batch, 3, d.frames, d.crop, d.crop), mask, codes, batch * slots)


def _masked(config: MaskConfig, grid: tuple[int, int, int]) -> int:
    """Positions of the token grid that a mask covers on average, over 1024 draws."""
    return round(masking.generate(config, np.arange(1024), grid).sum() / 1024)


def _masked_frames(config: Config) -> float:
    """Frames of a clip that hold a masked position, on average over 1024 draws."""
    side = config.data.crop // 16
    masks = masking.generate(config.clip_mask, np.arange(1024), (config.data.frames // PATCH[0], side, side))
    return PATCH[0] * masks.any((2, 3)).sum() / 1024


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


def _saved_bytes(model: BEVT, stream: Stream, inputs: MaskedInput, precision: str) -> dict[str, int]:
    """Bytes of the distinct storages that autograd saves in one forward pass, parameters left out, by component."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    component = dict.fromkeys(MODULES_OF, 0)
    current = next(iter(MODULES_OF))
    kept: dict[int, Tensor] = {}  # alive, so that no address is used twice

    def enter(name: str) -> None:
        nonlocal current
        current = name

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            component[current] += storage.nbytes()
            kept[storage._cdata] = x
        return x

    handles = [model.norm.register_forward_hook(lambda *_: enter("head and loss"))]
    for name, modules in MODULES_OF.items():
        for child in (getattr(model, m) for m in modules if hasattr(model, m)):
            handles.append(child.register_forward_pre_hook(lambda *_, name=name: enter(name)))
    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with saved, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        model(**{stream: inputs})
    for handle in handles:
        handle.remove()
    return component


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
