"""Heads on frozen features: how good a representation is that nobody may change.

Shape letters: B clips or images, N tokens of one, C channels of the last stage, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt.models.classifier import Classifier
from bevt.models.layers import init_weights

HEAD_DIM = 64
"""Channels of a head of the attentive probe."""


class LinearProbe(nn.Linear):
    """Mean over all tokens, linear."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, K)."""
        return super().forward(tokens.mean(1))


class AttentiveProbe(nn.Module):
    """One learned query attends to all tokens; an MLP and a linear layer behind it (V-JEPA, arXiv 2404.08471,
    appendix D, of one block).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = max(1, dim // HEAD_DIM)
        self.query = nn.Parameter(torch.empty(dim))
        self.norm1 = nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, K)."""
        query = self.q(self.query).view(1, self.num_heads, 1, -1).expand(len(tokens), -1, -1, -1)
        keys, values = self.kv(self.norm1(tokens)).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.query + self.proj(F.scaled_dot_product_attention(query, keys, values).flatten(1))
        return self.head(x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class Probes(nn.Module):
    """Several heads on one frozen classifier's features, computed once.

    `kinds` names each head's: "linear" or "attentive".
    """

    def __init__(self, backbone: Classifier, kinds: Sequence[str]) -> None:
        super().__init__()
        classes = backbone.head.out_features
        self.backbone, self.implementations = backbone.requires_grad_(False), backbone.implementations
        self.heads = nn.ModuleList(
            LinearProbe(backbone.channels, classes) if kind == "linear" else AttentiveProbe(backbone.channels, classes)
            for kind in kinds
        )
        for head in self.heads:
            head.apply(init_weights)

    def forward(self, pixels: Tensor, drop: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Pixels as the backbone's `features` takes them -> (heads, B, K) logits. Frozen features drop nothing."""
        with torch.no_grad():
            tokens = self.backbone.features(pixels)
        return torch.stack([head(tokens) for head in self.heads])
