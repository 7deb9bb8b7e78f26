"""What is measured: ops, cases, dtypes, batches, and the limits of known chips. Data only.

A case is written for one clip or image; its batch depends on the device. Letters: D x H x W token map, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from bevt_kernels.testing import ArgmaxCase, ConvCase, LinearCase, LossCase, WindowCase

from bevt.config import Size
from bevt.devices import DEVICES

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""Of activations, by device."""

QUANTITIES = ("forward", "backward", "forward+backward", "forward+backward, frozen table")
"""The first three are parts of one training step: forward is a training forward, or all that there is. The last is for
implementations only, and shows what the table's gradient costs them."""


@dataclass(frozen=True)
class StepCase:
    """Forward and backward of patch embedding and Video Swin on clips of (3, frames, side, side)."""

    batch: int
    size: Size
    frames: int = 16
    side: int = 224


@dataclass(frozen=True)
class HeadCase:
    """Decoder, last norm, head and loss of the clips' stream, from the encoder's last two maps; the joint masks."""

    batch: int
    size: Size
    classes: int = 8192


@dataclass(frozen=True)
class PretrainCase:
    """A joint micro-batch, tokenizer included and optimizer not: `batch` times a clip and `images` images."""

    batch: int
    size: Size
    images: int
    frames: int = 16
    side: int = 224
    tokenizer_width: int = 256


Case = WindowCase | LossCase | ArgmaxCase | LinearCase | ConvCase | StepCase | HeadCase | PretrainCase

PER_CLIP = ("batch", "rows", "slots", "used")
"""Fields of a case that grow with the number of clips."""


@dataclass(frozen=True)
class Entry:
    """One case of the registry."""

    group: str
    """What belongs together on the command line, and runs in one process on a GPU."""
    case: Case
    batch: dict[str, int] = field(default_factory=lambda: {"cuda": 8})
    """Clips or images by device; a device that is missing is not measured."""


@dataclass(frozen=True)
class Op:
    """One benchmarked op."""

    cases: dict[str, Entry]
    tests: tuple[str, ...]
    """What must be green before a time is printed: patterns from the repository's root."""


