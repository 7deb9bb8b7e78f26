"""The ops in their places: the encoder, the masked decoder and head, a whole micro-batch."""

from __future__ import annotations

import copy
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

from benchmarks.problems.base import Contestant, Forward, Leaves, Problem, Work, contestants, counted, leaf, run
from benchmarks.registry import QUANTITIES, HeadCase, PretrainCase, StepCase
from bevt import masking
from bevt.config import SIZES, Config, ModelConfig, plain, resized
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.models import video_swin
from bevt.models.bevt import BEVT, MaskedInput, Stream
from bevt.models.reference import ReferenceBEVT
from bevt.train.step import masked_inputs, slots_for

BOTH = QUANTITIES[2]
WindowFunction = Callable[[Tensor, Tensor, WindowCase], Tensor]
Inputs = dict[Stream, MaskedInput]


class _Model(Problem):
    """What they share: gradients of one kind are judged together, half precision is autocast's."""

    def judged(self, results: Leaves) -> Leaves:
        """Gradients of one kind together: the largest error of a LayerNorm's 96 numbers alone is a matter of luck."""
        kinds: dict[str, list[Tensor]] = {}
        for name, value in results.items():
            kinds.setdefault(".".join(name.split(".")[-2:]), []).append(value.flatten())
        return {kind: torch.cat(values) for kind, values in kinds.items()}

    def _precision(self, leaves: Leaves) -> torch.autocast:
        """In which a contestant computes: float64 where the leaves are."""
        wide = next(iter(leaves.values())).dtype
        return torch.autocast(self.device, self.dtype, enabled=self.dtype.itemsize < wide.itemsize == 4)


class VideoSwinStep(_Model):
    """Patch embedding and Video Swin: parameters -> the last stage's output. Under autocast where the dtype is half."""

    case: StepCase
    names = (*IMPLEMENTATIONS, "eager")

    def __init__(self, case: StepCase, device: str) -> None:
        super().__init__(case, device)
        self.config = SIZES[case.size]
        torch.manual_seed(0)
        model = self._model("reference").apply(video_swin.init_weights).to(device)
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
        forward, backward = counted(self.contestants["reference"].forward, self.leaves, self.grads)
        return {"forward": Work(forward), "backward": Work(backward), "forward+backward": Work(forward + backward)}


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


class MaskedHead(_Model):
    """The encoder's last two maps, and all parameters after the encoder -> the clips' loss and accuracy."""

    case: HeadCase
    names = (*IMPLEMENTATIONS, "dense", "dense compiled")
    quantities = (BOTH,)

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
            "dense compiled": Baseline(torch.compile(self._dense, fullgraph=True, dynamic=False), compile_reasons),
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
        return {BOTH: Work(3 * 2 * (up + fuse + frames + head))}


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


