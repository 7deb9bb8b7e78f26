"""The ops in their places: the encoder, the masked decoder and head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from bevt_kernels import Spec
from bevt_kernels.baselines import WINDOW_ATTENTION
from bevt_kernels.baselines.common import Baseline, compile_reasons
from bevt_kernels.select import IMPLEMENTATIONS, float_reasons
from bevt_kernels.testing import WindowCase, eager_window_attention
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.foreign import torchvision_schemas
from benchmarks.problems.base import (
    Contestant,
    Forward,
    Leaves,
    Problem,
    Work,
    contestants,
    counted,
    leaf,
    run,
)
from benchmarks.problems.ops import Size3, allowed
from benchmarks.registry import QUANTITIES, HeadCase, StepCase
from bevt import masking
from bevt.config import SIZES, Config, ModelConfig, plain, resized
from bevt.models import layers, video_swin
from bevt.models.bevt import BEVT
from bevt.models.names import to_torchvision
from bevt.train.step import slots_for

BOTH = QUANTITIES[2]
WindowFunction = Callable[[Tensor, Tensor, WindowCase], Tensor]


class Model(Problem):
    """What they share: gradients of one kind are judged together, half precision is autocast's."""

    def judged(self, results: Leaves) -> Leaves:
        """Gradients of one kind together: the largest error of a LayerNorm's 96 numbers alone is a matter of luck."""
        kinds: dict[str, list[Tensor]] = {}
        for name, value in results.items():
            what, _, path = name.rpartition(" ")
            kinds.setdefault(f"{what} {'.'.join(path.split('.')[-2:])}".strip(), []).append(value.flatten())
        return {kind: torch.cat(values) for kind, values in kinds.items()}

    def _precision(self, leaves: Leaves) -> torch.autocast:
        """In which a contestant computes: float64 where the leaves are."""
        wide = next(iter(leaves.values())).dtype
        return torch.autocast(self.device, self.dtype, enabled=self.dtype.itemsize < wide.itemsize == 4)


