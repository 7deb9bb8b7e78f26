"""Encoders with a classification head: what finetuning trains and what published weights are for.

Shape letters: B clips or images, T frames, D depth in tokens (T / 2; 1 for an image), C channels (of a Video Swin's
first stage), L tokens, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bevt.config import FinetuneConfig, ModelConfig, ViTConfig
from bevt.models import vit
from bevt.models.layers import init_weights
from bevt.models.video_swin import PATCH, PatchEmbed, VideoSwin, resolved

HEAD_SCALE = {"videomae": 0.001, "timesformer": 1.0}
"""What a vision transformer's head starts as, over the usual; ViViT's as zero."""


class VideoSwinClassifier(nn.Module):
    """Patch embedding, the four stages, LayerNorm, mean over all tokens, dropout, linear.

    `stream` says what is classified: of images the patch embedding is `patch_embed_2d`, as in `BEVT`. `device` and
    `dtype` are those of the forward pass, for which the ops are resolved, into `implementations`; raises as `resolved`.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        stream: Literal["clips", "images"] = "clips",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        config, self.implementations = resolved(config, device, dtype)
        if stream == "clips":
            self.patch_embed = PatchEmbed(PATCH, config.embed_dim)
        else:
            self.patch_embed_2d = PatchEmbed(PATCH[1:], config.embed_dim)
        self.encoder = VideoSwin(config)
        self.channels = config.channels
        self.norm = nn.LayerNorm(self.channels)
        self.head = nn.Linear(self.channels, num_classes)
        self.stream = stream
        self.apply(init_weights)

    def features(self, pixels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Clips (B, 3, T, H, W) or images (B, 3, H, W), normalised -> (B, D H/32 W/32, 8C), after the final norm.

        `drop` is drop path's, as `VideoSwin.forward` takes it.
        """
        embed = self.patch_embed if self.stream == "clips" else self.patch_embed_2d
        return self.norm(self.encoder(embed(pixels.to(self.norm.weight.dtype)), drop)[-1]).flatten(1, 3)

    def forward(self, pixels: Tensor, drop: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """As `features` -> (B, K) logits. `keep` (B, 8C) is dropout's: factors 0 or 1 / (1 - rate); None: none."""
        pooled = self.features(pixels, drop).mean(dim=1)
        return self.head(pooled if keep is None else pooled * keep)


class ViTClassifier(nn.Module):
    """A vision transformer of clips, LayerNorm, class token or mean over all tokens (`bevt/models/vit.py`), dropout,
    linear.

    `grid` is the (D, H, W) of clips in tokens. `device` and `dtype` are those of the forward pass, for which the ops
    are resolved, into `implementations`; raises as `vit.resolved`.
    """

    def __init__(
        self,
        config: ViTConfig,
        num_classes: int,
        grid: tuple[int, int, int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        config, self.implementations = vit.resolved(config, device, dtype)
        self.kind, self.channels = config.kind, config.channels
        self.encoder = vit.VideoTransformer(config, grid)
        self.norm = nn.LayerNorm(config.embed_dim, vit.EPS)
        self.head = nn.Linear(config.embed_dim, num_classes)
        self.encoder.reset_parameters()
        (self if config.kind == "videomae" else self.head).apply(init_weights)
        with torch.no_grad():  # as their authors start: VideoMAE at a thousandth, ViViT at zero
            self.head.weight.mul_(HEAD_SCALE.get(config.kind, 0.0))

    def features(self, pixels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Clips (B, 3, T, H, W), normalised -> (B, L, C), after the final norm; as `VideoTransformer.forward`."""
        return self.norm(self.encoder(self.encoder.patches(pixels), drop))

    def forward(self, pixels: Tensor, drop: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """As `features` -> (B, K) logits. `keep` (B, C) is dropout's: factors 0 or 1 / (1 - rate); None: none."""
        tokens = self.encoder(self.encoder.patches(pixels), drop)
        if self.kind == "videomae":
            pooled = self.norm(tokens.mean(1))
        elif self.kind in vit.CLASS_TOKEN:
            pooled = self.norm(tokens[:, 0])
        else:
            pooled = self.norm(tokens).mean(1)
        return self.head(pooled if keep is None else pooled * keep)


Classifier = VideoSwinClassifier | ViTClassifier


def build(
    config: FinetuneConfig,
    num_classes: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Classifier:
    """The classifier of a configuration; arguments and errors as the classes'."""
    model, data = config.model, config.data
    if isinstance(model, ViTConfig):
        grid = vit.grid_of(model, data.frames, data.crop)
        return ViTClassifier(model, num_classes, grid, device=device, dtype=dtype)
    return VideoSwinClassifier(model, num_classes, config.stream, device=device, dtype=dtype)
