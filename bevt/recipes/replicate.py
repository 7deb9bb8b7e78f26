"""The paper's experiments at a size that two CPU cores finish in three hours, on the embedded data (`bevt replicate`).

Clips of 8 frames and stills, 64x64: a 4x4x4 grid of positions; the encoder has four stages of two blocks.
"""

from __future__ import annotations

from dataclasses import replace

from bevt.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneTrainConfig,
    HeadConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    TestConfig,
    TokenizerConfig,
    TrainConfig,
)

IMAGES = ModelConfig(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=(1, 4, 4), drop_path=0.0)
CLIPS = replace(IMAGES, window_size=(4, 4, 4))

DATA = DataConfig(frames=8, stride=4, short_side=(64, 74), crop=64, flip=0.0, jitter=0.0, workers=0, backend="pyav")
"""Without flips, which would turn left into right."""


def replicate_image_stage() -> Config:
    """BEVT-I of `bevt replicate`.

    Command: bevt replicate (which fills in data and tokenizer). Cost and results: replication/README.md.
    """
    return Config(
        recipe="replicate_image_stage",
        model=IMAGES,
        tokenizer=TokenizerConfig(kind="vq"),
        image_mask=MaskConfig(kind="block", min_block=4),
        clip_mask=MaskConfig(kind="tube", min_block=4),
        data=DATA,
        optim=OptimConfig(lr=5e-4, clip_grad=1.0, max_steps=2000, epochs=1, warmup_epochs=0.1),
        train=TrainConfig(clips=0, images=32, micro_images=32, precision="float32", checkpoint_every=100, keep=1),
    )


def replicate_joint_stage() -> Config:
    """BEVT of `bevt replicate`; without images BEVT-V.

    Command: bevt replicate. Cost and results: replication/README.md.
    """
    base = replicate_image_stage()
    return replace(
        base,
        recipe="replicate_joint_stage",
        model=CLIPS,
        optim=replace(base.optim, max_steps=3000),
        train=replace(base.train, clips=8, images=16, micro_clips=8, micro_images=16),
    )


def replicate_finetune() -> FinetuneConfig:
    """Finetuning of `bevt replicate`.

    Command: bevt replicate. Cost and results: replication/README.md.
    """
    return FinetuneConfig(
        recipe="replicate_finetune",
        model=CLIPS,
        head=HeadConfig(dropout=0.0),
        data=replace(DATA, short_side=(64, 68)),
        augment=AugmentConfig(label_smoothing=0.1),
        optim=FinetuneOptimConfig(
            lr=2e-3, weight_decay=0.05, clip_grad=5.0, max_steps=100, epochs=1, warmup_epochs=0.5
        ),
        train=FinetuneTrainConfig(
            clips=32, images=0, micro_clips=32, precision="float32", eval_every=100, checkpoint_every=100, keep=1
        ),
        test=TestConfig(clips=1, crops=1),
    )
