"""Models that several of the tests of weights start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bevt.config import ModelConfig
from bevt.models import names
from bevt.models.bevt import BEVT
from bevt.models.video_swin import PATCH, PatchEmbed, VideoSwin

TINY = ModelConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(4, 3, 3))
FLAT = replace(TINY, window_size=(1, 3, 3))
SEVEN = ModelConfig(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=(8, 7, 7))
SWIN_T = ModelConfig(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))


class ImageClassifier(nn.Module):
    """A classifier of images out of the encoder's pieces."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.patch_embed_2d = PatchEmbed(PATCH[1:], config.embed_dim)
        self.encoder = VideoSwin(replace(config, window_size=(1, *config.window_size[1:])))
        self.norm = nn.LayerNorm(config.embed_dim * 8)
        self.head = nn.Linear(config.embed_dim * 8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(M, 3, H, W) -> (M, classes)."""
        return self.head(self.norm(self.encoder(self.patch_embed_2d(images))[-1]).mean(dim=(1, 2, 3)))


def scrambled(model: nn.Module) -> nn.Module:
    """With every parameter far from the value it is initialised to, where an error could hide."""
    generator = torch.Generator().manual_seed(0)
    for key, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator) * 0.2
        p.data = p.data + noise if p.ndim == 1 or key.endswith("table") else p.data
    return model.eval()


def official_pretraining() -> tuple[BEVT, dict[str, Tensor]]:
    """A model, and as its authors would have saved it."""
    model = scrambled(BEVT(TINY, 50))
    official = names.to_official(model.state_dict())
    official["cls_head.vae_encoder.blocks.input.w"] = torch.zeros(1)
    official["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(1)
    return model, official


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
