"""BEVT's two-stream masked model (paper section 3; official `swin_transformer_bevt.py` and `bevt_multisource_head.py`).

Shape letters: B clips, M images, T frames, D = T / 2, H W the first stage's map in tokens (pixels / 4), h w the grid of
the targets (pixels / 16), C channels of the first stage, V codes, K slots for masked positions.

Both streams share the encoder, the mask token, the last LayerNorm and the head. With a Video Swin (`BEVT`) the patch
embeddings and the decoders are their own. Everything outside the encoder is linear. In training decoders and head see
masked positions alone. With a TimeSformer (`TimeSformerBEVT`; paper, Table 8) tokens are the targets' positions, so
that there is no decoder; images are clips of one frame, over which nothing attends in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from bevt_kernels import Spec, linear, masked_linear_cross_entropy, resolve
from einops import rearrange
from torch import Tensor, nn

from bevt.config import AnyModel, Impl, ModelConfig, ViTConfig
from bevt.models import vit
from bevt.models.layers import Linear, init_weights
from bevt.models.video_swin import PATCH, PatchEmbed, VideoSwin, resolved

Stream = Literal["clips", "images"]

CELL = 4
"""Tokens of the first stage along one side of a target position (16 pixels)."""


@dataclass(frozen=True)
class MaskedInput:
    """One stream of a micro-batch, on the model's device."""

    pixels: Tensor
    """Clips (B, 3, T, 4H, 4W) or images (M, 3, 4H, 4W), normalised."""
    mask: Tensor
    """Clips (B, D, h, w) or images (M, h, w) bool, True = hidden."""
    codes: Tensor
    """Clips (B, T, h, w) or images (M, h, w) int64: the tokenizer's codes."""
    slots: int
    """Capacity for masked positions over the whole micro-batch, at least as many as are masked. Shapes depend on it."""
    drop: Tensor | None = None
    """(blocks, 2, batch) float32: drop path's factors (`VideoSwin.forward`); None: nothing is dropped."""


def masked_slots(mask: Tensor, slots: int) -> Tensor:
    """Indices of the True elements of `mask` (any shape, flattened) in order, in a fixed number of slots; -1 = unused.

    No host sync: the slot of an element is the count of True elements before it. Elements past the capacity are lost,
    so the caller gives the largest number that its masks can reach (`bevt.masking.capacity`).
    """
    flat = mask.flatten()
    slot = torch.where(flat, flat.cumsum(0) - 1, slots).clamp_(max=slots)
    index = torch.full((slots + 1,), -1, dtype=torch.int64, device=mask.device)
    return index.scatter_(0, slot, torch.arange(flat.numel(), device=mask.device))[:slots]


class PatchExpand(nn.ConvTranspose3d):
    """Transposed convolution whose kernel is its stride, as the linear map of one token that it is.

    Parameters are `nn.ConvTranspose3d`'s (or, with `planar`, `nn.ConvTranspose2d`'s, the official image decoder's).
    """

    def __init__(self, dim: int, factor: tuple[int, int, int], *, planar: bool = False, impl: Impl = "auto") -> None:
        super().__init__(dim, dim, factor, stride=factor)
        self.factor, self.impl = factor, impl
        if planar:
            self.weight = nn.Parameter(self.weight.detach().squeeze(2))

    def cells(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., fd * fh * fw, C): what becomes of a token, its cells in order of depth, height, width."""
        weight = self.weight.flatten(2).permute(2, 1, 0)  # cells, C out, C in
        bias = cast(Tensor, self.bias).repeat(len(weight))
        return linear(x, weight.flatten(0, 1), bias, impl=self.impl).unflatten(-1, weight.shape[:2])

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, D, H, W, C) -> (B, D * fd, H * fh, W * fw, C)."""
        fd, fh, fw = self.factor
        return rearrange(self.cells(x), "b d h w (fd fh fw) c -> b (d fd) (h fh) (w fw) c", fd=fd, fh=fh, fw=fw)


