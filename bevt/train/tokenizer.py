"""Fitting a VQ tokenizer to the user's own frames: what `bevt tokenizer fit` and `bevt demo` run."""

from __future__ import annotations

from pathlib import Path

import torch

from bevt.config import Config, check_frames
from bevt.data import augment
from bevt.data.build import frame_batches
from bevt.tokenizers.vq import FitReport, VQConfig, fit
from bevt.train.metrics import Display, RunError


def fit_tokenizer(config: Config, vq: VQConfig, out: Path, *, quiet: bool = False) -> FitReport:
    """Fit on the frames that `config.data` names, each in the tokenizer's view, and write `out` (safetensors).

    Raises ConfigError for a key that cannot be used, DataError for data that cannot be read, OSError for a file that
    cannot be written, FloatingPointError for a loss that is not finite.
    """
    check_frames(config)
    try:  # before the fit, not after it
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("ab"):
            pass
        if not out.stat().st_size:
            out.unlink()
    except OSError as error:
        raise RunError(f"cannot write --out {out}: {error.strerror}; name a file in a folder that exists") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    display = Display("tokenizer", 0, vq.steps, enabled=not quiet)

    def report(step: int, metrics: dict[str, float]) -> None:
        display.step(step)
        display.text(
            step,
            f"loss {metrics['loss']:.4f}  error {metrics['error']:.1f}/255  codes in the batch {metrics['codes']:.0f}",
        )

    frames = frame_batches(config, vq.batch, vq.seed)
    views = (augment.tokenizer_view(batch.to(device), vq.image_size) for batch in frames)
    try:
        tokenizer, result = fit(views, vq, device=device, on_step=report)
    finally:
        display.close()
        frames.close()
    tokenizer.save(out)
    return result
