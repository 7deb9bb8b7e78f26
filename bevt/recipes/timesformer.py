"""TimeSformer (arXiv 2102.05095) as a classifier, and as BEVT's encoder (Table 8 of BEVT's paper).

Of Table 8 nothing but the figures was published: what is taken of BEVT's recipes with a Video Swin and of TimeSformer's
code (facebookresearch/TimeSformer) is a choice. Expected are top-1 accuracies of the paper, with the PeCo tokenizer;
none was measured here.
"""

from __future__ import annotations

from dataclasses import replace

from bevt.config import (
    Config,
    DataConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneTrainConfig,
    HeadConfig,
    TestConfig,
    TokenizerConfig,
    ViTConfig,
)
from bevt.recipes.pretrain import image_stage, joint_stage

BASE = ViTConfig(kind="timesformer", tubelet=1)


def timesformer_image_stage() -> Config:
    """BEVT-I with a TimeSformer: the image stream alone on ImageNet-1K, 800 epochs.

    Command, first: bevt tokenizer fit --data.images IMAGENET/train --out vq.safetensors
    Command, then: bevt pretrain timesformer_image_stage --data.images IMAGENET/train --tokenizer.path vq.safetensors
    --out runs/timesformer_image_stage
    Cost: base 234.4 TFLOP a step, 117.32 EFLOP, 12.9 h.
    Expected: 61.8 SSv2, 77.2 Diving48, 76.5 K400.
    Settings: `image_stage`'s. Its encoder is a ViT-B: nothing attends over time.
    """
    base = image_stage()
    return replace(
        base, recipe="timesformer_image_stage", model=replace(BASE, drop_path=0.1), tokenizer=TokenizerConfig(kind="vq")
    )


def timesformer_joint_stage() -> Config:
    """BEVT with a TimeSformer: both streams on ImageNet-1K and Kinetics-400, 8 frames at stride 32.

    Command: bevt pretrain timesformer_joint_stage --init runs/timesformer_image_stage/checkpoints/last --data.clips
    K400/train.csv --data.images IMAGENET/train --tokenizer.path vq.safetensors --out runs/timesformer_joint_stage
    Cost: base 549.2 TFLOP a step, 77.23 EFLOP, 8.5 h.
    Expected: 65.7 SSv2, 82.3 Diving48, 77.1 K400.
    Settings: `joint_stage`'s but for frames and stride, which are TimeSformer's.
    """
    base = joint_stage()
    return replace(
        base,
        recipe="timesformer_joint_stage",
        model=replace(BASE, drop_path=0.1),
        tokenizer=TokenizerConfig(kind="vq"),
        data=replace(base.data, frames=8, stride=32),
    )


def timesformer_k400() -> FinetuneConfig:
    """TimeSformer-B on Kinetics-400: 15 epochs of 8 frames at stride 32, SGD.

    Command: bevt finetune timesformer_k400 --init runs/timesformer_joint_stage/checkpoints/last --data.clips
    K400/train.csv --data.val-clips K400/val.csv --out runs/timesformer_k400
    Command, then: bevt test timesformer_k400 runs/timesformer_k400/checkpoints/last
    Expected: 77.1 from BEVT, 76.5 from BEVT-I, 75.4 image supervised; TimeSformer's own paper: 78.0 from ImageNet-21k.
    Settings: --init also takes timm's and Hugging Face's files of an image ViT, TimeSformer's, and Hugging Face's of
    it. Rate, momentum and crops are those of TimeSformer's code; its rate falls to a tenth after epochs 11 and 14, here
    by cosine; it decays biases, norms, tokens and positions too; and it drops paths by place (over time) and by frame
    (over space), here by clip.
    """
    return FinetuneConfig(
        recipe="timesformer_k400",
        model=replace(BASE, drop_path=0.1),
        head=HeadConfig(dropout=0.0),
        data=DataConfig(frames=8, stride=32, short_side=(256, 320), crop=224, flip=0.5, jitter=0.0),
        optim=FinetuneOptimConfig(
            kind="nesterov", lr=0.005, weight_decay=1e-4, clip_grad=0.0, epochs=15, warmup_epochs=0
        ),
        train=FinetuneTrainConfig(clips=8, images=0, micro_clips=1),
        test=TestConfig(clips=1, crops=3, short_side=224),
    )


def timesformer_ssv2() -> FinetuneConfig:
    """TimeSformer-B on Something-Something V2: 8 frames spread over the video, no flips.

    Command: bevt finetune timesformer_ssv2 --init runs/timesformer_joint_stage/checkpoints/last --data.clips
    SSV2/train.json --data.val-clips SSV2/validation.json --head.classes SSV2/labels.json --out runs/timesformer_ssv2
    Command, then: bevt test timesformer_ssv2 runs/timesformer_ssv2/checkpoints/last
    Expected: 65.7 from BEVT, 61.8 from BEVT-I, 57.6 image supervised; TimeSformer's own paper: 59.5.
    Settings: as `timesformer_k400`, but for the short side, which TimeSformer's code draws uniformly in its inverse.
    Its published weights of this dataset read blue first (its loader is OpenCV's and leaves the channels so): their
    `patch_embed.proj.weight` wants `.flip(1)` before they are tested here.
    """
    base = timesformer_k400()
    data = replace(base.data, sampling="segments", stride=DataConfig.stride, flip=0.0)
    return replace(base, recipe="timesformer_ssv2", data=data)


def timesformer_diving48() -> FinetuneConfig:
    """TimeSformer-B on Diving48 (V2 labels): 8 frames at stride 32.

    Command: bevt finetune timesformer_diving48 --init runs/timesformer_joint_stage/checkpoints/last --data.clips
    DIVING48/train.json --data.val-clips DIVING48/test.json --out runs/timesformer_diving48
    Command, then: bevt test timesformer_diving48 runs/timesformer_diving48/checkpoints/last
    Expected: 82.3 from BEVT, 77.2 from BEVT-I, 77.4 image supervised.
    Settings: none were published; as `timesformer_k400`.
    """
    return replace(timesformer_k400(), recipe="timesformer_diving48")
