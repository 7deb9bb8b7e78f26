"""MoBY, contrastive learning of images with Swin (arXiv 2105.04553; SwinTransformer/Transformer-SSL at
4510de1, `models/moby.py`): how BEVT's "image contrastive" baseline learns its weights.

Letters: M images of a micro-batch, H x W pixels, C channels of the first stage, E = 256 features, K keys in a queue.

Of two views of an image, the online branch's prediction from one has to find the key branch's projection of the other
among K keys of earlier images, and the other way round. The key branch is a running mean of the online one.

A step is: `update_keys`, forward and backward over the micro-batches, the optimizer's update, `enqueue` with the keys
of all micro-batches and processes. No method waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt.config import ModelConfig, UserError
from bevt.models.layers import init_weights
from bevt.models.video_swin import PATCH, PatchEmbed, VideoSwin, resolved

HIDDEN, FEATURES = 4096, 256
"""Widths of the heads: hidden and output."""


def key_momentum(step: int, steps: int, start: float = 0.99) -> float:
    """Share of the key branch's weights that 0-based `step` out of `steps` keeps: from `start` to 1, by cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / steps) + 1) / 2


class Head(nn.Module):
    """Linear, BatchNorm, ReLU, Linear: projector and predictor.

    The statistics are those of the micro-batch over all processes (SyncBatchNorm where there are several), so here, as
    nowhere else in this project, results depend on the size of the micro-batch. They are not averaged over steps: a
    head is only ever trained.
    """

    def __init__(self, channels: int, processes: int) -> None:
        super().__init__()
        batch_norm = nn.BatchNorm1d if processes == 1 else nn.SyncBatchNorm
        self.fc1 = nn.Linear(channels, HIDDEN)
        self.norm = batch_norm(HIDDEN, track_running_stats=False)
        self.fc2 = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """(M, channels) -> (M, E)."""
        return self.fc2(F.relu(self.norm(self.fc1(x))))


class Branch(nn.Module):
    """Encoder and projector. The encoder's parts have the names that they have in `BEVT`."""

    def __init__(self, config: ModelConfig, processes: int) -> None:
        super().__init__()
        self.patch_embed_2d = PatchEmbed(PATCH[1:], config.embed_dim)
        self.encoder = VideoSwin(config)
        self.norm = nn.LayerNorm(config.embed_dim * 8)
        self.projector = Head(config.embed_dim * 8, processes)
        self.encoder.apply(init_weights)

    def project(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """(M, 3, H, W) normalised -> (M, E): the mean over all tokens, projected. `drop`: as `VideoSwin.forward`'s."""
        x = self.patch_embed_2d(images.to(self.norm.weight.dtype))
        return self.projector(self.norm(self.encoder(x, drop)[-1]).mean(dim=(1, 2, 3)))


class MoBY(Branch):
    """The online branch with a predictor, the key branch in `key`, and a queue of keys for each view.

    `config` is the image stream's: its window is 1 deep. `device` and `dtype` are those that the forward pass will run
    on and in, as for `BEVT`: the ops' implementations are resolved for them once, into `implementations`. Raises
    `bevt_kernels.NoImplementation` where one that the configuration names cannot serve, and UserError where `processes`
    train it on anything but GPUs: PyTorch has no BatchNorm over processes there.
    """

    queues: Tensor
    """(2, K, E) unit vectors: keys of first and of second views."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        queue: int = 4096,
        temperature: float = 0.2,
        processes: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        kind = torch.device(device).type
        if processes > 1 and kind != "cuda":
            raise UserError(
                f"MoBY's heads normalise over the images of all processes, which PyTorch's SyncBatchNorm does on GPUs "
                f"alone, and this is {processes} processes on {kind}: train with one"
            )
        config, implementations = resolved(config, device, dtype)
        super().__init__(config, processes)
        self.implementations, self.temperature = implementations, temperature
        self.predictor = Head(FEATURES, processes)
        self.key = Branch(config, processes).requires_grad_(False)
        self.register_buffer("queues", F.normalize(torch.randn(2, queue, FEATURES), dim=-1))
        self.update_keys(0.0)

    def forward(
        self, first: Tensor, second: Tensor, drop: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> dict[str, Tensor]:
        """Two views of images, each (M, 3, H, W) normalised, and the online branch's drop path for each.

        Returns `loss_images`, the sum over both directions of the mean cross-entropy (nats; 2 log(1 + K) by chance);
        `accuracy_images`, the share of the 2 M queries whose own key is the most similar; and `keys` (2, M, E) for
        `enqueue`, without gradient.
        """
        queries = [self.predictor(self.project(x, factors)) for x, factors in zip((first, second), drop)]
        # Nothing here wants a gradient; `no_grad` besides would keep the blocks from running compiled (`Region`).
        keys = [self.key.project(x) for x in (first, second)]
        with torch.autocast(first.device.type, enabled=False):  # similarities in the parameters' precision
            q = F.normalize(torch.stack(queries).to(self.queues.dtype), dim=-1)
            k = F.normalize(torch.stack(keys).to(self.queues.dtype), dim=-1)
            own, queues = k.flip(0), self.queues.flip(0)  # of the other view
            logits = torch.cat([(q * own).sum(-1, keepdim=True), q @ queues.mT], dim=-1) / self.temperature
            loss = (logits.logsumexp(-1) - logits[..., 0]).mean(-1).sum()
        accuracy = (logits.argmax(-1) == 0).to(loss.dtype).mean()
        return {"loss_images": loss, "accuracy_images": accuracy, "keys": k}

    @torch.no_grad()
    def update_keys(self, momentum: float) -> None:
        """Before a step's forward passes: key = momentum * key + (1 - momentum) * online, for every parameter."""
        online = dict(self.named_parameters())
        names, keys = zip(*self.key.named_parameters())
        torch._foreach_lerp_(keys, [online[name] for name in names], 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, step: int) -> None:
        """Put the keys (2, n, E) of 0-based `step`, all its micro-batches and processes, in place of the oldest.

        Every step has as many. A key that is not finite leaves the old one in its place, as it would stay for all
        following steps. Raises UserError where n does not divide K.
        """
        count, size = keys.shape[1], self.queues.shape[1]
        if size % count:
            raise UserError(f"the {count} images of a step do not divide MoBY's queue of {size} keys: change either")
        oldest = self.queues.narrow(1, step * count % size, count)
        oldest.copy_(torch.where(keys.isfinite().all(-1, keepdim=True), keys, oldest))
