"""The pictures of a finished run: its curves, and what the model makes of held-out clips."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from bevt.config import Config, VideoMAEConfig
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.data.build import eval_batches
from bevt.models.bevt import MaskedTokens
from bevt.models.videomae import VideoMAE
from bevt.pictures.curves import curves
from bevt.pictures.strips import strip
from bevt.tokenizers import Tokenizer
from bevt.train.videomae import pixel_inputs

CLIPS = 3
"""Held-out clips that get a strip."""


def draw(config: Config, out: Path, model: MaskedTokens, tokenizer: Tokenizer, device: torch.device) -> list[Path]:
    """Write `out/pictures/curves.png` and, where clips are trained and held out, `clip_*.png`; the files written.

    The strip's lower rows need a tokenizer with a decoder (kind `vq`).
    """
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "curves.png"]
    curves([out / "metrics.jsonl"], written[0])
    if "clips" not in model.streams or not config.data.val_clips:
        return written
    model.eval()
    for batch in eval_batches(config):
        if batch.clips is None or batch.clip_masks is None:
            continue
        clips, mask = batch.clips.to(device), batch.clip_masks.to(device)
        views = augment.tokenizer_view(clips.flatten(0, 1), config.data.crop // 2)
        codes = tokenizer.encode(views).unflatten(0, clips.shape[:2])  # of every frame, since the strip shows them all
        predicted = model.predict("clips", augment.to_encoder_clips(clips, config.model.pixels), mask)
        hidden = mask.repeat_interleave(config.model.tubelet, dim=1)
        filled = torch.where(hidden, predicted, codes)
        for i in range(min(len(clips), CLIPS + 1 - len(written))):
            rebuilt = {}
            if config.tokenizer.kind == "vq":
                rebuilt = {
                    "rebuilt from\nthe true codes": tokenizer.decode(codes[i]).cpu(),
                    "hidden codes\nas predicted": tokenizer.decode(filled[i]).cpu(),
                }
            written.append(_strip(folder, len(written) - 1, batch, i, hidden[i], rebuilt))
        if len(written) > CLIPS:
            break
    model.train()
    return written


@torch.no_grad()
def draw_pixels(config: VideoMAEConfig, out: Path, model: VideoMAE, device: torch.device) -> list[Path]:
    """As `draw`: hidden patches as they are predicted, with each patch's own mean and deviation (those that the loss
    takes off), which the model does not know.
    """
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "curves.png"]
    curves([out / "metrics.jsonl"], written[0])
    model.eval()
    for batch in eval_batches(config) if config.train.eval_clips else ():
        if batch.clips is None or batch.clip_masks is None:
            continue
        inputs = pixel_inputs(batch, config, device)
        rebuilt = model.rebuilt(**inputs).float().cpu()
        mean, std = (torch.tensor(values).view(3, 1, 1) / 255 for values in config.model.pixels)
        hidden = batch.clip_masks.repeat_interleave(config.model.tubelet, dim=1)
        for i in range(min(len(rebuilt), CLIPS + 1 - len(written))):
            pixels = rebuilt[i].movedim(0, 1) * std + mean
            row = {"hidden patches\nas predicted": pixels}
            written.append(_strip(folder, len(written) - 1, batch, i, hidden[i], row))
        if len(written) > CLIPS:
            break
    model.train()
    return written


def _strip(folder: Path, number: int, batch: Batch, i: int, hidden: Tensor, rebuilt: dict[str, Tensor]) -> Path:
    """Clip i of the batch, as `clip_<number>.png`."""
    path = folder / f"clip_{number}.png"
    title = Path(batch.clip_ids[i].split("@")[0]).name
    strip(path, cast(Tensor, batch.clips)[i].cpu(), hidden.cpu(), rebuilt, title=title)
    return path
