"""Video Swin Transformer (arXiv 2106.13230), top to bottom.

Shape letters: B clips (or images), T frames, D depth in time in tokens (T / 2; 1 for an image), H W height and width
in tokens, C channels of the stage, h heads. Feature maps are channels-last, (B, D, H, W, C), throughout.

An image is a clip of depth 1: the window clips to (1, 7, 7) and the bias is read from the rows of the 3D table with
zero distance in time, so both streams of BEVT run through the same blocks.

`quirks="official"` repeats two accidents of the official BEVT code in the image stream (its commit 8881b21,
`swin_transformer_bevt.py`); the third, C, concerns finetuning and is in `weights.py`:
  A  the region mask of shifted windows is applied in every block, unshifted ones too;
  B  the window is never clipped, so stage 4 (one 7x7 window) stays shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from bevt_kernels import Spec, resolve, window_attention
from torch import Tensor, nn

from bevt.config import Impl, ModelConfig
from bevt.models.layers import MLP, Linear, add_branch
from bevt.models.region import Region

Size3 = tuple[int, int, int]

PATCH: Size3 = (2, 4, 4)
"""Frames, rows and columns of pixels in one token."""


def resolved(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> tuple[ModelConfig, dict[str, str]]:
    """`config` with the implementations of the encoder's ops on that device and in that type, and these by op.

    Raises `bevt_kernels.NoImplementation` where one that the configuration names cannot serve.
    """
    spec = Spec(torch.device(device).type, dtype, needs_grad=True)
    window = spec._replace(window=config.window_size, head_dim=config.embed_dim // config.num_heads[0])
    chosen = {
        "window_attention": resolve("window_attention", config.attention_impl, window),
        "linear": resolve("linear", config.linear_impl, spec),
    }
    attention, linear = (cast(Impl, chosen[op]) for op in chosen)
    return replace(config, attention_impl=attention, linear_impl=linear), chosen


def clip_window(size: Size3, window: Size3, shift: Size3) -> tuple[Size3, Size3]:
    """Window and shift on a map of `size` (D, H, W): an axis no longer than its window gets one unshifted window."""
    clipped = [(s, 0) if s <= w else (w, o) for s, w, o in zip(size, window, shift)]
    (wd, od), (wh, oh), (ww, ow) = clipped
    return (wd, wh, ww), (od, oh, ow)


class PatchEmbed(Region):
    """Non-overlapping patches to tokens, then LayerNorm; the map is zero-padded up to a multiple of the patch."""

    def __init__(self, patch_size: tuple[int, ...], dim: int) -> None:
        super().__init__()
        conv: Any = nn.Conv3d if len(patch_size) == 3 else nn.Conv2d
        self.patch_size = patch_size
        self.proj = conv(3, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def body(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, T/2, H/4, W/4, C), or (B, 3, H, W) -> (B, 1, H/4, W/4, C)."""
        pad: list[int] = []
        for size, patch in zip(reversed(x.shape[2:]), reversed(self.patch_size)):
            pad += [0, -size % patch]
        if any(pad):
            x = F.pad(x, pad)
        x = self.proj(x)
        if x.ndim == 4:
            x = x.unsqueeze(2)
        return self.norm(x.permute(0, 2, 3, 4, 1))


