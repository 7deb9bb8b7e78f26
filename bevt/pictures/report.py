"""The pictures of a finished run: its curves, and what the model makes of held-out clips."""

from __future__ import annotations

from pathlib import Path

import torch

from bevt.config import Config
from bevt.data import augment
from bevt.data.build import eval_batches
from bevt.models.bevt import BEVT, PATCH
from bevt.pictures.curves import curves
from bevt.pictures.strips import strip
from bevt.tokenizers import Tokenizer

CLIPS = 3
"""Held-out clips that get a strip."""


def draw(config: Config, out: Path, model: BEVT, tokenizer: Tokenizer, device: torch.device) -> list[Path]:
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
        predicted = model.predict("clips", augment.to_encoder_clips(clips), mask)
        hidden = mask.repeat_interleave(PATCH[0], dim=1)
        filled = torch.where(hidden, predicted, codes)
        for i in range(min(len(clips), CLIPS + 1 - len(written))):
            true_view = guess_view = None
            if config.tokenizer.kind == "vq":
                true_view, guess_view = tokenizer.decode(codes[i]).cpu(), tokenizer.decode(filled[i]).cpu()
            path = folder / f"clip_{len(written) - 1}.png"
            strip(
                path,
                batch.clips[i].cpu(),
                hidden[i].cpu(),
                true_view,
                guess_view,
                title=Path(batch.clip_ids[i].split("@")[0]).name,
            )
            written.append(path)
        if len(written) > CLIPS:
            break
    model.train()
    return written
