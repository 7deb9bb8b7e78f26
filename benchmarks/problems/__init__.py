"""A registry case made runnable: inputs, contestants, the truth, and the work that it takes at least."""

from __future__ import annotations

from benchmarks.problems.base import Contestant, Leaves, Problem, Work
from benchmarks.problems.models import MaskedHead, VideoSwinStep
from benchmarks.problems.ops import Conv3x3, Linear, LinearArgmax, MaskedLinearCrossEntropy, WindowAttention
from benchmarks.problems.train import TrainingStep
from benchmarks.problems.yardstick import VideoMAEStep, ViTStep
from benchmarks.registry import grown

__all__ = [
    "KINDS",
    "Contestant",
    "Conv3x3",
    "Leaves",
    "Linear",
    "LinearArgmax",
    "MaskedHead",
    "MaskedLinearCrossEntropy",
    "Problem",
    "TrainingStep",
    "ViTStep",
    "VideoMAEStep",
    "VideoSwinStep",
    "WindowAttention",
    "Work",
    "build",
]

KINDS: dict[str, type[Problem]] = {
    "window_attention": WindowAttention,
    "video_swin_step": VideoSwinStep,
    "masked_linear_cross_entropy": MaskedLinearCrossEntropy,
    "linear_argmax": LinearArgmax,
    "linear": Linear,
    "conv3x3": Conv3x3,
    "masked_head": MaskedHead,
    "train_step": TrainingStep,
    "videomae_step": VideoMAEStep,
    "vivit_step": ViTStep,
    "timesformer_step": ViTStep,
}


def build(op: str, case: str, device: str) -> Problem:
    """The problem of a registry case. Raises KeyError where it has no batch for the device."""
    return KINDS[op](grown(op, case, device), device)
