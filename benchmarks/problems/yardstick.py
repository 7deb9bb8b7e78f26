"""Training steps of other systems: ours, by this project's models, against Hugging Face's."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from bevt_kernels import Spec, select
from torch import Tensor, nn

from benchmarks.foreign import torchvision_schemas
from benchmarks.problems.base import Contestant, Forward, Leaves, Work, leaf, run
from benchmarks.problems.models import Model
from benchmarks.registry import VideoMAECase, ViTCase
from bevt.config import IMAGENET, DecoderConfig, ViTConfig
from bevt.models import vit_names
from bevt.models.classifier import ViTClassifier
from bevt.models.videomae import VideoMAE
from bevt.models.vit import grid_of

PATCH = 16
"""Side of a token."""

RATIO = 0.9
"""Of a frame's patches that are hidden."""

CLASSES = 400


class Widths(NamedTuple):
    """Of an encoder, and of VideoMAE's decoder; the MLPs are four times as wide."""

    channels: int
    layers: int
    heads: int
    decoder_channels: int
    decoder_layers: int
    decoder_heads: int


SIZES: dict[str, Widths] = {"tiny": Widths(48, 2, 3, 24, 1, 2), "base": Widths(768, 12, 12, 384, 4, 6)}
"""base: ViT-B, its decoder that of the paper (arXiv 2203.12602); tiny is for tests."""

OURS = ("native", "reference")
"""Implementations of our linear layers; attention is PyTorch's fused one."""

ATTENTION = {"hugging face sdpa": "sdpa", "hugging face eager": "eager"}
"""Rivals, by what transformers calls their attention."""


@cache
def _transformers_reasons() -> list[str]:
    """Why transformers' models cannot be made."""
    if importlib.util.find_spec("transformers") is None:
        return ["transformers is not installed: pip install transformers"]
    torchvision_schemas()  # transformers imports it where it is installed
    try:
        importlib.import_module("transformers.models.videomae.modeling_videomae")
    except Exception as error:  # its own and whatever a package that it finds beside it raises
        cause = error.__cause__ or error
        return [f"transformers cannot be imported ({cause!r:.200}): a torchvision of another build?"]
    return []


def tube_masks(clips: int, tokens: tuple[int, int, int]) -> Tensor:
    """(B, d h w) bool, True where hidden: in each clip the same patches of all frames, as many in each clip.

    That many are rounded down, 176 of 196, as in the paper's code.
    """
    depth, height, width = tokens
    hidden = int(RATIO * height * width)
    places = torch.rand(clips, height * width).argsort(1) < hidden
    return places.repeat(1, depth)