class ImageDecoder(nn.Module):
    """Stage 4 upsampled to stage 3's map, both concatenated and mixed."""

    def __init__(self, dim: int, impl: Impl = "auto") -> None:
        super().__init__()
        self.up = PatchExpand(dim, (1, 2, 2), planar=True, impl=impl)
        self.fuse = Linear(dim // 2 + dim, dim, impl=impl)

    def forward(self, x3: Tensor, x4: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(M, 1, h, w, 4C), (M, 1, h/2, w/2, 8C) -> (M, 1, h, w, 8C).

        With `tokens` (n,), which number the places of x3's map in order, only there: (n, 1, 8C).
        """
        x = self._fused(x3, x4, tokens)
        return x if tokens is None else x.unsqueeze(1)

    def _fused(self, x3: Tensor, x4: Tensor, tokens: Tensor | None) -> Tensor:
        """(M, D, h, w, 8C), or (n, 8C) with tokens."""
        if tokens is None:
            return self.fuse(torch.cat([x3, self.up(x4)], dim=-1))
        line, column = tokens // x3.shape[3], tokens % x3.shape[3]  # the height is even, so that lines pair up
        cell = 4 * (line // 2 * x4.shape[3] + column // 2) + 2 * (line % 2) + column % 2
        # Every token of stage 4 is expanded: which of its cells are masked varies, and shapes shall not.
        up = self.up.cells(x4).flatten(0, -2).index_select(0, cell)
        return self.fuse(torch.cat([x3.flatten(0, -2).index_select(0, tokens), up], dim=-1))


class VideoDecoder(ImageDecoder):
    """The image decoder's form, then every depth step to the two frames under it."""

    def __init__(self, dim: int, impl: Impl = "auto") -> None:
        super().__init__(dim, impl)
        self.up = PatchExpand(dim, (1, 2, 2), impl=impl)
        self.frames = PatchExpand(dim, (PATCH[0], 1, 1), impl=impl)

    def forward(self, x3: Tensor, x4: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, D, h, w, 4C), (B, D, h/2, w/2, 8C) -> (B, T, h, w, 8C).

        With `tokens` (n,) only at these places of x3's map: (n, 2, 8C), both frames of a depth step.
        """
        x = self._fused(x3, x4, tokens)
        return self.frames(x) if tokens is None else self.frames.cells(x)


class MaskedTokens(nn.Module):
    """Masked token prediction on clips, on images, or on both with one encoder: what does not depend on the encoder.

    `streams` says which parts exist, so that a run of one stream has no idle parameters. `device` and `dtype` are those
    that the forward pass will run on and in: the ops' implementations are resolved for them once, here, into
    `implementations`. Raises `bevt_kernels.NoImplementation` where one that the configuration names cannot serve.
    """

    implementations: dict[str, str]
    encoder: nn.Module
    norm: nn.LayerNorm
    head: nn.Linear

    def __init__(self, vocab_size: int, streams: Sequence[Stream]) -> None:
        super().__init__()
        if not streams or not set(streams) <= {"clips", "images"}:
            raise ValueError(f"streams must name 'clips', 'images' or both, got {tuple(streams)}")
        self.vocab_size, self.streams = vocab_size, tuple(streams)

    def _resolve_loss(self, config: AnyModel, device: torch.device | str, dtype: torch.dtype) -> None:
        spec = Spec(torch.device(device).type, dtype, needs_grad=True, classes=self.vocab_size)
        loss = "masked_linear_cross_entropy"
        self.implementations[loss] = resolve(loss, config.loss_impl, spec)

    def own_parts(self, stream: Stream) -> list[nn.Module]:
        """The children that only one stream uses."""
        return []

    def own_parameters(self, stream: Stream) -> list[nn.Parameter]:
        """All parameters that only one stream uses."""
        return [p for part in self.own_parts(stream) for p in part.parameters()]

    def decode(self, stream: Stream, pixels: Tensor, mask: Tensor, drop: Tensor | None = None) -> Tensor:
        """What the head reads at every position: clips (B, T, h, w, C), images (M, h, w, C). As in `MaskedInput`."""
        raise NotImplementedError

    def stream_loss(self, stream: Stream, inputs: MaskedInput) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy (nats) over the micro-batch's masked positions and their top-1 accuracy; scalars."""
        raise NotImplementedError

    def forward(self, clips: MaskedInput | None = None, images: MaskedInput | None = None) -> dict[str, Tensor]:
        """`loss_clips`, `accuracy_clips`, `loss_images`, `accuracy_images` of the streams given, as device scalars."""
        out = {}
        for stream, inputs in (("clips", clips), ("images", images)):
            if inputs is not None:
                out[f"loss_{stream}"], out[f"accuracy_{stream}"] = self.stream_loss(stream, inputs)  # type: ignore[arg-type]
        return out

    def predict(self, stream: Stream, pixels: Tensor, mask: Tensor) -> Tensor:
        """Most likely code of every position, int64: clips (B, T, h, w), images (M, h, w)."""
        with torch.no_grad():
            return self.head(self.decode(stream, pixels, mask)).argmax(-1)


class BEVT(MaskedTokens):
    """With a Video Swin. Arguments and errors as of `MaskedTokens`."""

    encoder: VideoSwin

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        streams: Sequence[Stream] = ("clips", "images"),
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(vocab_size, streams)
        config, self.implementations = resolved(config, device, dtype)
        self._resolve_loss(config, device, dtype)
        linear_impl = config.linear_impl
        dim = config.channels
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        # Modules in the order of the forward pass: a diagnosis by parameter order (bevt.train.step) relies on it.
        if "clips" in streams:
            self.patch_embed = PatchEmbed(PATCH, config.embed_dim)
        if "images" in streams:
            self.patch_embed_2d = PatchEmbed(PATCH[1:], config.embed_dim)
        self.encoder = VideoSwin(config)
        if "clips" in streams:
            self.video_decoder = VideoDecoder(dim, linear_impl)
        if "images" in streams:
            self.image_decoder = ImageDecoder(dim, linear_impl)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def own_parts(self, stream: Stream) -> list[nn.Module]:
        """Its patch embedding and decoder."""
        if stream == "clips":
            return [self.patch_embed, self.video_decoder]
        return [self.patch_embed_2d, self.image_decoder]

    def encode(self, stream: Stream, pixels: Tensor, mask: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the decoders read, stages 3 and 4: (B, D, h, w, 4C) and (B, D, h/2, w/2, 8C); D = 1 for images.

        Arguments as in `MaskedInput`. Raises ValueError where the mask's grid is not the pixels' (T/2, H/16, W/16).
        """
        clips = stream == "clips"
        if not clips:
            mask = mask.unsqueeze(1)
        x = (self.patch_embed if clips else self.patch_embed_2d)(pixels.to(self.mask_token.dtype))
        grid = (x.shape[1], x.shape[2] // CELL, x.shape[3] // CELL)
        if x.shape[2] % (2 * CELL) or x.shape[3] % (2 * CELL):
            raise ValueError(f"{stream}: height and width must be multiples of 32, got pixels {tuple(pixels.shape)}")
        if tuple(mask.shape) != (x.shape[0], *grid):
            raise ValueError(
                f"{stream}: the mask is {tuple(mask.shape)}, but pixels {tuple(pixels.shape)} have the token grid "
                f"{(x.shape[0], *grid)} (batch, depth, height / 16, width / 16)"
            )
        hidden = mask.repeat_interleave(CELL, dim=2).repeat_interleave(CELL, dim=3).unsqueeze(-1)
        x = torch.where(hidden, self.mask_token.to(x.dtype), x)
        *_, x3, x4 = self.encoder(x, drop)
        return x3, x4

    def decode(self, stream: Stream, pixels: Tensor, mask: Tensor, drop: Tensor | None = None) -> Tensor:
        """Features of every position: clips (B, T, h, w, 8C), images (M, h, w, 8C). Arguments as in `encode`."""
        x = self.norm(self._decoder(stream)(*self.encode(stream, pixels, mask, drop)))
        return x if stream == "clips" else x.squeeze(1)

    def _decoder(self, stream: Stream) -> ImageDecoder:
        return self.video_decoder if stream == "clips" else self.image_decoder

    def masked_loss(
        self, stream: Stream, x3: Tensor, x4: Tensor, mask: Tensor, codes: Tensor, slots: int
    ) -> tuple[Tensor, Tensor]:
        """Decoder, norm, head and loss at masked positions alone, equal to those of `decode` there.

        x3 and x4 are `encode`'s, the others `MaskedInput`'s. Returns the mean cross-entropy (nats) over the
        micro-batch's masked positions and their top-1 accuracy; scalars.
        """
        frames = PATCH[0] if stream == "clips" else 1  # positions of a token
        tokens = masked_slots(mask, -(-slots // frames))
        used, places = tokens >= 0, torch.arange(len(tokens), device=mask.device)
        # An unused slot reads a place of its own, as an address that many write to would hold up the backward pass.
        features = self._decoder(stream)(x3, x4, torch.where(used, tokens, places % mask.numel()))
        grid = codes.view(len(mask), -1, frames, *codes.shape[-2:])  # batch, depth, frames, h, w
        targets = grid.movedim(2, -1).reshape(-1, frames)
        index = torch.arange(features.shape[:2].numel(), device=mask.device).view(len(tokens), frames)
        return masked_linear_cross_entropy(
            self.norm(features).flatten(0, 1),
            self.head.weight,
            self.head.bias,
            targets.index_select(0, tokens.clamp(min=0)).flatten(),
            index.where(used[:, None], -1).flatten(),
            impl=self.implementations["masked_linear_cross_entropy"],
        )

    def stream_loss(self, stream: Stream, inputs: MaskedInput) -> tuple[Tensor, Tensor]:
        """`masked_loss` of what the encoder makes of the inputs."""
        x3, x4 = self.encode(stream, inputs.pixels, inputs.mask, inputs.drop)
        return self.masked_loss(stream, x3, x4, inputs.mask, inputs.codes, inputs.slots)


class TimeSformerBEVT(MaskedTokens):
    """With a TimeSformer; `grid` is the (D, h, w) of clips in tokens. Arguments and errors as of `MaskedTokens`.

    A masked patch is replaced after the patch embedding, before its positions are added, by the mask token. A run of
    images alone has no parts that attend over time.
    """

    encoder: vit.VideoTransformer

    def __init__(
        self,
        config: ViTConfig,
        vocab_size: int,
        streams: Sequence[Stream] = ("clips", "images"),
        *,
        grid: tuple[int, int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(vocab_size, streams)
        config, self.implementations = vit.resolved(config, device, dtype)
        self._resolve_loss(config, device, dtype)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.encoder = vit.VideoTransformer(config, grid, still="clips" not in streams)
        self.norm = nn.LayerNorm(config.embed_dim, vit.EPS)
        self.head = nn.Linear(config.embed_dim, vocab_size)
        self.encoder.reset_parameters()
        init_weights(self.head)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def own_parameters(self, stream: Stream) -> list[nn.Parameter]:
        """Of clips those that know of time."""
        named = self.encoder.named_parameters() if stream == "clips" else ()
        return [p for name, p in named if name == "time_embed" or ".temporal_" in name]

    def decode(self, stream: Stream, pixels: Tensor, mask: Tensor, drop: Tensor | None = None) -> Tensor:
        """As `MaskedTokens.decode`. Raises ValueError where the mask's grid is not the pixels' in tokens."""
        clips = stream == "clips"
        x = self.encoder.patches(pixels)
        if mask.flatten(-2).shape != (x.shape[:3] if clips else (len(x), x.shape[2])):
            raise ValueError(
                f"{stream}: the mask is {tuple(mask.shape)}, but pixels {tuple(pixels.shape)} are "
                f"{tuple(x.shape[1:3])} tokens (depth, height * width)"
            )
        tokens = self.encoder(x, drop, hidden=mask.view(x.shape[:3]), mask_token=self.mask_token)[:, 1:]
        return self.norm(tokens).view(*mask.shape, -1)

    def stream_loss(self, stream: Stream, inputs: MaskedInput) -> tuple[Tensor, Tensor]:
        """As `MaskedTokens.stream_loss`."""
        index = masked_slots(inputs.mask, inputs.slots)
        return masked_linear_cross_entropy(
            self.decode(stream, inputs.pixels, inputs.mask, inputs.drop).flatten(0, -2),
            self.head.weight,
            self.head.bias,
            inputs.codes.flatten().index_select(0, index.clamp(min=0)),
            index,
            impl=self.implementations["masked_linear_cross_entropy"],
        )
