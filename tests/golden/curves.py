"""The small recipes of the golden loss curves, how they are run, and how the files beside this one are made.

    python tests/golden/curves.py            # prints by how much today's curves differ from the files
    python tests/golden/curves.py --update   # writes them; the commit that does so says why they moved

A curve is of the reference path in float64, on committed videos, pictures and tokenizer, so that nothing but what a
step computes can move it. Frames are cropped and not resized, and the fixed views' codes are far from a tie.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bevt.config import Config, DataConfig, MaskConfig, ModelConfig, OptimConfig, TokenizerConfig, TrainConfig
from bevt.train.metrics import read_rows
from bevt.train.pretrain import pretrain

HERE = Path(__file__).parent
STEPS = 200
SERIES = ("loss", "grad_norm")
"""Of each step; `loss` is the sum over the streams."""


def recipes() -> dict[str, Config]:
    """The three kinds of run at the smallest size that has every part: shifted windows, drop path, both streams."""
    data = HERE / "data"
    joint = Config(
        recipe="joint_stage",
        path="reference",
        model=ModelConfig(
            embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8), window_size=(2, 4, 4), drop_path=0.2
        ),
        tokenizer=TokenizerConfig(kind="vq", path=str(data / "tokenizer.safetensors")),
        image_mask=MaskConfig(kind="block", min_block=4),
        clip_mask=MaskConfig(kind="tube", min_block=4),
        data=DataConfig(
            clips=str(data / "clips"),
            images=str(data / "images"),
            frames=4,
            stride=2,
            short_side=(112, 112),
            crop=64,
            views=2,
            backend="pyav",
            workers=0,
        ),
        optim=OptimConfig(lr=5e-4, max_steps=STEPS, epochs=1, warmup_epochs=0.1),
        train=TrainConfig(
            clips=2, images=4, micro_clips=2, micro_images=4, precision="float64", log_every=1, checkpoint_every=STEPS
        ),
    )
    image = replace(
        joint,
        recipe="image_stage",
        model=replace(joint.model, window_size=(1, 4, 4)),
        train=replace(joint.train, clips=0),
    )
    video = replace(joint, recipe="video_only", train=replace(joint.train, images=0))
    return {"joint_stage": joint, "image_stage": image, "video_only": video}


def curve(config: Config, out: Path) -> dict[str, list[float]]:
    """Run `config` into the folder `out`; the series, step by step."""
    pretrain(config, out, quiet=True)
    rows = [row for row in read_rows(out / "metrics.jsonl") if row["event"] == "train"]
    return {name: [row[name] for row in rows] for name in SERIES}


def golden(name: str) -> dict[str, list[float]]:
    """The committed curve of a recipe."""
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text())
    return {series: found[series] for series in SERIES}


def main() -> None:
    """Compare, or with --update write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    update = parser.parse_args().update
    for name, config in recipes().items():
        with tempfile.TemporaryDirectory() as folder:
            now = curve(config, Path(folder) / name)
        path = HERE / f"{name}.json"
        if path.exists():
            moved = {s: max(abs(a - b) / abs(b) for a, b in zip(now[s], golden(name)[s])) for s in SERIES}
            print(name, ", ".join(f"{s} moved by at most {share:.1e} of itself" for s, share in moved.items()))
        if update:
            path.write_text(json.dumps(now) + "\n")


if __name__ == "__main__":
    main()
