"""The paper's pretraining runs (BEVT, CVPR 2022: results on Swin-B, ablation of the masks on Swin-T).

Every recipe is of Swin-B but for `mask_ablation`; `--size small` and `--size tiny` make it Swin-S and Swin-T. The
paper's rows of supervised and contrastive weights need no pretraining of this kind; for those of a TimeSformer see
`timesformer.py`.

Costs are counted, not measured (`bevt budget RECIPE --size SIZE`): operations of one step, of the whole run, and hours
on 8 devices at an assumed 40 % of 790 TFLOP/s, for Kinetics-400 of 240,000 videos and ImageNet-1K. Expected are the
paper's top-1 accuracies after finetuning and what its authors say of masked accuracies; none was measured here. "Not
published": found in neither the paper nor the official code, so that what is taken is a choice.
"""

from __future__ import annotations

from dataclasses import replace

from bevt.config import Config, ModelConfig, OptimConfig, TokenizerConfig, TrainConfig, resized


def image_stage() -> Config:
    """BEVT-I, the first stage: the image stream alone on ImageNet-1K, 800 epochs, 2048 images a step.

    Command: bevt pretrain image_stage --data.images IMAGENET/train --tokenizer.path encoder.pkl --out runs/image_stage
    Cost: base 310.9 TFLOP a step, 155.57 EFLOP, 17.1 h; small 224.2 TFLOP a step, 112.20 EFLOP, 12.3 h;
    tiny 172.0 TFLOP a step, 86.06 EFLOP, 9.5 h. The paper took 4 days on 32 V100.
    Expected: 69.2 SSv2, 81.2 Diving48, 80.5 K400. Its weights start the other recipes.
    Settings: batch, epochs and masks are the paper's. Its code was never released: the optimizer is the joint stage's,
    learning rate (1.5e-3 at batch 2048), warm-up and drop path are BEiT's (arXiv 2106.08254), the windows (1, 7, 7).
    """
    return Config(
        recipe="image_stage",
        model=ModelConfig(window_size=(1, 7, 7), drop_path=0.1),
        optim=OptimConfig(lr=1.5e-3, epochs=800, warmup_epochs=10),
        train=TrainConfig(clips=0, images=2048),
    )


def joint_stage() -> Config:
    """BEVT: both streams on ImageNet-1K and Kinetics-400, 150 epochs, 256 clips + 2048 images a step.

    Command, from BEVT-I: bevt pretrain joint_stage --init runs/image_stage/checkpoints/last --data.clips K400/train
    --data.images IMAGENET/train --tokenizer.path encoder.pkl --out runs/joint_stage
    Command, from scratch: bevt pretrain joint_stage --data.clips K400/train --data.images IMAGENET/train
    --tokenizer.path encoder.pkl --out runs/joint_scratch
    Cost: base 708.1 TFLOP a step, 99.58 EFLOP, 10.9 h; small 526.3 TFLOP a step, 74.01 EFLOP, 8.1 h;
    tiny 414.2 TFLOP a step, 58.25 EFLOP, 6.4 h.
    Expected: 70.6 SSv2, 86.7 Diving48, 80.6 K400 from BEVT-I; 67.9, 85.1, 78.5 from scratch. Masked accuracy: about
    4 % on images, on clips 10 % at epoch 32 and 13 % at the end (authors).
    Settings: the official configuration's, of Swin-B from BEVT-I; epochs are passes over the videos. Not published: the
    length of the run from scratch, taken to be the same; drop path of Swin-S and Swin-T, taken from Video Swin (0.1).
    """
    return Config(recipe="joint_stage")


def joint_frames() -> Config:
    """BEVT on Kinetics-400 alone: its images are single frames of the videos.

    Command, first: bevt pretrain image_stage --data.images K400/train --data.image-source frames
    --optim.max-steps 500456 --tokenizer.path encoder.pkl --out runs/image_frames
    Command, then: bevt pretrain joint_frames --init runs/image_frames/checkpoints/last --data.clips K400/train
    --data.images K400/train --tokenizer.path encoder.pkl --out runs/joint_frames
    Cost: as `joint_stage`, and `image_stage` before it.
    Expected: 70.3 SSv2, 86.6 Diving48, 80.5 K400.
    Settings: as `joint_stage`. Not published: how a frame is chosen (here uniformly from the video at each visit), and
    how the first stage went. The table names no data but K400, so it reads frames too, in as many steps as on ImageNet.
    """
    base = joint_stage()
    return replace(base, recipe="joint_frames", data=replace(base.data, image_source="frames"))


