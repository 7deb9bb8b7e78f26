"""Sizes that two CPU cores finish in minutes, on the embedded dataset `shapes`: BEVT's two stages (`bevt demo`), and
the other systems by their own commands.
"""

from __future__ import annotations

from dataclasses import replace

from bevt.config import (
    AugmentConfig,
    Config,
    DataConfig,
    DecoderConfig,
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
    VideoMAEConfig,
    VideoMAETrainConfig,
    ViTConfig,
)
from bevt.recipes.replicate import DATA

IMAGES = ModelConfig(embed_dim=48, depths=(2, 2, 4, 2), num_heads=(2, 4, 8, 16), window_size=(1, 6, 6), drop_path=0.0)


def demo_image_stage() -> Config:
    """Image stage of `bevt demo`: stills of 96x96, a 6x6 token grid.

    Command: bevt demo (which fills in data and tokenizer). Cost and result: see the README.
    """
    return Config(
        recipe="demo_image_stage",
        model=IMAGES,
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
        model=replace(IMAGES, window_size=(8, 6, 6)),
        optim=replace(base.optim, lr=1e-3, max_steps=120),
        train=replace(base.train, clips=4, images=16, micro_clips=4, micro_images=16, checkpoint_every=40),
    )


VIT = ViTConfig(embed_dim=96, depth=4, num_heads=4, patch=8, tubelet=4)
"""2 x 8 x 8 tokens of a clip. In tubes of 4 frames a motion shows in each token: with 2 frames a ViViT stays at chance
for as long (LOG.md, 2026-11-28)."""

FRAMES = replace(VIT, kind="timesformer", embed_dim=128, patch=16, tubelet=1)
"""A token, as the tokenizer's, is 16 pixels wide: 8 x 4 x 4 of a clip."""

SHAPES = replace(DATA, clips="shapes:train", images="shapes:train", val_clips="shapes:val", val_images="shapes:val")


def videomae_demo() -> VideoMAEConfig:
    """VideoMAE's pretraining on the embedded dataset.

    Command: bevt pretrain videomae_demo --out runs/videomae_demo
    Result: a mean squared error of 0.50 on held-out clips, where predicting each patch's mean has 0.995.
    """
    return VideoMAEConfig(
        recipe="videomae_demo",
        model=replace(VIT, kind="videomae"),
        decoder=DecoderConfig(embed_dim=64, depth=2, num_heads=2),
        clip_mask=MaskConfig(kind="random_tube", ratio=0.75),
        data=replace(SHAPES, images="", val_images=""),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), clip_grad=1.0, max_steps=3000, epochs=1, warmup_epochs=0.1),
        train=VideoMAETrainConfig(
            clips=16, images=0, micro_clips=16, precision="float32", checkpoint_every=100, keep=1
        ),
    )


def timesformer_demo_image() -> Config:
    """BEVT-I with a TimeSformer on the embedded dataset's stills.

    Command, first: bevt tokenizer fit --data.clips shapes:train --data.images shapes:train --data.short-side 64 74
    --data.crop 64 --vocab-size 128 --code-dim 8 --width 16 --steps 400 --batch 32 --lr 3e-3 --out
    runs/tokenizer.safetensors
    Command, then: bevt pretrain timesformer_demo_image --tokenizer.path runs/tokenizer.safetensors
    --out runs/timesformer_demo_image
    Result: 57 % of held-out masked tokens, the commonest of which are 3.9 % (LOG.md, 2026-11-28).
    """
    return Config(
        recipe="timesformer_demo_image",
        model=FRAMES,
        tokenizer=TokenizerConfig(kind="vq"),
        image_mask=MaskConfig(kind="block", min_block=4),
        clip_mask=MaskConfig(kind="tube", min_block=4),
        data=replace(SHAPES, clips="", val_clips=""),
        optim=OptimConfig(lr=5e-4, clip_grad=1.0, max_steps=2000, epochs=1, warmup_epochs=0.1),
        train=TrainConfig(clips=0, images=32, micro_images=32, precision="float32", checkpoint_every=100, keep=1),
    )


def timesformer_demo_joint() -> Config:
    """BEVT with a TimeSformer on the embedded dataset, from `timesformer_demo_image`.

    Command: bevt pretrain timesformer_demo_joint --init runs/timesformer_demo_image/checkpoints/last
    --tokenizer.path runs/tokenizer.safetensors --out runs/timesformer_demo_joint
    Result: 73 % of held-out masked tokens of clips, 61 % of stills (likewise).
    """
    base = timesformer_demo_image()
    return replace(
        base,
        recipe="timesformer_demo_joint",
        data=SHAPES,
        train=replace(base.train, clips=8, images=16, micro_clips=8, micro_images=16),
    )


def vivit_demo() -> FinetuneConfig:
    """ViViT on the embedded dataset's motions, from random weights.

    --model.kind vivit_3 and vivit_4 are the other models, vivit_2 with --model.temporal-depth 1.

    Command: bevt finetune vivit_demo --out runs/vivit_demo
    Result: replication/README.md.
    """
    return FinetuneConfig(
        recipe="vivit_demo",
        model=replace(VIT, kind="vivit_1"),
        head=HeadConfig(dropout=0.0),
        data=replace(
            SHAPES,
            clips="shapes:train:how",
            val_clips="shapes:val:how",
            images="",
            val_images="",
            short_side=(64, 68),
        ),
        augment=AugmentConfig(label_smoothing=0.1),
        optim=FinetuneOptimConfig(
            lr=5e-4, weight_decay=0.05, clip_grad=1.0, max_steps=800, epochs=1, warmup_epochs=0.1
        ),
        train=FinetuneTrainConfig(
            clips=32, images=0, micro_clips=32, precision="float32", eval_every=10, checkpoint_every=100, keep=1
        ),
        test=TestConfig(clips=1, crops=1),
    )


def videomae_demo_finetune() -> FinetuneConfig:
    """A VideoMAE on the embedded dataset's motions.

    Command: bevt finetune videomae_demo_finetune --init runs/videomae_demo/checkpoints/last --out
    runs/videomae_demo_finetune
    Result: replication/README.md.
    """
    return replace(vivit_demo(), recipe="videomae_demo_finetune", model=replace(VIT, kind="videomae"))


def timesformer_demo_finetune() -> FinetuneConfig:
    """A TimeSformer on the embedded dataset's motions.

    Command: bevt finetune timesformer_demo_finetune --init runs/timesformer_demo_joint/checkpoints/last --out
    runs/timesformer_demo_finetune
    Result: replication/README.md.
    """
    base = vivit_demo()
    return replace(
        base,
        recipe="timesformer_demo_finetune",
        model=FRAMES,
        optim=replace(base.optim, lr=2e-3, max_steps=300),
    )