class PretrainStep(_Model):
    """A micro-batch of the joint recipe from uint8 frames, tokenizer included: parameters -> the sum of both losses.

    "after" is the package's way. "before" is the official code's: all frames tokenized with all logits,
    decoder and head on all positions, eager attention. The tokenizer's weights are random. It is judged in two parts:
    codes at the masked positions by their float32 logits, against those that plain half precision picks; loss and
    gradients on float32's codes, so that a code which differs is not an error of the model.
    """

    case: PretrainCase
    names = ("after", "before")
    quantities = (BOTH,)
    least, warm = 3, 1  # a step takes a minute on a CPU

    def __init__(self, case: PretrainCase, device: str) -> None:
        from bevt.tokenizers.dalle import DalleEncoder, DalleTokenizer  # needs safetensors, which the others do not

        super().__init__(case, device)
        config = Config(model=replace(resized(ModelConfig(), case.size), drop_path=0.0))
        data = replace(config.data, frames=case.frames, crop=case.side)
        train = replace(config.train, precision="bfloat16" if self.dtype == torch.bfloat16 else "float32")
        self.config = replace(config, data=data, train=train)
        torch.manual_seed(0)
        self.model = BEVT(self.config.model, 8192, device=device, dtype=self.dtype).to(device)
        self.upstream = ReferenceBEVT(self.config.model, 8192, device=device, dtype=self.dtype).to(device)
        encoder = DalleEncoder(case.tokenizer_width)
        for conv in encoder.modules():
            if isinstance(conv, nn.Conv2d):  # so that logits differ as much as pixels do
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.plain = copy.deepcopy(encoder).to(device).requires_grad_(False)
        self.tokenizer = DalleTokenizer(encoder).to(torch.device(device))
        side, images = self.config.data.crop, case.batch * case.images
        image_masks = masking.generate(self.config.image_mask, np.arange(images), (1, side // 16, side // 16))
        self.batch = Batch(
            clips=torch.randint(256, (case.batch, case.frames, side, side, 3), dtype=torch.uint8),
            clip_masks=_clip_masks(self.config, case.batch),
            images=torch.randint(256, (images, side, side, 3), dtype=torch.uint8),
            image_masks=torch.from_numpy(image_masks).squeeze(1),
            image_jitter=None,
        )
        self.leaves = {name: leaf(p) for name, p in self.model.named_parameters()}
        self.grads = {"loss": torch.randn(()).to(device)}
        self.contestants = {
            "after": Contestant(lambda x: self._loss(self.model, x, self._inputs()), [], True),
            "before": Contestant(lambda x: self._loss(self.upstream, x, self._published_inputs()), [], False, "torch"),
        }

    def _inputs(self) -> Inputs:
        return masked_inputs(self.batch, self.tokenizer, self.config, torch.device(self.device))

    def _upstream_inputs(self) -> Inputs:
        """As `masked_inputs`, with codes of every frame by the plain encoder and all of its logits."""
        batch: Any = self.batch.to(torch.device(self.device))
        clips, images = augment.to_encoder_clips(batch.clips), augment.to_encoder_images(batch.images)
        clip_codes = self._plain_logits(batch.clips.flatten(0, 1)).argmax(1).unflatten(0, batch.clips.shape[:2])
        return {
            "clips": MaskedInput(clips, batch.clip_masks, clip_codes, 0),
            "images": MaskedInput(images, batch.image_masks, self._plain_logits(batch.images).argmax(1), 0),
        }

    def _published_inputs(self) -> Inputs:
        """`_upstream_inputs` in the published encoder's precision, float16 on CUDA."""
        with torch.autocast(self.device, torch.float16, enabled=self.device == "cuda"):
            return self._upstream_inputs()

    @torch.no_grad()
    def _plain_logits(self, frames: Tensor) -> Tensor:
        """(M, H, W, 3) uint8 -> (M, V, h, w), in float32 but for autocast."""
        view = augment.tokenizer_view(frames, self.config.data.crop // 2)
        return self.plain(0.8 * view + 0.1)

    def _loss(self, model: BEVT, leaves: Leaves, inputs: Inputs) -> Leaves:
        """The sum of both streams' losses, with the leaves as the parameters of `model`."""
        wide = next(iter(leaves.values())).dtype
        inputs = {stream: replace(x, pixels=x.pixels.to(wide)) for stream, x in inputs.items()}
        own = {f"model.{name}": p for name, p in leaves.items()}

        def loss(**streams: MaskedInput) -> Tensor:
            out = model(**streams)
            return out["loss_clips"] + out["loss_images"]

        with self._precision(leaves):
            return {
                "loss": torch.func.functional_call(_Call(model, loss), own, (), {str(s): x for s, x in inputs.items()})
            }

    def answer(self, name: str, frozen: bool = False) -> Leaves:
        """Logits of the contestant's codes; loss and gradients on float32's codes."""
        inputs = self._inputs() if name == "after" else self._published_inputs()
        model = self.model if name == "after" else self.upstream
        fixed = {stream: replace(x, codes=self.published[stream].codes) for stream, x in inputs.items()}
        results = run(lambda leaves: self._loss(model, leaves, fixed), self.leaves, self.grads)
        return {**results, "logits of the codes": self._logits_of(inputs)}

    def _logits_of(self, inputs: Inputs) -> Tensor:
        codes = torch.cat([x.codes[_positions(x)] for _, x in sorted(inputs.items())])
        return self.logits.gather(1, codes[:, None]).squeeze(1)

    def truth(self) -> tuple[Leaves, Leaves]:
        """Sets `published` and `logits`, which `answer` needs: float32's codes, and logits at the masked positions."""
        batch: Any = self.batch.to(torch.device(self.device))
        with torch.backends.cudnn.flags(allow_tf32=False):
            self.published = self._upstream_inputs()
            pairs = (
                (batch.clips.flatten(0, 1), _positions(self.published["clips"]).flatten(0, 1)),
                (batch.images, _positions(self.published["images"])),
            )
            pieces = (piece for frames, mask in pairs for piece in zip(frames.split(4), mask.split(4)))
            self.logits = torch.cat([self._plain_logits(f).movedim(1, -1)[mask] for f, mask in pieces])
        precision = self.tokenizer.precision
        with torch.autocast(self.device, precision, enabled=precision.itemsize < 4):
            half = self._logits_of(self._upstream_inputs())
        plain = lambda leaves: self._loss(self.upstream, leaves, self.published)  # noqa: E731
        double = {name: leaf(x.double()) for name, x in self.leaves.items()}
        oracle = run(plain, double, {"loss": self.grads["loss"].double()})
        eager = run(plain, self.leaves, self.grads)
        what = "logits of the codes"
        return {**oracle, what: self.logits.amax(1).double()}, {**eager, what: half}

    def work(self) -> dict[str, Work]:
        """The model's at the masked positions, and the tokenizer's on the frames that hold one."""
        inputs = self._upstream_inputs()
        slots = {stream: int(_positions(x).sum()) for stream, x in inputs.items()}
        frames = sum(int(_positions(x).any(-1).any(-1).sum()) for x in inputs.values())
        meta = {
            stream: MaskedInput(x.pixels.to("meta"), x.mask.to("meta"), x.codes.to("meta"), slots[stream])
            for stream, x in inputs.items()
        }
        config = plain(self.config.model)
        with torch.device("meta"):
            model = BEVT(config, 8192)
        step = sum(counted(lambda leaves: self._loss(model, leaves, meta), self.leaves, self.grads))
        view = self.config.data.crop // 2
        encoder, frame = copy.deepcopy(self.plain).to("meta"), {"frame": torch.empty(1, 3, view, view)}
        tokens, _ = counted(lambda leaves: {"logits": encoder(leaves["frame"])}, frame, {})
        return {BOTH: Work(step + frames * tokens)}


def _positions(x: MaskedInput) -> Tensor:
    """The mask as the codes lie: clips (B, T, h, w), images (M, h, w)."""
    return x.mask.repeat_interleave(2, dim=1) if x.mask.dim() == 4 else x.mask