def joint_vq() -> Config:
    """BEVT on the codes of a VQ tokenizer that is trained here, in the place of PeCo's.

    Command, first: bevt tokenizer fit --data.images IMAGENET/train --out vq.safetensors
    Command, second: bevt pretrain image_stage --data.images IMAGENET/train --tokenizer.kind vq
    --tokenizer.path vq.safetensors --out runs/image_vq
    Command, then: bevt pretrain joint_vq --init runs/image_vq/checkpoints/last --data.clips K400/train
    --data.images IMAGENET/train --tokenizer.path vq.safetensors --out runs/joint_vq
    Cost: base 468.7 TFLOP a step, 65.91 EFLOP, 7.2 h; small 286.9 TFLOP a step, 40.35 EFLOP, 4.4 h;
    tiny 174.8 TFLOP a step, 24.59 EFLOP, 2.7 h: with the fitted file as --tokenizer.path, without the stage before.
    Expected: unknown. PeCo's tokenizer gives 71.4 SSv2, 87.2 Diving48, 81.1 K400, but its weights were never released.
    It is a VQ-VAE of 8192 codes, as this one is, trained with a perceptual loss, which this one lacks.
    Settings: as `joint_stage`; the tokenizer's are this project's.
    """
    base = joint_stage()
    return replace(base, recipe="joint_vq", tokenizer=TokenizerConfig(kind="vq"))


def video_only() -> Config:
    """BEVT-V: the video stream alone on Kinetics-400, otherwise the joint stage.

    Command, from BEVT-I: bevt pretrain video_only --init runs/image_stage/checkpoints/last --data.clips K400/train
    --tokenizer.path encoder.pkl --out runs/video_only
    Command, from scratch: bevt pretrain video_only --data.clips K400/train --tokenizer.path encoder.pkl
    --out runs/video_scratch
    Cost: base 397.2 TFLOP a step, 55.86 EFLOP, 6.1 h; small 302.1 TFLOP a step, 42.48 EFLOP, 4.7 h;
    tiny 242.2 TFLOP a step, 34.07 EFLOP, 3.7 h.
    Expected: 70.0 SSv2, 85.2 Diving48, 79.6 K400 from BEVT-I; 67.1, 83.7, 76.2 from scratch.
    Settings: as `joint_stage`. Not published: the length of either run and their optimizer, taken to be the same.
    """
    base = joint_stage()
    return replace(base, recipe="video_only", train=replace(base.train, images=0))


def mask_ablation() -> Config:
    """Table 9 on Swin-T: the joint stage under one of ten masks of the clips, which flags choose.

    Command, first: bevt pretrain image_stage --size tiny --data.images IMAGENET/train --tokenizer.path encoder.pkl
    --out runs/image_tiny
    Command, then: bevt pretrain mask_ablation MASK --init runs/image_tiny/checkpoints/last --data.clips K400/train
    --data.images IMAGENET/train --tokenizer.path encoder.pkl --out runs/MASK

        mask                MASK                             SSv2   K400
        tube 0.5T-T, 40 %   --clip-mask.ratio 0.4            61.5   70.9
        tube 0.5T-T, 50 %   --clip-mask.ratio 0.5            63.3   71.6
        tube 0.5T-T, 60 %   --clip-mask.ratio 0.6            63.6   71.4
        tube 0.5T-T, 70 %   --clip-mask.ratio 0.7            63.5   71.4
        tube 0.25T-0.75T    --clip-mask.tube 0.25 0.75       62.8   69.5
        tube 0.75T-T        --clip-mask.tube 0.75 1          63.1   71.6
        tube T              --clip-mask.tube 1 1             62.6   71.2
        Random-3D           --clip-mask.kind random_3d       59.1   67.4
        Frame-Diff          --clip-mask.kind frame_diff      62.9   70.6
        Random-Frame        --clip-mask.kind random_frame    62.6   70.9

    Cost: tube 0.5T-T, 50 % 414.2 TFLOP a step, 58.25 EFLOP, 6.4 h; least tube 0.25T-0.75T 356.5 TFLOP a step,
    50.13 EFLOP, 5.5 h; most tube T 471.8 TFLOP a step, 66.35 EFLOP, 7.3 h: only frames with a mask are tokenized.
    Expected: the table.
    Settings: as `joint_stage`. Not published: the length of these runs and what they start from, taken to be the joint
    stage's; the ratio of the masks whose row names none, taken to be 50 %; Random-3D's (`bevt.masking`).
    """
    base = joint_stage()
    return replace(base, recipe="mask_ablation", model=resized(base.model, "tiny"))
