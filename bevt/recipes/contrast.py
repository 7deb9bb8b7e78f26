"""The paper's baseline of contrastive learning on images."""

from __future__ import annotations

from bevt.config import BatchConfig, ContrastConfig, DataConfig, ModelConfig, OptimConfig


def image_contrastive() -> ContrastConfig:
    """The paper's row "Image contrastive": MoBY on ImageNet-1K, from which a video run starts.

    Command: bevt contrast image_contrastive --data.images IMAGENET/train --out runs/image_contrastive
    Command, then: bevt finetune ssv2 --init runs/image_contrastive/checkpoints/last --data.clips SSV2/train.json
    --data.val-clips SSV2/validation.json --head.classes SSV2/labels.json --out runs/ssv2_image_contrastive
    Expected: 67.1 SSv2, 85.5 Diving48, 80.9 K400. Weights of MoBY's authors start a video run too: --init FILE.pth
    Settings: those of MoBY's Swin-T (github.com/SwinTransformer/Transformer-SSL at 4510de1), on Swin-B, for which its
    authors give none: what BEVT's took is not published. Its schedule ends at 0 and not at 5e-6, and its crops are
    bicubic.
    """
    return ContrastConfig(
        recipe="image_contrastive",
        model=ModelConfig(window_size=(1, 7, 7), drop_path=0.2),
        data=DataConfig(crop_area=(0.08, 1.0), jitter=0.0),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, clip_grad=5.0, epochs=300, warmup_epochs=5, warmup_factor=5e-4),
        train=BatchConfig(clips=0, images=512),
    )
