"""Vision transformers for video, top to bottom: VideoMAE's, TimeSformer's, and the four models of ViViT.

Shape letters: B clips, T frames, D depth in time in tokens (T / tubelet; 1 for an image), H W height and width in
tokens, N = H W, C channels, h heads, P = 3 * tubelet * patch**2 numbers of a patch.

What they share: patches to tokens by a linear map, pre-norm blocks of attention and MLP, LayerNorm with 1e-6. What
tells them apart (arXiv 2203.12602, 2102.05095, 2103.15691; their code MCG-NJU/VideoMAE at HEAD, facebookresearch/
TimeSformer, google-research/scenic projects/vivit):

kind         attention                                     class token   positions               read by a head
videomae     all tokens                                    no            fixed sine, cosine      norm of the mean
timesformer  in each block over time, then over space      yes           of space + of time      class token
vivit_1      all tokens                                    yes           of each token           class token
vivit_2      each depth by itself, then over its outputs   two           of space, then of time  class token
vivit_3      in each block over time, then over space      no            of each token           mean of the norm
vivit_4      half of the heads over time, half over space  no            of each token           mean of the norm

ViViT's paper has its third model attend over space first, and finds that the order makes no difference; scenic has
both. VideoMAE's keys have no bias. ViViT's GELU is the approximation by tanh, JAX's default. Under autocast the
residual stream is in the type of the positions that begin it, float32.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from bevt_kernels import NoImplementation, Spec, linear, resolve
from torch import Tensor, nn

from bevt.config import ViTConfig, ViTKind
from bevt.models.layers import MLP, Linear, add_branch, scaled
from bevt.models.region import Region

Size3 = tuple[int, int, int]

CLASS_TOKEN: tuple[ViTKind, ...] = ("timesformer", "vivit_1", "vivit_2")
"""Kinds with a token that stands for all."""

EPS = 1e-6
"""Of every LayerNorm."""


def attention_reasons(impl: str, device: str) -> list[str]:
    """Why attention cannot be computed by `impl` on a device of that type; empty where it can."""
    if impl != "xformers":
        return []
    reasons = [] if device == "cuda" else [f"xformers has attention for CUDA alone, this is {device}"]
    try:
        importlib.import_module("xformers.ops")
    except ImportError as error:
        reasons.append(f"xformers cannot be imported ({error}): pip install xformers")
    return reasons


def resolved(config: ViTConfig, device: torch.device | str, dtype: torch.dtype) -> tuple[ViTConfig, dict[str, str]]:
    """`config` with the implementations of its ops on that device and in that type, and these by op.

    Raises `bevt_kernels.NoImplementation` where one that the configuration names cannot serve.
    """
    kind = torch.device(device).type
    if reasons := attention_reasons(config.attention_impl, kind):
        raise NoImplementation(f"model.attention_impl {config.attention_impl!r}: {'; '.join(reasons)}")
    attention: Any = "sdpa" if config.attention_impl == "auto" else config.attention_impl
    linear_impl: Any = resolve("linear", config.linear_impl, Spec(kind, dtype, needs_grad=True))
    chosen = {"attention": attention, "linear": linear_impl}
    return replace(config, attention_impl=attention, linear_impl=linear_impl), chosen


def grid_of(config: ViTConfig, frames: int, crop: int) -> Size3:
    """(D, H, W) of a clip of so many frames, `crop` pixels wide and high; both are multiples of a token's sides."""
    return frames // config.tubelet, crop // config.patch, crop // config.patch


