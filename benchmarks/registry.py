"""What is measured: ops, cases, dtypes, batches, and the limits of known chips. Data only.

A case is written for one clip or image; its batch depends on the device. Letters: D x H x W token map, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from bevt_kernels.testing import WindowCase

from bevt.config import Size

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""Of activations, by device."""

QUANTITIES = ("forward", "backward", "forward+backward", "forward+backward, frozen table")
"""The first three are parts of one training step: forward is a training forward. The last is for implementations only,
and shows what the table's gradient costs them."""


@dataclass(frozen=True)
class StepCase:
    """Forward and backward of patch embedding and Video Swin on clips of (3, frames, side, side)."""

    batch: int
    size: Size
    frames: int = 16
    side: int = 224


@dataclass(frozen=True)
class Entry:
    """One case of the registry."""

    group: str
    """What belongs together on the command line, and runs in one process on a GPU."""
    case: WindowCase | StepCase
    batch: dict[str, int] = field(default_factory=lambda: {"cuda": 8})
    """Clips or images by device; a device that is missing is not measured."""


@dataclass(frozen=True)
class Op:
    """One benchmarked op."""

    cases: dict[str, Entry]
    tests: str
    """What must be green before a time is printed: a pattern from the repository's root."""


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
        "tests/kernels/test_window_attention*.py",
    ),
    "video_swin_step": Op(
        {"swin_t encoder step": Entry("encoder step", StepCase(1, "tiny"), {"cpu": 1, "cuda": 8})},
        "tests/kernels/test_window_attention*.py",
    ),
}

GPU_ORDER = (
    ("window_attention", "swin-b video"),
    ("video_swin_step", "encoder step"),
    ("window_attention", "swin-b image"),
    ("window_attention", "784 tokens"),
    ("window_attention", "swin-b 32 frames"),
    ("window_attention", "swin-t video"),
)
"""(op, group) in order of worth, for a machine that is lent for minutes."""


@dataclass(frozen=True)
class Limit:
    """What a chip was measured to do, by its largest matrix product and device copy."""

    flops: dict[torch.dtype, float]
    """FLOP/s by dtype."""
    bandwidth: float
    """Bytes read and written a second."""


LIMITS = {"NVIDIA H200": Limit({torch.bfloat16: 790e12}, 4.3e12)}
"""By `torch.cuda.get_device_name()`; a chip that is not here has no "% of limit"."""
