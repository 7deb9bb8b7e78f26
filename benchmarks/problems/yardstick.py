"""Other people's training steps, as yardsticks for ours."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.foreign import torchvision_schemas
from benchmarks.problems.base import Contestant, Forward, Leaves, Work, leaf, run
from benchmarks.problems.models import Model
from benchmarks.registry import VideoMAECase

PATCH = (2, 16, 16)
"""Of a token: frames, rows, columns."""

RATIO = 0.9
"""Of a frame's patches that are hidden."""


class Widths(NamedTuple):
    """Of a VideoMAE; the MLPs are four times as wide."""

    channels: int
    layers: int
    heads: int
    decoder_channels: int
    decoder_layers: int
    decoder_heads: int


SIZES: dict[str, Widths] = {"tiny": Widths(48, 2, 3, 24, 1, 2), "base": Widths(768, 12, 12, 384, 4, 6)}
"""base: ViT-B of the paper (arXiv 2203.12602); tiny is for tests."""


ATTENTION = {"hugging face sdpa": "sdpa", "hugging face eager": "eager"}
"""Rivals, by what transformers calls their attention."""


@cache
def _transformers_reasons() -> list[str]:
    """Why transformers' model cannot be made."""
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


class VideoMAEStep(Model):
    """Parameters -> the mean squared error of the hidden patches' normalised pixels. Under autocast on CUDA.

    The parameters are random, by transformers' initialisation, and have the names that they have there.
    """

    case: VideoMAECase
    names = tuple(ATTENTION)

    def __init__(self, case: VideoMAECase, device: str) -> None:
        super().__init__(case, device)
        self.tokens = (case.frames // PATCH[0], case.side // PATCH[1], case.side // PATCH[2])
        torch.manual_seed(0)
        self.clips = torch.randn(case.batch, case.frames, 3, case.side, case.side).to(device)
        self.mask = tube_masks(case.batch, self.tokens).to(device)
        self.grads = {"loss": torch.randn(()).to(device)}
        reasons = _transformers_reasons()
        self.models = {} if reasons else {attention: self._model(attention) for attention in ATTENTION.values()}
        self.leaves = {}
        if self.models:
            self.leaves = {name: leaf(p.to(device)) for name, p in self.models["eager"].named_parameters()}
        self.contestants = {
            name: Contestant(self._forward(attention), reasons, False, "transformers")
            for name, attention in ATTENTION.items()
        }

    def _model(self, attention: str) -> nn.Module:
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        case, widths = self.case, SIZES[self.case.size]
        sizes: dict[str, Any] = dict(
            image_size=case.side,
            num_frames=case.frames,
            tubelet_size=PATCH[0],
            patch_size=PATCH[1],
            hidden_size=widths.channels,
            num_hidden_layers=widths.layers,
            num_attention_heads=widths.heads,
            intermediate_size=4 * widths.channels,
            decoder_hidden_size=widths.decoder_channels,
            decoder_num_hidden_layers=widths.decoder_layers,
            decoder_num_attention_heads=widths.decoder_heads,
            decoder_intermediate_size=4 * widths.decoder_channels,
            attn_implementation=attention,
        )
        return VideoMAEForPreTraining(VideoMAEConfig(**sizes))

    def _forward(self, attention: str, clip: slice = slice(None)) -> Forward:
        """Of those clips, with the leaves as parameters."""

        def forward(leaves: Leaves) -> Leaves:
            pixels = self.clips[clip].to(next(iter(leaves.values())).dtype)
            inputs = pixels, self.mask[clip]
            with self._precision(leaves):
                return {"loss": torch.func.functional_call(self.models[attention], leaves, inputs).loss}

        return forward

    def truth(self) -> tuple[Leaves, Leaves]:
        """In float64 clip by clip, which hide equally many patches: scores of a batch take 0.1 GB a clip and layer."""
        if not self.leaves:
            return {}, {}
        double = {name: leaf(x.double()) for name, x in self.leaves.items()}
        oracle: dict[str, Tensor] = {}
        for i in range(self.case.batch):
            part = run(self._forward("eager", slice(i, i + 1)), double, {"loss": self.grads["loss"].double()})
            for name, x in part.items():
                oracle[name] = oracle.get(name, torch.zeros_like(x)) + x / self.case.batch
        return oracle, run(self._forward("eager"), self.leaves, self.grads)

    def work(self) -> dict[str, Work]:
        """Products of the layers: of visible tokens in the encoder, of all in the decoder, of hidden ones in its head.

        transformers embeds the hidden patches as well, which nobody needs; the gradient to the pixels takes nothing.
        """
        widths, clips = SIZES[self.case.size], self.case.batch
        tokens, hidden = self.mask.shape[1], int(self.mask[0].sum())
        visible, pixels = tokens - hidden, 3 * PATCH[0] * PATCH[1] * PATCH[2]
        embed = 2 * visible * pixels * widths.channels
        encoder = widths.layers * _layer(visible, widths.channels)
        narrow = 2 * visible * widths.channels * widths.decoder_channels
        decoder = widths.decoder_layers * _layer(tokens, widths.decoder_channels)
        head = 2 * hidden * widths.decoder_channels * pixels
        rest = encoder + narrow + decoder + head
        forward, backward = clips * (embed + rest), clips * (embed + 2 * rest)
        flops = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
        return {quantity: Work(flop, flop) for quantity, flop in flops.items()}


def _layer(tokens: int, channels: int) -> int:
    """FLOP of a transformer's layer: 12 C x C products of each token, q k^T and p v of each pair."""
    return 2 * tokens * 12 * channels**2 + 2 * 2 * tokens**2 * channels