def patches(pixels: Tensor, tubelet: int, patch: int) -> Tensor:
    """(B, 3, T, rows, columns) or images (B, 3, rows, columns) -> (B, D, N, P), each patch in a convolution's order.

    Raises ValueError where the sides are no multiples of a token's.
    """
    if pixels.ndim == 4:
        pixels = pixels.unsqueeze(2)
    b, c, t, rows, columns = pixels.shape
    if t % tubelet or rows % patch or columns % patch:
        raise ValueError(f"pixels {tuple(pixels.shape)} are no whole tokens of {tubelet}x{patch}x{patch}")
    x = pixels.view(b, c, t // tubelet, tubelet, rows // patch, patch, columns // patch, patch)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t // tubelet, -1, c * tubelet * patch**2)


def unpatched(x: Tensor, shape: torch.Size, tubelet: int, patch: int) -> Tensor:
    """Inverse of `patches`, to clips of `shape`."""
    b, c, t, rows, columns = shape
    x = x.view(b, t // tubelet, rows // patch, columns // patch, c, tubelet, patch, patch)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(shape)


def taken(tokens: Tensor, index: Tensor) -> Tensor:
    """The rows (B, n, P) of (B, D N, P) that `index` (B, n) names."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sine_positions(tokens: int, dim: int) -> Tensor:
    """(tokens, dim) float32: VideoMAE's fixed positions, of tokens in order of depth, height, width.

    Sine and cosine in turn ("Attention is all you need", section 3.5), computed in float64.
    """
    channel = torch.arange(dim, dtype=torch.float64) // 2 * 2
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * 10000 ** (-channel / dim)
    even = torch.arange(dim) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos()).float()


def dot_product(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    """Softmax attention over L: (..., L, h, C / h) -> the same, by PyTorch's or xformers' fused kernels."""
    shape = q.shape
    q, k, v = (x.reshape(-1, *shape[-3:]) for x in (q, k, v))
    if impl == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v).view(shape)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.impl = num_heads, config.attention_impl
        self.key_bias = config.kind != "videomae"
        self.qkv = Linear(dim, 3 * dim, bias=self.key_bias, impl=config.linear_impl)
        if not self.key_bias:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim, impl=config.linear_impl)

    def forward(self, x: Tensor) -> Tensor:
        """(..., L, C) -> (..., L, C), over L."""
        q, k, v = self._heads(x)
        return self.proj(dot_product(q, k, v, self.impl).flatten(-2))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (..., L, h, C / h)."""
        if self.key_bias:
            x = self.qkv(x)
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            x = linear(x, self.qkv.weight, bias, impl=self.qkv.impl)
        return x.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)


class SplitAttention(Attention):
    """ViViT's factorised dot product: the first half of the heads attends over time, the other over space."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, N, C) -> (B, D, N, C)."""
        (qt, qs), (kt, ks), (vt, vs) = (part.chunk(2, dim=-2) for part in self._heads(x))
        qt, kt, vt = (part.transpose(1, 2) for part in (qt, kt, vt))
        time, space = dot_product(qt, kt, vt, self.impl).transpose(1, 2), dot_product(qs, ks, vs, self.impl)
        return self.proj(torch.cat([time, space], dim=-2).flatten(-2))


class Block(Region):
    """Attention and MLP, each behind a LayerNorm and around a residual connection."""

    def __init__(self, config: ViTConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        attention = SplitAttention if config.kind == "vivit_4" else Attention
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = attention(config, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, EPS)
        gelu: Literal["none", "tanh"] = "tanh" if config.kind.startswith("vivit") else "none"
        self.mlp = MLP(dim, int(dim * config.mlp_ratio), gelu=gelu, impl=config.linear_impl)

    def body(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """(B, ..., L, C) -> the same. `drop` (2, B): factors of attention and MLP."""
        attention, mlp = (None, None) if drop is None else drop
        x = add_branch(x, self.attn(self.norm1(x)), attention)
        return add_branch(x, self.mlp(self.norm2(x)), mlp)


class FactorisedBlock(Block):
    """Attention over time, then over space, then the MLP: ViViT's third model (the names are TimeSformer's)."""

    def __init__(self, config: ViTConfig, dim: int, num_heads: int) -> None:
        super().__init__(config, dim, num_heads)
        self.temporal_norm1 = nn.LayerNorm(dim, EPS)
        self.temporal_attn = Attention(config, dim, num_heads)

    def body(self, x: Tensor, drop: Tensor | None = None) -> Tensor:
        """(B, D, N, C) -> the same. `drop` (3, B): factors of time, space and MLP."""
        x = add_branch(x, self._over_time(x), None if drop is None else drop[0])
        return super().body(x, None if drop is None else drop[1:])

    def _over_time(self, x: Tensor) -> Tensor:
        """The branch of temporal attention, (B, D, N, C)."""
        return self.temporal_attn(self.temporal_norm1(x).transpose(1, 2)).transpose(1, 2)


class DividedBlock(FactorisedBlock):
    """TimeSformer's: as `FactorisedBlock`, with a class token that takes part in each frame's attention over space.

    `still`: of images alone, without the parts that attend over time.
    """

    def __init__(self, config: ViTConfig, dim: int, num_heads: int, *, still: bool = False) -> None:
        super().__init__(config, dim, num_heads)
        self.temporal_fc = Linear(dim, dim, impl=config.linear_impl)
        if still:
            del self.temporal_norm1, self.temporal_attn, self.temporal_fc

    def body(self, x: Tensor, depth: int, drop: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, 1 + D N, C) -> the same, the class token first; `depth` is D, with 1 nothing attends over time.

        `drop` (3, B): factors of time, space and MLP.
        """
        time, space, mlp = (None, None, None) if drop is None else drop
        token, x = x[:, :1], x[:, 1:].unflatten(1, (depth, -1))
        if depth > 1:
            x = x + self.temporal_fc(scaled(self._over_time(x), time))
        everywhere = torch.cat([token.unsqueeze(1).expand(-1, depth, -1, -1), x], dim=2)
        branch = self.attn(self.norm1(everywhere))
        branch = torch.cat([branch[:, :, 0].mean(1, keepdim=True), branch[:, :, 1:].flatten(1, 2)], dim=1)
        x = add_branch(torch.cat([token, x.flatten(1, 2)], dim=1), branch, space)
        return add_branch(x, self.mlp(self.norm2(x)), mlp)


class PatchEmbed(nn.Module):
    """Patches to tokens. The parameter is a convolution's: of tubes, or of a TimeSformer's frames."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.impl, p = config.linear_impl, config.patch
        if config.kind == "timesformer":
            self.proj: nn.Conv2d | nn.Conv3d = nn.Conv2d(3, config.embed_dim, p, p)
        else:
            size = (config.tubelet, p, p)
            self.proj = nn.Conv3d(3, config.embed_dim, size, size)

    def forward(self, x: Tensor) -> Tensor:
        """`patches` (..., P) -> (..., C)."""
        weight = self.proj.weight.flatten(1)
        return linear(x.to(weight.dtype), weight, self.proj.bias, impl=self.impl)


class TemporalTransformer(nn.Module):
    """What ViViT's second model puts behind a spatial one: blocks over the class tokens of every depth."""

    def __init__(self, config: ViTConfig, depth: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + depth, dim))
        self.blocks = nn.ModuleList(Block(config, dim, config.num_heads) for _ in range(config.temporal_depth))

    def forward(self, x: Tensor, drop: list[Tensor | None]) -> Tensor:
        """(B, D, C) -> (B, 1 + D, C), the class token first. `drop`: one a block."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block, factors in zip(self.blocks, drop):
            x = block(x, factors)
        return x


class VideoTransformer(nn.Module):
    """Patch embedding, positions and blocks; the final norm belongs to the models around it.

    `grid` is the (D, H, W) that positions are for. `still`: of images alone (`timesformer`), without the parts that
    attend over time. `config` is as `resolved` returns it.
    """

    def __init__(self, config: ViTConfig, grid: Size3, *, still: bool = False) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        dim, kind, (depth, height, width) = config.embed_dim, config.kind, grid
        self.patch_embed = PatchEmbed(config)
        if kind in CLASS_TOKEN:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if kind == "videomae":
            self.register_buffer("pos_embed", sine_positions(depth * height * width, dim)[None], persistent=False)
        else:
            placed = height * width * (1 if kind in ("timesformer", "vivit_2") else depth)
            self.pos_embed = nn.Parameter(torch.empty(1, (kind in CLASS_TOKEN) + placed, dim))
        if kind == "timesformer" and not still:
            self.time_embed = nn.Parameter(torch.zeros(1, depth, dim))
        if kind == "timesformer":
            self.blocks = nn.ModuleList(
                DividedBlock(config, dim, config.num_heads, still=still) for _ in range(config.depth)
            )
        else:
            block = FactorisedBlock if kind == "vivit_3" else Block
            self.blocks = nn.ModuleList(block(config, dim, config.num_heads) for _ in range(config.depth))
        if kind == "vivit_2":
            self.spatial_norm = nn.LayerNorm(dim, EPS)
            self.temporal = TemporalTransformer(config, depth)

    def patches(self, pixels: Tensor) -> Tensor:
        """As `patches`, which are counted: ValueError where there are not as many as positions."""
        x = patches(pixels, self.config.tubelet, self.config.patch)
        depth, height, width = self.grid
        images = self.config.kind == "timesformer" and x.shape[1] == 1
        if x.shape[1:3] != (1 if images else depth, height * width):
            raise ValueError(
                f"pixels {tuple(pixels.shape)} are {x.shape[1]} x {x.shape[2]} tokens, and the model has positions for "
                f"{depth} x {height * width}"
            )
        return x

    def forward(
        self,
        x: Tensor,
        drop: Tensor | None = None,
        *,
        visible: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """`patches` (B, D, N, P) of clips, of a `timesformer` also of images (D = 1) -> tokens (B, L, C).

        A class token comes first where there is one; L is 1 + D of `vivit_2`, else (1 +) D N.

        Args:
            x: what `patches` returns.
            drop: (blocks, branches, B) float32, drop path's: each branch's factor, 0 or 1 / (1 - rate), drawn at
                `config.drop_path_rates`; None: all 1.
            visible: of a `videomae`, (B, v) int64, numbers of the tokens that take part; L is v. None: all.
            hidden: (B, D, N) bool, tokens that `mask_token` replaces before positions are added. None: none.
            mask_token: (1, 1, C).
        """
        factors: list[Tensor | None] = [None] * len(self.config.drop_path_rates) if drop is None else list(drop)
        kind, depth = self.config.kind, x.shape[1]
        if visible is not None:
            x = self.patch_embed(taken(x.flatten(1, 2), visible)) + self.pos_embed[0][visible]
        else:
            x = self._placed(x, hidden, mask_token)
        for block, own in zip(self.blocks, factors):
            x = block(x, depth, own) if kind == "timesformer" else block(x, own)
        if kind == "vivit_2":
            return self.temporal(self.spatial_norm(x)[:, :, 0], factors[len(self.blocks) :])
        return x.flatten(1, 2) if x.ndim == 4 else x

    def _placed(self, x: Tensor, hidden: Tensor | None, mask_token: Tensor | None) -> Tensor:
        """What the blocks take: `patches` (B, D, N, P) as tokens with their positions and class tokens."""
        kind, (b, depth, n, _) = self.config.kind, x.shape
        x = self.patch_embed(x)
        if hidden is not None and mask_token is not None:
            x = torch.where(hidden.unsqueeze(-1), mask_token, x)
        if kind == "timesformer":
            place = self.pos_embed[:, 1:]
            if depth > 1:
                place = place.unsqueeze(1) + self.time_embed.unsqueeze(2)  # (1, D, N, C)
            x = (x + place.view(1, -1, n, place.shape[-1])).flatten(1, 2)
        elif kind == "vivit_2":
            x = x + self.pos_embed[:, None, 1:]
            first = (self.cls_token + self.pos_embed[:, :1]).unsqueeze(1).expand(b, depth, -1, -1)
            x = torch.cat([first, x], dim=2)
        elif kind in ("vivit_3", "vivit_4"):
            x = x + self.pos_embed.unflatten(1, (depth, n))
        else:
            x = x.flatten(1, 2) + self.pos_embed[:, int(kind in CLASS_TOKEN) :]
        if kind in ("timesformer", "vivit_1"):
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(b, -1, -1), x], dim=1)
        return x

    def reset_parameters(self) -> None:
        """Each family's own rule: what its code does (`Module.apply` reaches no bare parameters)."""
        kind = self.config.kind
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fill(kind, module, parts=3 if name.endswith(".qkv") else 1)
        fill(kind, self.patch_embed.proj)
        if kind in CLASS_TOKEN:
            if kind == "timesformer":
                nn.init.trunc_normal_(self.cls_token, std=0.02)
            else:
                nn.init.zeros_(self.cls_token)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if kind == "vivit_2":
            nn.init.trunc_normal_(self.temporal.pos_embed, std=0.02)
        for block in self.blocks:
            if isinstance(block, DividedBlock):
                if hasattr(block, "temporal_fc"):
                    nn.init.zeros_(block.temporal_fc.weight)
            elif isinstance(block, FactorisedBlock) and self.config.temporal_init == "zero":
                nn.init.zeros_(block.temporal_attn.proj.weight)
        if kind.startswith("vivit") and self.config.tubelet > 1:
            with torch.no_grad():
                spread_over_frames(self.patch_embed.proj.weight, self.config.inflation)


def fill(kind: ViTKind, module: nn.Module, parts: int = 1) -> None:
    """VideoMAE's pretraining and ViViT: Xavier's uniform, ViViT's of each of a layer's `parts` (queries, keys, values)
    by itself; TimeSformer: truncated normal (0.02). Biases zero. Convolutions keep PyTorch's rule but in ViViT, where
    JAX's default is LeCun's normal.
    """
    if isinstance(module, nn.Linear):
        if kind == "timesformer":
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            for part in module.weight.chunk(parts if kind != "videomae" else 1):
                nn.init.xavier_uniform_(part)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)) and kind.startswith("vivit"):
        nn.init.trunc_normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def spread_over_frames(weight: Tensor, how: Literal["central", "average"]) -> None:
    """Make a patch embedding (C, 3, tubelet, p, p) depend on its central frame alone, or on all alike, in place.

    ViViT section 3.4; scenic's `central_frame_initializer` (the frame at tubelet // 2) and `average_frame_initializer`,
    which repeat the first frame's weights.
    """
    frames = weight.shape[2]
    if how == "central":
        kept = weight[:, :, frames // 2].clone()
        weight.zero_()
        weight[:, :, frames // 2] = kept
    else:
        weight.copy_(weight[:, :, :1].expand_as(weight))