class VideoSwinStep(Model):
    """Patch embedding and Video Swin: parameters -> the last stage's output. Under autocast where the dtype is half."""

    case: StepCase
    names = (*IMPLEMENTATIONS, "eager", "torchvision")
    warm = 0  # a step takes a second on a CPU, and one was run before

    def __init__(self, case: StepCase, device: str) -> None:
        super().__init__(case, device)
        self.config = SIZES[case.size]
        torch.manual_seed(0)
        model = self._model("reference").apply(layers.init_weights).to(device)
        self.leaves = {name: leaf(p) for name, p in model.named_parameters()}
        self.clip = torch.randn(case.batch, 3, case.frames, case.side, case.side).to(device)
        grid = (case.frames // 2, case.side // 32, case.side // 32)
        self.grads = {"out": torch.randn(case.batch, *grid, 8 * self.config.embed_dim).to(device)}
        head_dim = self.config.embed_dim // self.config.num_heads[0]
        spec = Spec(device, self.dtype, True, self.config.window_size, head_dim)
        rivals = {"eager": WINDOW_ATTENTION["eager"]}
        self.contestants = contestants(
            "window_attention", spec, self._forward, rivals, lambda function: self._forward("reference", function)
        )
        self.contestants["torchvision"] = self._torchvision()

    def _torchvision(self) -> Contestant:
        """Torchvision's Swin with the same weights."""
        torchvision_schemas()
        try:
            from torchvision.models.video.swin_transformer import PatchEmbed3d, SwinTransformer3d
        except (ImportError, RuntimeError) as error:  # one of another build of torch fails with the latter
            why = [f"torchvision does not import ({error}): pip install torchvision, of the build of this torch"]
            return Contestant(lambda leaves: {}, why, False, "torchvision")
        c = self.config
        model = SwinTransformer3d(
            list(video_swin.PATCH), c.embed_dim, list(c.depths), list(c.num_heads), list(c.window_size),
            stochastic_depth_prob=0.0, num_classes=1, patch_embed=PatchEmbed3d,
        ).to(self.device)  # fmt: skip
        function = _Call(model, lambda clip: model.features(model.patch_embed(clip)))
        ours = {
            name.replace("0.", "patch_embed.", 1) if name[0] == "0" else f"encoder.{name[2:]}": torch.tensor(i)
            for i, name in enumerate(self.leaves)
        }
        mapped = to_torchvision(ours, c.window_size)  # numbers of the leaves, by torchvision's names
        places = {f"model.{name}": int(i) for name, i in mapped.items() if not name.endswith("position_index")}

        def forward(leaves: Leaves) -> Leaves:
            values = list(leaves.values())
            clip = self.clip.to(values[0])
            with self._precision(leaves):
                out = torch.func.functional_call(function, {name: values[i] for name, i in places.items()}, (clip,))
            return {"out": out.to(clip.dtype)}

        return Contestant(forward, [], False, "torchvision")

    def _model(self, impl: str) -> nn.Module:
        linear_impl: Any = "native" if impl == "native" else "reference"
        config = replace(self.config, drop_path=0.0, attention_impl=impl, linear_impl=linear_impl)  # type: ignore[arg-type]
        embed = video_swin.PatchEmbed(video_swin.PATCH, config.embed_dim)
        return nn.Sequential(embed, video_swin.VideoSwin(config))

    def _forward(self, impl: str, function: WindowFunction | None = None) -> Forward:
        """The model with `impl`, or with a plain function in the op's place."""
        model = self._model(impl)
        if function:
            _attend_by(model, function)

        def forward(leaves: Leaves) -> Leaves:
            clip = self.clip.to(next(iter(leaves.values())))
            with self._precision(leaves):
                return {"out": torch.func.functional_call(model, leaves, (clip,))[-1].to(clip.dtype)}

        return forward

    def truth(self) -> tuple[Leaves, Leaves]:
        plain = self._forward("reference", eager_window_attention)
        double = {name: leaf(x.double()) for name, x in self.leaves.items()}
        return run(plain, double, {"out": self.grads["out"].double()}), run(plain, self.leaves, self.grads)

    def work(self) -> dict[str, Work]:
        """Counted, but for attention's backward: what the counter has of it computes scores a second time."""
        forward, backward = counted(self.contestants["reference"].forward, self.leaves, self.grads)
        case = self.case
        grid = (case.frames // video_swin.PATCH[0], case.side // video_swin.PATCH[1], case.side // video_swin.PATCH[2])
        attention, excluded = attention_flop(self.config, case.batch, grid)
        backward -= attention // 2
        both = forward + backward
        return {
            "forward": Work(forward, forward - excluded),
            "backward": Work(backward, backward - 2 * excluded),
            BOTH: Work(both, both - 3 * excluded),
        }


def attention_flop(config: ModelConfig, batch: int, grid: Size3) -> tuple[int, int]:
    """FLOP of attention's products in Video Swin's forward, and of those the ones for pairs that shifts exclude.

    `grid`: the first stage's map of tokens.
    """
    every = excluded = 0.0
    depth, height, width = grid
    half = [w // 2 for w in config.window_size]
    for stage, blocks in enumerate(config.depths):
        for block in range(blocks):
            shift = (half[0], half[1], half[2]) if block % 2 else (0, 0, 0)
            window, shift = video_swin.clip_window((depth, height, width), config.window_size, shift)
            padded = tuple(-(-size // w) * w for size, w in zip((depth, height, width), window))
            flop = 4 * batch * math.prod(padded) * math.prod(window) * (config.embed_dim << stage)
            every += flop
            excluded += flop * (1 - allowed((padded[0], padded[1], padded[2]), window, shift))
        height, width = -(-height // 2), -(-width // 2)
    return round(every), round(excluded)


def _attend_by(model: nn.Module, function: WindowFunction) -> None:
    """Put a plain function in the place of the op."""

    def attend(qkv: Tensor, table: Tensor, **k: Any) -> Tensor:
        b, depth, height, width, channels = qkv.shape
        heads, grid = k["num_heads"], (depth, height, width)
        case = WindowCase(
            b, grid, k["window_size"], k["shift"], k["table_window"], heads, head_dim=channels // (3 * heads)
        )
        return function(qkv, table, case)

    for module in model.modules():
        if isinstance(module, video_swin.WindowAttention3D):
            module.attend = attend  # type: ignore[assignment]


def _dense_loss(features: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """As the official code: logits of all positions, of which the masked ones are then taken.

    features (..., C), mask and codes (...) -> loss and accuracy.
    """
    logits = F.linear(features, weight, bias)[mask]
    labels = codes[mask]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).to(logits.dtype).mean()


class MaskedHead(Model):
    """The encoder's last two maps, and all parameters after the encoder -> the clips' loss and accuracy."""

    case: HeadCase
    names = (*IMPLEMENTATIONS, "dense", "dense compiled")
    quantities = (BOTH,)
    warm = 0  # a step of all positions takes seconds on a CPU, and one was run before

    def __init__(self, case: HeadCase, device: str) -> None:
        super().__init__(case, device)
        # The encoder is not run, so it has one block a stage.
        config = replace(resized(ModelConfig(), case.size), depths=(1, 1, 1, 1), loss_impl="reference")
        torch.manual_seed(0)
        self.model = BEVT(config, case.classes, ("clips",), device=device, dtype=self.dtype).to(device)
        self.plain = BEVT(plain(config), case.classes, ("clips",), device=device, dtype=self.dtype).to(device)
        mask = _clip_masks(Config(), case.batch)
        self.slots = 2 * slots_for(Config().clip_mask, mask, torch.device(device))
        self.mask = mask.to(device)
        batch, depth, h, w = self.mask.shape
        self.codes = torch.randint(case.classes, (batch, 2 * depth, h, w)).to(device)
        channels = 8 * config.embed_dim
        self.leaves = {
            "x3": leaf(torch.randn(batch, depth, h, w, channels // 2).to(device)),
            "x4": leaf(torch.randn(batch, depth, h // 2, w // 2, channels).to(device)),
        }
        own = ("video_decoder.", "norm.", "head.")
        self.leaves |= {name: leaf(p) for name, p in self.model.named_parameters() if name.startswith(own)}
        self.grads = {"loss": torch.randn(()).to(device)}
        rivals = {
            "dense": Baseline(self._dense, float_reasons),
            "dense compiled": Baseline(
                torch.compile(self._dense, fullgraph=True, dynamic=False), compile_reasons, compiles=True
            ),
        }
        spec = Spec(device, self.dtype, True, classes=case.classes)
        op = "masked_linear_cross_entropy"
        theirs = lambda function: self._forward(self.plain, function)  # noqa: E731
        self.contestants = contestants(op, spec, self._ours, rivals, theirs)

    def _forward(self, model: BEVT, function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Forward:
        """`function` (x3, x4) -> (loss, accuracy), with the leaves as the parameters of `model`."""

        def forward(leaves: Leaves) -> Leaves:
            x3, x4, *_ = leaves.values()
            own = {f"model.{name}": p for name, p in leaves.items() if name not in ("x3", "x4")}
            with self._precision(leaves):
                loss, accuracy = torch.func.functional_call(_Call(model, function), own, (x3, x4))
            return {"loss": loss, "accuracy": accuracy}

        return forward

    def _ours(self, impl: str) -> Forward:
        model = self.plain if impl == "reference" else self.model

        def masked(x3: Tensor, x4: Tensor) -> tuple[Tensor, Tensor]:
            model.implementations["masked_linear_cross_entropy"] = impl
            return model.masked_loss("clips", x3, x4, self.mask, self.codes, self.slots)

        return self._forward(model, masked)

    def _dense(self, x3: Tensor, x4: Tensor) -> tuple[Tensor, Tensor]:
        features = self.plain.norm(self.plain.video_decoder(x3, x4))
        mask = self.mask.repeat_interleave(2, dim=1)
        return _dense_loss(features, self.plain.head.weight, self.plain.head.bias, mask, self.codes)

    def truth(self) -> tuple[Leaves, Leaves]:
        dense = self._forward(self.plain, self._dense)
        double = {name: leaf(x.double()) for name, x in self.leaves.items()}
        grads = {"loss": self.grads["loss"].double()}
        return run(dense, double, grads), run(dense, self.leaves, self.grads)

    def work(self) -> dict[str, Work]:
        """Multiply-adds of decoder and head at the masked positions; each tensor that has no gradient is small."""
        channels, masked = self.leaves["x4"].shape[-1], int(self.mask.sum())
        up = masked * channels * channels  # of stage 4's token under the position
        fuse = masked * (channels // 2 + channels) * channels
        frames, head = 2 * masked * channels * channels, 2 * masked * channels * self.case.classes
        flop = 3 * 2 * (up + fuse + frames + head)
        return {BOTH: Work(flop, flop)}


class _Call(nn.Module):
    """A function that reads a model's parameters, as a module: so that `functional_call` can give it others."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any, **keywords: Any) -> Any:
        return self.function(*args, **keywords)


def _clip_masks(config: Config, clips: int) -> Tensor:
    """(B, d, h, w) masks of the recipe's clips."""
    side = config.data.crop // 16
    grid = (config.data.frames // 2, side, side)
    return torch.from_numpy(masking.generate(config.clip_mask, np.arange(clips), grid))
