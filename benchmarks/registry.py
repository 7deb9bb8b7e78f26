"""What is measured: ops, cases, dtypes, batches, and the parts of a whole run. Data only.

A case is written for one clip or image; its batch depends on the device. Letters: D x H x W token map, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from bevt_kernels.testing import ArgmaxCase, ConvCase, LinearCase, LossCase, WindowCase

from bevt.config import Size

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""Of activations, by device."""

QUANTITIES = ("forward", "backward", "forward+backward", "forward+backward, frozen table", "step")
"""The first three are parts of one training step: forward is a training forward, or all that there is. The fourth is
for implementations only, and shows what the table's gradient costs them. "step" is a whole one, update included."""


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
class TrainCase:
    """A step of the joint recipe, update included: `batch` clips and `images` images as one micro-batch."""

    batch: int
    size: Size
    images: int
    tokenizer: Literal["dalle", "vq"]
    """`dalle`: the recipe's, at its full size with random weights; `vq`: this project's."""
    frames: int = 16
    side: int = 224


@dataclass(frozen=True)
class VideoMAECase:
    """Forward and backward of VideoMAE's pretraining on clips of (frames, 3, side, side), nine of ten tubes masked."""

    batch: int
    size: Literal["tiny", "base"] = "base"
    frames: int = 16
    side: int = 224


@dataclass(frozen=True)
class ViTCase:
    """Forward and backward of classifying clips of (frames, 3, side, side)."""

    batch: int
    kind: Literal["vivit_1", "timesformer"]
    frames: int
    size: Literal["tiny", "base"] = "base"
    side: int = 224


Case = (
    WindowCase
    | LossCase
    | ArgmaxCase
    | LinearCase
    | ConvCase
    | StepCase
    | HeadCase
    | TrainCase
    | VideoMAECase
    | ViTCase
)

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
    compiled: tuple[str, ...] = ("cpu", "cuda")
    """Devices on which rivals take part that must be compiled for each case, which takes them 5 to 30 seconds."""


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
    """Rivals that are compiled take part in two stages of the 16-frame clips alone, of Swin-T on CPUs and of Swin-B on
    GPUs: compilation is most of a GPU run's time.
    """
    where = {"swin-t video": ("cpu",), "swin-b video": ("cuda",)}.get(group, ())
    return {
        f"{group} {name}": Entry(group, case, batch, where if name[6] in "13" else ()) for name, case in cases.items()
    }


VIDEO = (8, 7, 7)
IMAGE = (1, 7, 7)
LONG = (16, 7, 7)

WINDOW_TESTS, LOSS_TESTS, ARGMAX_TESTS, LINEAR_TESTS, CONV_TESTS = (
    f"tests/kernels/test_{op}.py"
    for op in ("window_attention*", "masked_linear_cross_entropy*", "linear_argmax", "linear", "conv3x3")
)

VIT_TESTS = "tests/models/test_vit.py"
TOKENIZER_TESTS = (ARGMAX_TESTS, CONV_TESTS)

CLIP = LossCase(rows=3136, channels=1024, classes=8192, slots=1568, used=1176)
"""16 frames of 14 x 14 positions under the joint recipe's masks: tubes hide 1176 on average, at most 1568."""
FULL = LossCase(rows=1568, channels=1024, classes=8192, slots=1568, used=1568)

TARGET = WindowCase(1, (8, 28, 28), VIDEO, heads=4, head_dim=32)
"""Stage 2 of Swin-B at half its heads: what the CPU's target is for (16 windows x 4 heads)."""


def _memory() -> dict[str, Entry]:
    """Peak memory against the batch, and against the window at one map: heads and maps of Swin-T's second stage."""
    clip = WindowCase(1, (8, 28, 28), VIDEO, (0, 3, 3), heads=6, head_dim=32)
    batches = {f"batch {n}": Entry("memory", clip, {"cpu": n, "cuda": 8 * n}, ()) for n in (1, 2, 4)}
    windows = {
        f"window {depth} x 7 x 7": Entry(
            "memory", WindowCase(1, (16, 28, 28), (depth, 7, 7), heads=6, head_dim=32), {"cpu": 1, "cuda": 8}, ()
        )
        for depth in (2, 4, 8, 16)
    }
    return batches | windows


def _scaling() -> dict[str, Entry]:
    """Cost against frames and against resolution; 16 frames of 224 x 224 is "encoder step"."""
    batch = {"cpu": 1, "cuda": 8}
    frames = {f"swin-t {n} frames": Entry("scaling", StepCase(1, "tiny", frames=n), batch) for n in (8, 32)}
    sides = {f"swin-t side {n}": Entry("scaling", StepCase(1, "tiny", side=n), batch) for n in (160, 256)}
    return frames | sides