class _Step(Model):
    """Parameters -> a loss, by ours and by transformers' model of the same weights. Under autocast on CUDA.

    The parameters are random, by transformers' initialisation, and have the names that they have there; ours joins
    queries, keys and values first, which is part of its time.
    """

    case: VideoMAECase | ViTCase
    names: tuple[str, ...] = (*OURS, *ATTENTION)
    tubelet = 2

    def __init__(self, case: VideoMAECase | ViTCase, device: str) -> None:
        super().__init__(case, device)
        self.tokens = (case.frames // self.tubelet, case.side // PATCH, case.side // PATCH)
        torch.manual_seed(0)
        self.clips = torch.randn(case.batch, case.frames, 3, case.side, case.side).to(device)
        self.grads = {"loss": torch.randn(()).to(device)}
        self._inputs()
        reasons = _transformers_reasons()
        self.models = {} if reasons else {attention: self._theirs(attention) for attention in self._attention()}
        self.leaves = {}
        if self.models:
            self.leaves = {name: leaf(p.to(device)) for name, p in self.models["eager"].named_parameters()}
        self.contestants = {}
        for impl in OURS:
            why = reasons + select.reasons("linear", impl, Spec(device, self.dtype, True))
            self.contestants[impl] = Contestant(self._ours(impl), why, True)
        for name, attention in ATTENTION.items():
            if attention in self._attention():
                forward = self._forward(attention)
                self.contestants[name] = Contestant(forward, reasons, False, "transformers")

    def _attention(self) -> tuple[str, ...]:
        """What transformers has for this model."""
        return tuple(ATTENTION.values())

    def _inputs(self) -> None:
        """What else a step takes, random."""

    def _theirs(self, attention: str) -> nn.Module:
        raise NotImplementedError

    def _their_loss(self, model: nn.Module, leaves: Leaves, clip: slice) -> Tensor:
        raise NotImplementedError

    def _our_model(self, impl: str) -> nn.Module:
        raise NotImplementedError

    def _our_loss(self, model: nn.Module, state: Leaves) -> Tensor:
        raise NotImplementedError

    def _config(self, impl: str) -> ViTConfig:
        widths = SIZES[self.case.size]
        kind: Any = self.case.kind if isinstance(self.case, ViTCase) else "videomae"
        return ViTConfig(
            kind=kind,
            embed_dim=widths.channels,
            depth=widths.layers,
            num_heads=widths.heads,
            tubelet=self.tubelet,
            linear_impl=impl,  # type: ignore[arg-type]
        )

    def _settings(self, attention: str) -> dict[str, Any]:
        """Of transformers' configurations."""
        case, widths = self.case, SIZES[self.case.size]
        return dict(
            image_size=case.side,
            num_frames=case.frames,
            patch_size=PATCH,
            hidden_size=widths.channels,
            num_hidden_layers=widths.layers,
            num_attention_heads=widths.heads,
            intermediate_size=4 * widths.channels,
            layer_norm_eps=1e-6,
            num_labels=CLASSES,
            attn_implementation=attention,
        )

    def _ours(self, impl: str) -> Forward:
        """With the leaves as parameters."""
        built: list[nn.Module] = []

        def forward(leaves: Leaves) -> Leaves:
            if not built:
                built.append(self._our_model(impl).to(self.device))
            state = vit_names.recognise(leaves, whole=True).state
            with self._precision(leaves):
                return {"loss": self._our_loss(built[0], state)}

        return forward

    def _forward(self, attention: str, clip: slice = slice(None)) -> Forward:
        """Of those clips, with the leaves as parameters."""

        def forward(leaves: Leaves) -> Leaves:
            with self._precision(leaves):
                return {"loss": self._their_loss(self.models[attention], leaves, clip)}

        return forward

    def truth(self) -> tuple[Leaves, Leaves]:
        """In float64 clip by clip, whose losses are means of as many numbers, and by fused attention where there is
        one: ViViT's scores in float64 take 1 GB a clip and layer.
        """
        if not self.leaves:
            return {}, {}
        double = {name: leaf(x.double()) for name, x in self.leaves.items()}
        oracle: dict[str, Tensor] = {}
        for i in range(self.case.batch):
            forward = self._forward(self._attention()[0], slice(i, i + 1))
            part = run(forward, double, {"loss": self.grads["loss"].double()})
            for name, x in part.items():
                oracle[name] = oracle.get(name, torch.zeros_like(x)) + x / self.case.batch
        return oracle, run(self._forward("eager"), self.leaves, self.grads)

    def _work(self, embed: int, rest: int) -> dict[str, Work]:
        """The gradient to the pixels takes nothing."""
        forward, backward = self.case.batch * (embed + rest), self.case.batch * (embed + 2 * rest)
        flops = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
        return {quantity: Work(flop, flop) for quantity, flop in flops.items()}


class VideoMAEStep(_Step):
    """The mean squared error of the hidden patches' normalised pixels."""

    case: VideoMAECase

    def _inputs(self) -> None:
        self.mask = tube_masks(self.case.batch, self.tokens).to(self.device)
        self.visible, self.hidden = (
            chosen.nonzero()[:, 1].view(self.case.batch, -1) for chosen in (~self.mask, self.mask)
        )
        self.std = (torch.tensor(IMAGENET.std) / 255).to(self.device)

    def _theirs(self, attention: str) -> nn.Module:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        widths = SIZES[self.case.size]
        config = VideoMAEConfig(
            **self._settings(attention),
            tubelet_size=self.tubelet,
            decoder_hidden_size=widths.decoder_channels,
            decoder_num_hidden_layers=widths.decoder_layers,
            decoder_num_attention_heads=widths.decoder_heads,
            decoder_intermediate_size=4 * widths.decoder_channels,
            use_mean_pooling=False,
        )
        model = VideoMAEForPreTraining(config)
        model.decoder.norm.eps = config.layer_norm_eps  # the one that the configuration does not reach
        return model

    def _their_loss(self, model: nn.Module, leaves: Leaves, clip: slice) -> Tensor:
        inputs = self.clips[clip].to(next(iter(leaves.values())).dtype), self.mask[clip]
        return torch.func.functional_call(model, leaves, inputs).loss

    def _our_model(self, impl: str) -> nn.Module:
        widths, config = SIZES[self.case.size], self._config(impl)
        decoder = DecoderConfig(widths.decoder_channels, widths.decoder_layers, widths.decoder_heads)
        return VideoMAE(config, decoder, self.tokens, device=self.device, dtype=self.dtype)

    def _our_loss(self, model: nn.Module, state: Leaves) -> Tensor:
        inputs = (self.clips.transpose(1, 2).to(next(iter(state.values())).dtype), self.visible, self.hidden, self.std)
        return torch.func.functional_call(model, state, inputs)["loss_clips"]

    def judged(self, results: Leaves) -> Leaves:
        """The mask token's few numbers together with those of the layer that makes the others of its kind."""
        kinds = super().judged(results)
        token, layer = kinds.pop("grad mask_token", None), "grad encoder_to_decoder.weight"
        return kinds if token is None else {**kinds, layer: torch.cat([kinds[layer], token])}

    def work(self) -> dict[str, Work]:
        """Products of the layers: of visible tokens in the encoder, of all in the decoder, of hidden ones in its head.

        transformers embeds the hidden patches as well, which nobody needs.
        """
        widths = SIZES[self.case.size]
        tokens, hidden = self.mask.shape[1], int(self.mask[0].sum())
        visible, pixels = tokens - hidden, 3 * self.tubelet * PATCH**2
        embed = 2 * visible * pixels * widths.channels
        encoder = widths.layers * _layer(visible, widths.channels)
        narrow = 2 * visible * widths.channels * widths.decoder_channels
        decoder = widths.decoder_layers * _layer(tokens, widths.decoder_channels)
        head = 2 * hidden * widths.decoder_channels * pixels
        return self._work(embed, encoder + narrow + decoder + head)


class ViTStep(_Step):
    """The cross-entropy of classes, of ViViT's first model or of TimeSformer."""

    case: ViTCase

    def __init__(self, case: ViTCase, device: str) -> None:
        self.kind: Literal["vivit_1", "timesformer"] = case.kind
        self.tubelet = 1 if case.kind == "timesformer" else 2
        self.names = (*OURS, *(name for name, attention in ATTENTION.items() if attention in self._attention()))
        super().__init__(case, device)

    def _attention(self) -> tuple[str, ...]:
        return ("eager",) if self.kind == "timesformer" else ("sdpa", "eager")

    def _inputs(self) -> None:
        self.labels = torch.randint(CLASSES, (self.case.batch,)).to(self.device)

    def _theirs(self, attention: str) -> nn.Module:
        import transformers

        settings = self._settings(attention)
        if self.kind == "timesformer":
            config = transformers.TimesformerConfig(**settings, drop_path_rate=0)
            return transformers.TimesformerForVideoClassification(config)
        tubelets = transformers.VivitConfig(**settings, tubelet_size=[self.tubelet, PATCH, PATCH])
        return transformers.VivitForVideoClassification(tubelets)

    def _their_loss(self, model: nn.Module, leaves: Leaves, clip: slice) -> Tensor:
        inputs = self.clips[clip].to(next(iter(leaves.values())).dtype), self.labels[clip]
        return torch.func.functional_call(model, leaves, inputs).loss

    def _our_model(self, impl: str) -> nn.Module:
        case, config = self.case, self._config(impl)
        grid = grid_of(config, case.frames, case.side)
        return ViTClassifier(config, CLASSES, grid, device=self.device, dtype=self.dtype)

    def _our_loss(self, model: nn.Module, state: Leaves) -> Tensor:
        pixels = self.clips.transpose(1, 2).to(next(iter(state.values())).dtype)
        return F.cross_entropy(torch.func.functional_call(model, state, (pixels,)), self.labels)

    def judged(self, results: Leaves) -> Leaves:
        """Without the gradient of keys' biases, which is 0: softmax does not see what all its scores have in common."""
        return super().judged({name: x for name, x in results.items() if not name.endswith("k_proj.bias")})

    def work(self) -> dict[str, Work]:
        """Products of the layers and of attention, the class token's too."""
        widths, (depth, height, width) = SIZES[self.case.size], self.tokens
        c, n, tokens = widths.channels, height * width, depth * height * width
        embed = 2 * tokens * 3 * self.tubelet * PATCH**2 * c
        if self.kind == "vivit_1":
            layers = widths.layers * _layer(1 + tokens, c)
        else:
            time = 2 * tokens * 5 * c**2 + n * 2 * 2 * depth**2 * c
            space = 2 * depth * (1 + n) * 4 * c**2 + depth * 2 * 2 * (1 + n) ** 2 * c
            layers = widths.layers * (time + space + 2 * (1 + tokens) * 8 * c**2)
        return self._work(embed, layers + 2 * c * CLASSES)


def _layer(tokens: int, channels: int) -> int:
    """FLOP of a transformer's layer: 12 C x C products of each token, q k^T and p v of each pair."""
    return 2 * tokens * 12 * channels**2 + 2 * 2 * tokens**2 * channels
