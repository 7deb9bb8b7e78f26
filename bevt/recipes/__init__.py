"""Runs with a name. A recipe is a function that returns a configuration; its docstring says command, cost and result.

Data and tokenizer paths are the user's: a recipe leaves them empty and the command line gives them (those of demos are
the embedded dataset's).
"""

from __future__ import annotations

from collections.abc import Callable

from bevt.config import AnyConfig, Config, ContrastConfig, FinetuneConfig, VideoMAEConfig
from bevt.recipes.contrast import image_contrastive
from bevt.recipes.demo import (
    demo_image_stage,
    demo_joint_stage,
    timesformer_demo_finetune,
    timesformer_demo_image,
    timesformer_demo_joint,
    videomae_demo,
    videomae_demo_finetune,
    vivit_demo,
)
from bevt.recipes.finetune import diving48, image_supervised, k400, probe_k400, ssv2
from bevt.recipes.pretrain import image_stage, joint_frames, joint_stage, joint_vq, mask_ablation, video_only
from bevt.recipes.replicate import replicate_finetune, replicate_image_stage, replicate_joint_stage
from bevt.recipes.timesformer import (
    timesformer_diving48,
    timesformer_image_stage,
    timesformer_joint_stage,
    timesformer_k400,
    timesformer_ssv2,
)
from bevt.recipes.videomae import (
    videomae_k400,
    videomae_k400_large,
    videomae_pretrain_k400,
    videomae_pretrain_k400_large,
    videomae_pretrain_ssv2,
    videomae_pretrain_ssv2_large,
    videomae_ssv2,
    videomae_ssv2_large,
)
from bevt.recipes.vivit import vivit_k400, vivit_k400_factorised, vivit_k400_large, vivit_ssv2

BEVT_RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        image_stage,
        joint_stage,
        joint_frames,
        joint_vq,
        video_only,
        mask_ablation,
        timesformer_image_stage,
        timesformer_joint_stage,
        demo_image_stage,
        demo_joint_stage,
        replicate_image_stage,
        replicate_joint_stage,
        timesformer_demo_image,
        timesformer_demo_joint,
    )
}
"""Of BEVT's pretraining, by name."""

VIDEOMAE_RECIPES: dict[str, Callable[[], VideoMAEConfig]] = {
    f.__name__: f
    for f in (
        videomae_pretrain_k400,
        videomae_pretrain_k400_large,
        videomae_pretrain_ssv2,
        videomae_pretrain_ssv2_large,
        videomae_demo,
    )
}
"""Of VideoMAE's pretraining, by name."""

RECIPES: dict[str, Callable[[], Config | VideoMAEConfig]] = {**BEVT_RECIPES, **VIDEOMAE_RECIPES}
"""Of pretraining, by name."""

FINETUNE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    f.__name__: f
    for f in (
        k400,
        ssv2,
        diving48,
        image_supervised,
        probe_k400,
        videomae_k400,
        videomae_k400_large,
        videomae_ssv2,
        videomae_ssv2_large,
        vivit_k400,
        vivit_k400_factorised,
        vivit_k400_large,
        vivit_ssv2,
        timesformer_k400,
        timesformer_ssv2,
        timesformer_diving48,
        vivit_demo,
        videomae_demo_finetune,
        timesformer_demo_finetune,
        replicate_finetune,
    )
}
"""Of learning classes, by name."""

CONTRAST_RECIPES: dict[str, Callable[[], ContrastConfig]] = {f.__name__: f for f in (image_contrastive,)}
"""Of contrastive learning, by name."""

ALL_RECIPES: dict[str, Callable[[], AnyConfig]] = {**RECIPES, **FINETUNE_RECIPES, **CONTRAST_RECIPES}
"""Of every command, by name."""
