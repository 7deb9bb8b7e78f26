"""`bevt demo`: BEVT end to end on the embedded dataset, and whether it learned anything."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

import bevt
from bevt.config import Config, DataConfig, TrainConfig
from bevt.data import shapes
from bevt.data.processes import cores
from bevt.recipes.demo import demo_image_stage, demo_joint_stage
from bevt.tokenizers.vq import VQConfig
from bevt.train.pretrain import pretrain
from bevt.train.tokenizer import fit_tokenizer

T = TypeVar("T")

LEAST_GAIN = 0.25
"""Masked cross-entropy has to be this share below the entropy of the masked positions' codes."""
LEAST_CODES = 64
"""Codes that have to occur at the masked positions of the held-out clips."""


def demo(out: Path, seed: int = 0) -> bool | None:
    """Render, fit, image stage, joint stage, score: whether both streams pass, None where a signal stopped training.

    Every part that an earlier call finished in `out` is kept, and a stage that was cut short is resumed.
    """
    console = Console(highlight=False, soft_wrap=True)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        console.print(f"[bold]{name}[/bold]")
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    data = timed("rendering and encoding the data", lambda: shapes.ensure(out / "data", seed=0))

    def on_shapes(source: DataConfig) -> DataConfig:
        return replace(
            source,
            clips=data.train_clips,
            images=data.train_images,
            val_clips=data.val_clips,
            val_images=data.val_images,
        )

    def stage(config: Config, init: str = "") -> Config:
        return replace(
            config,
            init=init,
            data=on_shapes(config.data),
            tokenizer=replace(config.tokenizer, path=str(tokenizer)),
            train=replace(config.train, seed=seed),
        )

    tokenizer = out / "tokenizer.safetensors"
    if not tokenizer.exists():
        source = demo_joint_stage()
        frames = replace(source, data=on_shapes(source.data), train=TrainConfig(clips=1, images=1))
        report = timed("fitting the tokenizer", lambda: fit_tokenizer(frames, demo_tokenizer(seed), tokenizer))
        console.print(f"{report.codes_used} codes in use, mean error {report.error:.1f} of 255")

    image = stage(demo_image_stage())
    first = timed("image stage", lambda: pretrain(image, out / "image_stage", resume=True))
    if not first.finished:
        return None
    joint = stage(demo_joint_stage(), init=str(out / "image_stage" / "checkpoints" / "last"))
    second = timed("joint stage", lambda: pretrain(joint, out / "joint_stage", resume=True))
    if not second.finished:
        return None

    passed = _show(console, second.evaluation)
    result = {
        "bevt": bevt.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "seed": seed,
        "seconds": {name: round(s, 1) for name, s in seconds.items()},
        **second.evaluation,
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()))
    console.print(
        f"checkpoint {second.checkpoint}\n"
        f"scores     {out / 'result.json'}\n"
        f"metrics    {out / 'joint_stage' / 'metrics.jsonl'}\n"
        f"pictures   {out / 'joint_stage' / 'pictures'}"
    )
    return passed


def demo_tokenizer(seed: int) -> VQConfig:
    """The demo's tokenizer: 128 codes of 48x48 views."""
    return VQConfig(
        image_size=48,
        vocab_size=128,
        code_dim=8,
        width=16,
        blocks=0,
        steps=300,
        batch=32,
        lr=3e-3,
        decay=0.95,
        seed=seed,
    )


def _show(console: Console, scores: dict[str, float]) -> bool:
    """Print the held-out scores against a constant prediction; whether both streams beat it by the stated margins."""
    table = Table(title="held-out masked tokens", title_justify="left")
    for column in ("", "loss", "entropy", "below it", "accuracy", "commonest", "codes"):
        table.add_column(column, justify="left" if not column else "right")
    passed = True
    for stream in ("clips", "images"):
        loss, entropy = scores[f"val_loss_{stream}"], scores[f"entropy_{stream}"]
        accuracy, commonest = scores[f"val_accuracy_{stream}"], scores[f"commonest_{stream}"]
        gain, codes = 1 - loss / entropy, scores[f"codes_{stream}"]
        passed &= gain >= LEAST_GAIN and accuracy > commonest and codes >= LEAST_CODES
        table.add_row(
            stream,
            f"{loss:.3f}",
            f"{entropy:.3f}",
            f"{100 * gain:.1f} %",
            f"{100 * accuracy:.1f} %",
            f"{100 * commonest:.1f} %",
            f"{codes:.0f}",
        )
    console.print(table)
    console.print(
        "loss: cross-entropy in nats; entropy: of the token frequencies; commonest: its share, the accuracy of always "
        "answering it\n"
        f"{'passed' if passed else 'FAILED'}: loss at least {100 * LEAST_GAIN:.0f} % below the entropy, accuracy above "
        f"the commonest token's share, at least {LEAST_CODES} codes in use"
    )
    return passed