class WindowAttention3D(nn.Module):
    """Multi-head attention inside 3D windows with a learned relative position bias."""

    def __init__(self, config: ModelConfig, dim: int, num_heads: int, shift: Size3) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shift = num_heads, config.window_size, shift
        self.quirks, self.impl = config.quirks, config.attention_impl
        self.attend = window_attention  # the reference path puts its own in this place
        wd, wh, ww = config.window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * wd - 1) * (2 * wh - 1) * (2 * ww - 1), num_heads)
        )
        self.qkv = Linear(dim, 3 * dim, impl=config.linear_impl)
        self.proj = Linear(dim, dim, impl=config.linear_impl)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, D, H, W, C)."""
        _, d, h, w, _ = x.shape
        window, shift = clip_window((d, h, w), self.window_size, self.shift)
        unrolled = None
        if self.quirks == "official" and d == 1:
            window, shift, unrolled = self._official_image_window(h, w)
        pad = [-size % win for size, win in zip((d, h, w), window)]
        if any(pad):  # before the projection, as upstream: padded keys take part, with k and v equal to the qkv bias
            x = F.pad(x, (0, 0, 0, pad[2], 0, pad[1], 0, pad[0]))
        if unrolled:
            x = x.roll(unrolled, dims=(2, 3))
        x = self.attend(
            self.qkv(x),
            self.relative_position_bias_table,
            num_heads=self.num_heads,
            window_size=window,
            shift=shift,
            table_window=self.window_size,
            impl=self.impl,
        )
        if unrolled:
            x = x.roll((-unrolled[0], -unrolled[1]), dims=(2, 3))
        if any(pad):
            x = x[:, :d, :h, :w]
        return self.proj(x)

    def _official_image_window(self, h: int, w: int) -> tuple[Size3, Size3, tuple[int, int] | None]:
        """Quirks A and B: window, shift, and the roll that cancels the op's own in an unshifted block.

        In an unshifted block the official code masks without rolling: rolling by +shift before the op, which rolls by
        -shift, and back after it leaves its windows in place and its region mask on.
        """
        _, wh, ww = self.window_size
        if h % wh or w % ww:
            raise ValueError(
                f"quirks='official' cannot run an image map of {h}x{w} tokens: the official code never pads or clips "
                f"the image stream, so the map must be a multiple of the {wh}x{ww} window (224x224 pixels for 7x7)"
            )
        shift = (0, wh // 2, ww // 2)
        return (1, wh, ww), shift, None if any(self.shift) else (shift[1], shift[2])


class SwinBlock(Region):
    """Attention and MLP, each behind a LayerNorm and around a residual connection."""

    def __init__(self, config: ModelConfig, dim: int, num_heads: int, shift: Size3) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention3D(config, dim, num_heads, shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio), impl=config.linear_impl)

    def body(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """(B, D, H, W, C) -> (B, D, H, W, C). `drop` (2, B): factors of attention and MLP (`VideoSwin.forward`)."""
        attention, mlp = (None, None) if drop is None else drop
        x = add_branch(x, self.attn(self.norm1(x)), attention)
        return add_branch(x, self.mlp(self.norm2(x)), mlp)


class PatchMerging(Region):
    """2x2 neighbouring tokens of a frame to one of twice the channels; odd maps are zero-padded."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, impl=config.linear_impl)

    def body(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, D, ceil(H/2), ceil(W/2), 2C)."""
        h, w = x.shape[2:4]
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = torch.cat([x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Blocks, every second one shifted by half a window, and the merging to the next stage."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        dim = config.embed_dim << index
        wd, wh, ww = config.window_size
        shifts: tuple[Size3, Size3] = ((0, 0, 0), (wd // 2, wh // 2, ww // 2))
        self.blocks = nn.ModuleList(
            SwinBlock(config, dim, config.num_heads[index], shifts[i % 2]) for i in range(config.depths[index])
        )
        self.downsample = PatchMerging(config, dim) if index < len(config.depths) - 1 else None

    def forward(self, x: Tensor, drop: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """(B, D, H, W, C) -> the stage's output before merging, and the next stage's input. `drop`: one a block."""
        for block, factors in zip(self.blocks, drop):
            x = block(x, factors)
        return x, x if self.downsample is None else self.downsample(x)


class VideoSwin(nn.Module):
    """The four stages. Patch embeddings and final norms belong to the models around it (`bevt.py`, `classifier.py`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.depths = config.depths
        self.layers = nn.ModuleList(SwinStage(config, i) for i in range(len(config.depths)))

    def forward(self, x: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """Tokens (B, D, H, W, C) -> the outputs of all stages before merging; stage i has C * 2**i channels.

        `drop` (blocks, 2, B) float32 is drop path (stochastic depth by sample): the factor of each block's attention
        and MLP branch, 0 or 1 / (1 - rate) as the caller draws them at `drop_path_rates`; None: all 1. So a step's
        result depends on no generator's state, nor on who shares a batch.
        """
        factors: list[Tensor | None] = [None] * sum(self.depths) if drop is None else list(drop)
        outputs = []
        for layer, depth in zip(self.layers, self.depths):
            output, x = layer(x, factors[:depth])
            outputs.append(output)
            factors = factors[depth:]
        return outputs
