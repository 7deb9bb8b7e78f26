"""Masked-token prediction on held-out data, next to what knowing only the token frequencies would give."""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from bevt.config import Config
from bevt.data.build import eval_batches
from bevt.models.bevt import MaskedTokens
from bevt.tokenizers import Tokenizer
from bevt.train.step import autocast, masked_inputs


def evaluate(config: Config, model: MaskedTokens, tokenizer: Tokenizer, device: torch.device) -> dict[str, float]:
    """Score the held-out samples that `config.data.val_*` and `config.train.eval_*` name.

    Of each stream present: `val_loss_*` (nats) and `val_accuracy_*`, means over all masked positions of all samples;
    and of the very same positions' codes: `entropy_*` (nats; the loss of the best constant prediction), `commonest_*`
    (the accuracy of the best constant prediction) and `codes_*` (how many codes occur).
    """
    counts = {s: torch.zeros(tokenizer.vocab_size, dtype=torch.float64, device=device) for s in model.streams}
    sums = {s: torch.zeros(2, dtype=torch.float64, device=device) for s in model.streams}
    model.eval()
    try:
        with torch.no_grad(), closing(eval_batches(config)) as batches:
            for batch in batches:
                inputs = masked_inputs(batch, tokenizer, config, device)
                for stream in model.streams:
                    if stream not in inputs:
                        continue
                    x = inputs[stream]
                    with autocast(config, device):
                        loss, accuracy = model.stream_loss(stream, x)
                    mask = x.mask.repeat_interleave(config.model.tubelet, dim=1) if stream == "clips" else x.mask
                    codes = x.codes[mask]
                    counts[stream] += torch.bincount(codes, minlength=tokenizer.vocab_size)
                    sums[stream] += torch.stack([loss, accuracy]).double() * len(codes)
    finally:
        model.train()
    out: dict[str, float] = {}
    for stream in model.streams:
        total = counts[stream].sum()
        if total > 0:
            loss, accuracy = (sums[stream] / total).tolist()
            out[f"val_loss_{stream}"], out[f"val_accuracy_{stream}"] = loss, accuracy
            out |= {f"{name}_{stream}": value for name, value in constant_prediction(counts[stream]).items()}
    return out


def constant_prediction(counts: Tensor) -> dict[str, float]:
    """Entropy (nats), the commonest code's share, and the number of codes that occur, from code counts (V,)."""
    share = counts.double() / counts.sum()
    return {
        "entropy": float(-torch.special.xlogy(share, share).sum()),
        "commonest": float(share.max()),
        "codes": float((counts > 0).sum()),
    }