def _stages(heads: int, depth: int, window: tuple[int, int, int], table: tuple[int, int, int]) -> dict[str, WindowCase]:
    """The four stages at 224 x 224, unshifted and shifted in turns as blocks are, clipped as the model clips."""
    cases = {}
    for stage in range(1, 5):
        side = 112 >> stage
        grid = (depth, side, side)
        d, h, w = (0 if size <= win else t // 2 for size, win, t in zip(grid, window, table))
        case = WindowCase(1, grid, window, (0, 0, 0), table, heads=heads << (stage - 1), head_dim=32)
        cases[f"stage {stage}"] = case
        if any((d, h, w)):
            cases[f"stage {stage} shifted"] = replace(case, shift=(d, h, w))
    return cases


def _group(group: str, cases: dict[str, WindowCase], **batch: int) -> dict[str, Entry]:
    return {f"{group} {name}": Entry(group, case, batch) for name, case in cases.items()}


VIDEO = (8, 7, 7)
IMAGE = (1, 7, 7)
LONG = (16, 7, 7)

WINDOW_TESTS, LOSS_TESTS, ARGMAX_TESTS, LINEAR_TESTS, CONV_TESTS = (
    f"tests/kernels/test_{op}.py"
    for op in ("window_attention*", "masked_linear_cross_entropy*", "linear_argmax", "linear", "conv3x3")
)

CLIP = LossCase(rows=3136, channels=1024, classes=8192, slots=1568, used=1176)
"""16 frames of 14 x 14 positions under the joint recipe's masks: tubes hide 1176 on average, at most 1568."""
FULL = LossCase(rows=1568, channels=1024, classes=8192, slots=1568, used=1568)

OPS = {
    "window_attention": Op(
        {
            "cpu target": Entry("cpu", WindowCase(1, (8, 28, 28), VIDEO, heads=4, head_dim=32), {"cpu": 1}),
            "cpu target shifted": Entry(
                "cpu", WindowCase(1, (8, 28, 28), VIDEO, (0, 3, 3), heads=4, head_dim=32), {"cpu": 1}
            ),
            **_group("swin-b video", _stages(4, 8, VIDEO, VIDEO), cuda=8),
            **_group("swin-b image", _stages(4, 1, IMAGE, VIDEO), cuda=64),
            **_group("784 tokens", {k: v for k, v in _stages(4, 16, LONG, LONG).items() if "1" in k}, cuda=4),
            **_group("swin-b 32 frames", _stages(4, 16, VIDEO, VIDEO), cuda=8),
            **_group("swin-t video", _stages(3, 8, VIDEO, VIDEO), cpu=1, cuda=8),
        },
        (WINDOW_TESTS,),
    ),
    "video_swin_step": Op(
        {"swin_t encoder step": Entry("encoder step", StepCase(1, "tiny"), {"cpu": 1, "cuda": 8})},
        (WINDOW_TESTS, LINEAR_TESTS),
    ),
    "masked_linear_cross_entropy": Op(
        {
            "cpu target": Entry("cpu", CLIP, {"cpu": 1}),
            "cpu 8 clips": Entry("cpu", CLIP, {"cpu": 8}),
            "swin-b 8 clips": Entry("swin-b", FULL, {"cuda": 8}),
            "swin-b 8 clips, recipe masks": Entry("swin-b", CLIP, {"cuda": 8}),
            "vq": Entry("vq", replace(CLIP, classes=512), {"cpu": 1, "cuda": 8}),
        },
        (LOSS_TESTS,),
    ),
    "linear_argmax": Op(
        {
            "dalle 16 frames": Entry("dalle", ArgmaxCase(3136, 2048, 8192), {"cpu": 1}),
            "dalle 128 frames": Entry("dalle", ArgmaxCase(3136, 2048, 8192), {"cuda": 8}),
            "vq": Entry("vq", ArgmaxCase(3136, 16, 512), {"cpu": 1, "cuda": 8}),
        },
        (ARGMAX_TESTS,),
    ),
    "linear": Op(
        {
            f"swin-t {name}": Entry("swin-t", LinearCase(*sizes), {"cpu": 1})
            for name, sizes in {
                "stage 1 qkv": (25088, 96, 288),
                "stage 1 fc1": (25088, 96, 384),
                "stage 1 fc2": (25088, 384, 96),
                "stage 3 fc1": (1568, 384, 1536),
                "stage 4 fc2": (392, 3072, 768),
            }.items()
        },
        (LINEAR_TESTS,),
    ),
    "conv3x3": Op(
        {
            f"dalle {name}": Entry("dalle", ConvCase(*sizes), {"cpu": 1})
            for name, sizes in {
                "group 1, 2 frames": (2, 112, 112, 256, 64),
                "group 2, 5 frames": (5, 56, 56, 128, 128),
                "group 3, 10 frames": (10, 28, 28, 1024, 256),
                "group 4, 20 frames": (20, 14, 14, 2048, 512),
            }.items()
        },
        (CONV_TESTS,),
    ),
    "masked_head": Op(
        # Two clips: their masks cover 0.372 of the positions, the recipe's 0.375 on average (one clip's: 0.44).
        {"swin-b": Entry("swin-b", HeadCase(1, "base"), {"cpu": 2, "cuda": 8})},
        (LOSS_TESTS, LINEAR_TESTS),
    ),
    "pretrain_step": Op(
        {
            "swin-b, 1 clip + 2 images": Entry("micro-batch", PretrainCase(1, "base", 2), {"cpu": 1}),
            "swin-b, 4 clips + 32 images": Entry("micro-batch", PretrainCase(1, "base", 8), {"cuda": 4}),
        },
        (WINDOW_TESTS, LOSS_TESTS, ARGMAX_TESTS, LINEAR_TESTS, CONV_TESTS),
    ),
}

GPU_ORDER = (
    ("masked_linear_cross_entropy", "swin-b"),
    ("window_attention", "swin-b video"),
    ("pretrain_step", "micro-batch"),
    ("linear_argmax", "dalle"),
    ("masked_head", "swin-b"),
    ("video_swin_step", "encoder step"),
    ("window_attention", "swin-b image"),
    ("window_attention", "784 tokens"),
    ("window_attention", "swin-b 32 frames"),
    ("window_attention", "swin-t video"),
    ("masked_linear_cross_entropy", "vq"),
    ("linear_argmax", "vq"),
)
"""(op, group) in order of worth, for a machine that is lent for minutes."""


@dataclass(frozen=True)
class Limit:
    """What a chip was measured to do, by its largest matrix product and device copy."""

    flops: dict[torch.dtype, float]
    """FLOP/s by dtype."""
    bandwidth: float
    """Bytes read and written a second."""


LIMITS = {
    name: Limit({torch.bfloat16: device.bfloat16}, device.bandwidth)
    for name, device in DEVICES.items()
    if device.source == "measured"
}
"""By `torch.cuda.get_device_name()`; a chip that is not here has no "% of limit"."""
