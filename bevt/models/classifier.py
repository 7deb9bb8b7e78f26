"""Video Swin with a classification head: what finetuning trains and what published Video Swin weights are for.

Shape letters: B clips or images, T frames, D depth in tokens (T / 2; 1 for an image), C channels of the first stage, K
classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bevt.config import ModelConfig
from bevt.models.video_swin import PATCH, PatchEmbed, VideoSwin, init_weights, resolved


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
        self.channels = config.embed_dim * 8
        self.norm = nn.LayerNorm(self.channels)
        self.head = nn.Linear(self.channels, num_classes)
        self.stream = stream
        self.apply(init_weights)

    def features(self, pixels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Clips (B, 3, T, H, W) or images (B, 3, H, W), normalised -> (B, D, H/32, W/32, 8C), after the final norm.

        `drop` is drop path's, as `VideoSwin.forward` takes it.
        """
        embed = self.patch_embed if self.stream == "clips" else self.patch_embed_2d
        return self.norm(self.encoder(embed(pixels.to(self.norm.weight.dtype)), drop)[-1])

    def forward(self, pixels: Tensor, drop: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """As `features` -> (B, K) logits. `keep` (B, 8C) is dropout's: factors 0 or 1 / (1 - rate); None: none."""
        pooled = self.features(pixels, drop).mean(dim=(1, 2, 3))
        return self.head(pooled if keep is None else pooled * keep)
