"""Runs with a name. A recipe is a function that returns a configuration; its docstring says command, cost and result.

Data and tokenizer paths are the user's: a recipe leaves them empty and the command line gives them.
"""

from __future__ import annotations

from collections.abc import Callable

from bevt.config import AnyConfig, Config, ContrastConfig, FinetuneConfig
from bevt.recipes.contrast import image_contrastive
from bevt.recipes.demo import demo_image_stage, demo_joint_stage
from bevt.recipes.finetune import diving48, image_supervised, k400, probe_k400, ssv2
from bevt.recipes.pretrain import image_stage, joint_frames, joint_stage, joint_vq, mask_ablation, video_only
from bevt.recipes.replicate import replicate_finetune, replicate_image_stage, replicate_joint_stage

RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        image_stage,
        joint_stage,
        joint_frames,
        joint_vq,
        video_only,
        mask_ablation,
        demo_image_stage,
        demo_joint_stage,
        replicate_image_stage,
        replicate_joint_stage,
    )
}
"""Of pretraining, by name."""

FINETUNE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    f.__name__: f for f in (k400, ssv2, diving48, image_supervised, probe_k400, replicate_finetune)
}
"""Of learning classes, by name."""

CONTRAST_RECIPES: dict[str, Callable[[], ContrastConfig]] = {f.__name__: f for f in (image_contrastive,)}
"""Of contrastive learning, by name."""

ALL_RECIPES: dict[str, Callable[[], AnyConfig]] = {**RECIPES, **FINETUNE_RECIPES, **CONTRAST_RECIPES}
"""Of every command, by name."""
