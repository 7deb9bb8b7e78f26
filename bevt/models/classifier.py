"""Video Swin with a classification head: what finetuning trains and what published Video Swin weights are for."""

from __future__ import annotations

from torch import Tensor, nn

from bevt.config import ModelConfig
from bevt.models.video_swin import PATCH, PatchEmbed, VideoSwin, init_weights


class VideoSwinClassifier(nn.Module):
    """Patch embedding, the four stages, LayerNorm, mean over all tokens, dropout, linear."""

    def __init__(self, config: ModelConfig, num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(PATCH, config.embed_dim)
        self.encoder = VideoSwin(config)
        self.norm = nn.LayerNorm(config.embed_dim * 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(config.embed_dim * 8, num_classes)
        self.apply(init_weights)

    def features(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) normalised -> (B, D, H/32, W/32, 8C), after the final norm."""
        return self.norm(self.encoder(self.patch_embed(clips))[-1])

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) normalised -> (B, classes) logits."""
        return self.head(self.dropout(self.features(clips).mean(dim=(1, 2, 3))))