OPS = {
    "window_attention": Op(
        {
            "cpu target": Entry("cpu", TARGET, {"cpu": 1}),
            "cpu target shifted": Entry("cpu", replace(TARGET, shift=(0, 3, 3)), {"cpu": 1}),
            **_group("swin-b video", _stages(4, 8, VIDEO, VIDEO), cuda=8),
            **_group("swin-b image", _stages(4, 1, IMAGE, VIDEO), cuda=64),
            **_group("swin-b 32 frames", _stages(4, 16, VIDEO, VIDEO), cuda=8),
            **_group("swin-t video", _stages(3, 8, VIDEO, VIDEO), cpu=1, cuda=8),
            **_group("swin-t image", _stages(3, 1, IMAGE, VIDEO), cpu=8, cuda=64),
            **_group("swin-t 32 frames", _stages(3, 16, VIDEO, VIDEO), cuda=8),
            **_group("784 tokens", {k: v for k, v in _stages(4, 16, LONG, LONG).items() if "1" in k}, cuda=4),
            **_memory(),
        },
        (WINDOW_TESTS,),
    ),
    "video_swin_step": Op(
        {
            "swin_t encoder step": Entry("encoder step", StepCase(1, "tiny"), {"cpu": 1, "cuda": 8}),
            **_scaling(),
        },
        (WINDOW_TESTS, LINEAR_TESTS),
    ),
    "masked_linear_cross_entropy": Op(
        {
            "cpu target": Entry("cpu", CLIP, {"cpu": 1}),
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
    "train_step": Op(
        {
            "swin-t, dalle": Entry("swin-t", TrainCase(1, "tiny", 8, "dalle"), {"cpu": 1}),
            "swin-t, vq": Entry("swin-t vq", TrainCase(1, "tiny", 8, "vq"), {"cpu": 1}),
            "swin-b, dalle": Entry("swin-b", TrainCase(1, "base", 8, "dalle")),
        },
        (WINDOW_TESTS, LOSS_TESTS, ARGMAX_TESTS, LINEAR_TESTS, CONV_TESTS),
    ),
    "videomae_step": Op({"base": Entry("base", VideoMAECase(1), {"cpu": 1, "cuda": 8})}, (LINEAR_TESTS, VIT_TESTS)),
    # No GPU case: `suite.SECONDS` has no time left for them.
    "vivit_step": Op({"base": Entry("base", ViTCase(1, "vivit_1", 32), {"cpu": 1})}, (LINEAR_TESTS, VIT_TESTS)),
    "timesformer_step": Op(
        {"base": Entry("base", ViTCase(1, "timesformer", 8), {"cpu": 1})}, (LINEAR_TESTS, VIT_TESTS)
    ),
}


def grown(op: str, case: str, device: str) -> Case:
    """A case at its batch for the device. Raises KeyError where it has none."""
    entry = OPS[op].cases[case]
    n = entry.batch[device]
    return replace(
        entry.case, **{name: n * getattr(entry.case, name) for name in PER_CLIP if hasattr(entry.case, name)}
    )


class Part(NamedTuple):
    """One process of a whole run."""

    op: str
    """Of OPS, or another command of `benchmarks`."""
    group: str
    """Of the op's cases; "" for another command."""
    seconds: float
    """It takes about; measured on a CPU, two cores with AVX-512, estimated on a GPU."""

    @property
    def name(self) -> str:
        """As `--part` knows it."""
        return f"{self.op}: {self.group}" if self.group else self.op


TESTS = {"cpu": 105.0, "cuda": 200.0}
"""Seconds that the ops' tests take about, which come first; measured and estimated as those of a `Part`."""
TEST_SECONDS = {"cpu": 1200.0, "cuda": 300.0}
"""After which they count as red."""

PARTS = {
    "cpu": (
        Part("train_step", "swin-t", 165),
        Part("window_attention", "cpu", 30),
        Part("video_swin_step", "encoder step", 65),
        Part("masked_linear_cross_entropy", "cpu", 35),
        Part("linear", "swin-t", 30),
        Part("conv3x3", "dalle", 30),
        Part("linear_argmax", "dalle", 35),
        Part("window_attention", "swin-t video", 110),
        Part("masked_head", "swin-b", 65),
        Part("window_attention", "swin-t image", 35),
        Part("masked_linear_cross_entropy", "vq", 20),
        Part("linear_argmax", "vq", 15),
        Part("window_attention", "memory", 75),
        Part("videomae_step", "base", 60),
        Part("timesformer_step", "base", 120),
        Part("train_step", "swin-t vq", 85),
        Part("tokenizer", "", 50),
        Part("data", "", 65),
        Part("video_swin_step", "scaling", 265),
        Part("vivit_step", "base", 1000),
    ),
    "cuda": (
        Part("masked_linear_cross_entropy", "swin-b", 22),
        Part("window_attention", "swin-b video", 55),
        Part("window_attention", "swin-b image", 12),
        Part("window_attention", "swin-b 32 frames", 12),
        Part("train_step", "swin-b", 150),  # compiled for the inputs that are judged and for those that are timed
        Part("linear_argmax", "dalle", 8),
        Part("masked_head", "swin-b", 8),
        Part("video_swin_step", "encoder step", 10),
        Part("window_attention", "swin-t video", 12),
        Part("window_attention", "swin-t image", 12),
        Part("window_attention", "swin-t 32 frames", 12),
        Part("window_attention", "memory", 8),
        Part("video_swin_step", "scaling", 15),
        Part("masked_linear_cross_entropy", "vq", 8),
        Part("linear_argmax", "vq", 4),
        Part("videomae_step", "base", 10),
        Part("data", "", 10),
        Part("window_attention", "784 tokens", 6),
    ),
}
"""In order of worth, for a machine that is lent for minutes."""
