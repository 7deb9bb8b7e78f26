"""VideoMAE's reconstruction of held-out clips, next to what predicting each patch's mean would give."""

from __future__ import annotations

from contextlib import closing

import torch

from bevt.config import VideoMAEConfig
from bevt.data.build import eval_batches
from bevt.models.videomae import VideoMAE
from bevt.train.step import autocast
from bevt.train.videomae import pixel_inputs


@torch.no_grad()
def evaluate(config: VideoMAEConfig, model: VideoMAE, device: torch.device) -> dict[str, float]:
    """Score the held-out clips that `config.data.val_clips` and `config.train.eval_clips` name.

    `val_loss_clips`: mean squared error of the hidden patches' normalised pixels; `mean_clips`: that of predicting each
    patch's own mean. Both are means over all clips; without any, nothing.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    try:
        with closing(eval_batches(config)) as batches:
            for batch in batches:
                inputs = pixel_inputs(batch, config, device)
                with autocast(config, device):
                    out = model(**inputs)
                count = torch.ones((), dtype=torch.float64, device=device)
                sums += len(inputs["pixels"]) * torch.stack([out["loss_clips"], out["mean_clips"], count]).double()
    finally:
        model.train()
    loss, mean, count = sums.tolist()
    return {"val_loss_clips": loss / count, "mean_clips": mean / count} if count else {}
