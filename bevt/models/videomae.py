"""VideoMAE's masked autoencoder (arXiv 2203.12602; code MCG-NJU/VideoMAE).

Shape letters: B clips, T frames, D N tokens of a clip, v visible and m hidden ones (v + m = D N), C channels, P numbers
of a patch, q = P / 3 pixels of it.

The encoder sees visible tokens alone, which alone are embedded; a narrow decoder sees all, and predicts the pixels of
the hidden ones, normalised by each patch's own mean and deviation in each colour.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevt.config import DecoderConfig, ViTConfig
from bevt.models import vit
from bevt.models.layers import Linear


class Decoder(nn.Module):
    """Blocks, LayerNorm, linear to pixels."""

    def __init__(self, config: ViTConfig, decoder: DecoderConfig, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            vit.Block(config, decoder.embed_dim, decoder.num_heads) for _ in range(decoder.depth)
        )
        self.norm = nn.LayerNorm(decoder.embed_dim, vit.EPS)
        self.head = Linear(decoder.embed_dim, outputs, impl=config.linear_impl)

    def forward(self, x: Tensor, last: int) -> Tensor:
        """(B, D N, C) -> (B, last, P), of the last tokens."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -last:]))


class VideoMAE(nn.Module):
    """Encoder and decoder. `grid`, `device` and `dtype` as for `ViTClassifier`."""

    def __init__(
        self,
        config: ViTConfig,
        decoder: DecoderConfig,
        grid: vit.Size3,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        config, self.implementations = vit.resolved(config, device, dtype)
        self.config, (depth, height, width) = config, grid
        self.encoder = vit.VideoTransformer(config, grid)
        self.norm = nn.LayerNorm(config.embed_dim, vit.EPS)
        self.encoder_to_decoder = Linear(config.embed_dim, decoder.embed_dim, bias=False, impl=config.linear_impl)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder.embed_dim))
        self.decoder = Decoder(config, decoder, 3 * config.tubelet * config.patch**2)
        positions = vit.sine_positions(depth * height * width, decoder.embed_dim)
        self.register_buffer("decoder_pos_embed", positions, persistent=False)
        for part in (self.encoder, self.decoder):  # what lies between them keeps PyTorch's rule
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    vit.fill(config.kind, module)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    decoder_pos_embed: Tensor

    def forward(self, pixels: Tensor, visible: Tensor, hidden: Tensor, pixel_std: Tensor) -> dict[str, Tensor]:
        """`loss_clips`, the mean squared error of the hidden patches' normalised pixels; `mean_clips`, that of
        predicting each patch's own mean.

        Args:
            pixels: (B, 3, T, rows, columns) normalised clips.
            visible: (B, v) int64, numbers of the visible tokens.
            hidden: (B, m) int64, those of the others.
            pixel_std: (3,) by which pixels in 0..1 were divided.
        """
        patches = self.encoder.patches(pixels)
        predicted = self.predict(patches, visible, hidden)
        targets, _ = normalised(vit.taken(patches.flatten(1, 2), hidden), pixel_std)
        error = (predicted.to(targets.dtype) - targets).square().mean()
        return {"loss_clips": error, "mean_clips": targets.square().mean()}

    def predict(self, patches: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Normalised pixels of the hidden patches, (B, m, P) in order of pixel, colour, from all (B, D, N, P)."""
        x = self.encoder_to_decoder(self.norm(self.encoder(patches, visible=visible)))
        places = self.decoder_pos_embed
        x = torch.cat([x + places[visible], self.mask_token + places[hidden]], dim=1)
        return self.decoder(x, hidden.shape[1])

    def rebuilt(self, pixels: Tensor, visible: Tensor, hidden: Tensor, pixel_std: Tensor) -> Tensor:
        """The clips (B, 3, T, rows, columns), normalised, with hidden patches as they are predicted.

        Their true mean and deviation are put back. Arguments as of `forward`.
        """
        patches = self.encoder.patches(pixels)
        depth, n, size = patches.shape[1:]
        predicted = self.predict(patches, visible, hidden).to(patches.dtype)
        patches = patches.flatten(1, 2)
        _, (mean, deviation) = normalised(vit.taken(patches, hidden), pixel_std)
        predicted = predicted.unflatten(-1, (-1, 3)) * deviation + mean
        predicted = predicted.transpose(-1, -2).flatten(-2).to(patches.dtype)
        filled = patches.scatter(1, hidden.unsqueeze(-1).expand_as(predicted), predicted)
        return vit.unpatched(filled.view(-1, depth, n, size), pixels.shape, self.config.tubelet, self.config.patch)


def normalised(patches: Tensor, pixel_std: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(..., P) patches of normalised pixels -> the targets (..., P) in order of pixel, colour; mean and deviation, both
    (..., 1, 3), that made them.

    The authors' code normalises pixels in 0..1 with 1e-6 added to the deviation (with Bessel's correction); of pixels
    that were divided by `pixel_std` (3,) that is 1e-6 / pixel_std.
    """
    x = patches.unflatten(-1, (3, -1)).transpose(-1, -2)  # (..., q, 3)
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    deviation, mean = torch.std_mean(x, dim=-2, keepdim=True)
    deviation = deviation + (1e-6 / pixel_std).to(x.dtype)
    return ((x - mean) / deviation).flatten(-2), (mean, deviation)
