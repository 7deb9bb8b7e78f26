"""The two stages at a size that two CPU cores finish in minutes, on the embedded dataset `shapes` (`bevt demo`)."""

from __future__ import annotations

from dataclasses import replace

from bevt.config import Config, DataConfig, MaskConfig, ModelConfig, OptimConfig, TokenizerConfig, TrainConfig


def demo_image_stage() -> Config:
    """Image stage of `bevt demo`: stills of 96x96, a 6x6 token grid.

    Command: bevt demo (which fills in data and tokenizer). Cost and result: see the README.
    """
    return Config(
        recipe="demo_image_stage",
        model=ModelConfig(
            embed_dim=48, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=(1, 6, 6), drop_path=0.0
        ),
        tokenizer=TokenizerConfig(kind="vq"),
        image_mask=MaskConfig(kind="block", min_block=4),
        clip_mask=MaskConfig(kind="tube", min_block=4),
        data=DataConfig(short_side=(96, 112), crop=96, stride=2, jitter=0.0, workers=1, backend="pyav"),
        optim=OptimConfig(lr=2e-3, max_steps=250, epochs=1, warmup_epochs=0.1),
        train=TrainConfig(clips=0, images=32, micro_images=32, precision="float32", log_every=5, checkpoint_every=100),
    )


def demo_joint_stage() -> Config:
    """Joint stage of `bevt demo`: clips and stills through one encoder, from the image stage's weights.

    Command: bevt demo. Cost and result: see the README.
    """
    base = demo_image_stage()
    return replace(
        base,
        recipe="demo_joint_stage",
        model=replace(base.model, window_size=(8, 6, 6)),
        optim=replace(base.optim, lr=1e-3, max_steps=120),
        train=replace(base.train, clips=4, images=16, micro_clips=4, micro_images=16, checkpoint_every=40),
    )
