"""What a run is: one tree of frozen dataclasses, and nothing but the standard library.

A recipe (`bevt.recipes`) returns a `Config`; the command line overrides single keys of it; a checkpoint stores it as
plain data. `from_dict` is strict: a key that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

Impl = Literal["auto", "reference", "native", "triton"]


class UserError(ValueError):
    """Something that the person who gave the command can mend; the message says what, where and how."""


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key and what to do."""


class Pixels(NamedTuple):
    """Mean and standard deviation by which levels 0..255 of red, green and blue are normalised."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def grey(cls, mean: float, std: float) -> Pixels:
        """The same for all three, given for pixels in 0..1."""
        return cls((255 * mean,) * 3, (255 * std,) * 3)


IMAGENET = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@dataclass(frozen=True)
class ModelConfig:
    """The Video Swin encoder and the two streams around it (paper section 3; spec in `bevt/models`)."""

    embed_dim: int = 128
    """Channels C of the first stage; stage i has C * 2**i."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    """Blocks in each stage."""
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    """Attention heads in each stage; C / heads is the head dimension."""
    window_size: tuple[int, int, int] = (8, 7, 7)
    """Attention window in tokens (time, height, width); clipped to the map where the map is smaller."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the block's width."""
    drop_path: float = 0.3
    """Stochastic depth of the last block; it rises linearly from 0 at the first."""
    quirks: Literal["clean", "official"] = "clean"
    """`official` repeats accidents of the official code (`bevt/models/video_swin.py`); its tube: `clip_mask.wrap`."""
    attention_impl: Impl = "auto"
    """Implementation of `bevt_kernels.window_attention`."""
    loss_impl: Impl = "auto"
    """Implementation of `bevt_kernels.masked_linear_cross_entropy`."""
    linear_impl: Impl = "auto"
    """Implementation of `bevt_kernels.linear`: native (float32 on CPUs) or reference, torch's own."""

    @property
    def tubelet(self) -> int:
        """Frames in a token."""
        return 2

    @property
    def channels(self) -> int:
        """Of the last stage: what a head reads."""
        return 8 * self.embed_dim

    @property
    def multiple(self) -> int:
        """Of which a crop's side in pixels must be one: patch 4, three mergings."""
        return 32

    @property
    def pixels(self) -> Pixels:
        """How levels are normalised: ImageNet's, as the official configuration has them."""
        return IMAGENET

    @property
    def branches(self) -> int:
        """Residual branches in a block."""
        return 2

    @property
    def drop_path_rates(self) -> list[float]:
        """Probability with which each block's branches are dropped: from 0 up to `drop_path`, linearly."""
        return _rising(self.drop_path, sum(self.depths))


def _rising(most: float, blocks: int) -> list[float]:
    return [most * i / max(blocks - 1, 1) for i in range(blocks)]


ViTKind = Literal["videomae", "timesformer", "vivit_1", "vivit_2", "vivit_3", "vivit_4"]


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer for video (`bevt/models/vit.py`)."""

    kind: ViTKind = "videomae"
    """`videomae` (arXiv 2203.12602): joint attention, fixed positions, mean of all tokens. `timesformer` (2102.05095):
    attention over time, then over space, in each block. `vivit_1` to `vivit_4` (2103.15691): its models, joint;
    factorised encoder; factorised self-attention; factorised dot-product attention."""
    embed_dim: int = 768
    """Channels."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 12
    """Attention heads; channels / heads is the head dimension."""
    patch: int = 16
    """Side of a token in pixels."""
    tubelet: int = 2
    """Frames in a token; 1 of a `timesformer`."""
    temporal_depth: int = 4
    """`vivit_2` alone: blocks that attend over time, behind the `depth` that attend over space."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the channels."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it rises linearly from 0 at the first."""
    inflation: Literal["central", "average"] = "central"
    """What an image model's patch embedding becomes over the frames of a token: that of the central frame, zero in the
    others; or divided over all."""
    temporal_init: Literal["copy", "zero"] = "copy"
    """`vivit_3` alone: attention over time starts as a copy of the image model's (scenic's way), or with a last linear
    layer of zero (the paper's, section 3.4, has all of its weights zero)."""
    attention_impl: Literal["auto", "sdpa", "xformers"] = "auto"
    """Who computes attention: PyTorch's scaled_dot_product_attention (`auto` too), or xformers on a GPU."""
    loss_impl: Impl = "auto"
    """Implementation of `bevt_kernels.masked_linear_cross_entropy`, of BEVT alone."""
    linear_impl: Impl = "auto"
    """Implementation of `bevt_kernels.linear`: native (float32 on CPUs) or reference, torch's own."""

    @property
    def channels(self) -> int:
        """What a head reads."""
        return self.embed_dim

    @property
    def multiple(self) -> int:
        """Of which a crop's side in pixels must be one."""
        return self.patch

    @property
    def pixels(self) -> Pixels:
        """How levels are normalised: as each family's code does."""
        if self.kind == "videomae":
            return IMAGENET
        return Pixels.grey(0.45, 0.225) if self.kind == "timesformer" else Pixels.grey(0.5, 0.5)

    @property
    def branches(self) -> int:
        """Residual branches in a block."""
        return 3 if self.kind in ("timesformer", "vivit_3") else 2

    @property
    def drop_path_rates(self) -> list[float]:
        """Probability with which each block's branches are dropped; of `vivit_2` those over time rise by themselves."""
        over_time = self.temporal_depth if self.kind == "vivit_2" else 0
        return _rising(self.drop_path, self.depth) + _rising(self.drop_path, over_time)

    @property
    def quirks(self) -> Literal["clean"]:
        """Accidents of others' code that are repeated: none."""
        return "clean"


AnyModel = ModelConfig | ViTConfig


Size = Literal["tiny", "small", "base", "large", "huge"]

M = TypeVar("M", ModelConfig, ViTConfig, "ModelConfig | ViTConfig")


def plain(model: M) -> M:
    """`model` with every op in plain PyTorch."""
    if isinstance(model, ViTConfig):
        return dataclasses.replace(model, attention_impl="sdpa", loss_impl="reference", linear_impl="reference")
    return dataclasses.replace(model, attention_impl="reference", loss_impl="reference", linear_impl="reference")


SIZES: dict[Size, ModelConfig] = {
    "tiny": ModelConfig(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path=0.1),
    "small": ModelConfig(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path=0.1),
    "base": ModelConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": ModelConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
"""The published Video Swin models (arXiv 2106.13230, section 3.3), with the drop path of their Kinetics-400
configurations from ImageNet-1K; L, which has none, takes B's."""


VIT_SIZES: dict[str, tuple[int, int, int]] = {
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Channels, blocks and heads of the published vision transformers (arXiv 2010.11929, table 1; small: 2012.12877)."""


def resized(model: M, size: Size) -> M:
    """`model` with the channels, depths and heads of a published size, and of a Video Swin at most its drop path.

    Raises ConfigError where no model of its kind has that size.
    """
    if isinstance(model, ViTConfig):
        if size not in VIT_SIZES:
            raise ConfigError(f"--size {size} is of no vision transformer; there are {', '.join(VIT_SIZES)}")
        embed_dim, depth, num_heads = VIT_SIZES[size]
        return dataclasses.replace(model, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    if size not in SIZES:
        raise ConfigError(f"--size {size} is of no Video Swin; there are {', '.join(SIZES)}")
    named = SIZES[size]
    return dataclasses.replace(
        model,
        embed_dim=named.embed_dim,
        depths=named.depths,
        num_heads=named.num_heads,
        drop_path=min(model.drop_path, named.drop_path),
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """The frozen tokenizer whose codes are the targets."""

    kind: Literal["dalle", "vq"] = "dalle"
    """`dalle`: the published dVAE encoder, 8192 codes. `vq`: one trained by `bevt tokenizer fit`."""
    path: str = ""
    """`dalle`: `encoder.pkl`, or its weights as `.safetensors`. `vq`: what `bevt tokenizer fit` wrote."""
    impl: Impl = "auto"
    """Implementation of `bevt_kernels.linear_argmax`; `reference` is that of `conv3x3` too, which else is `auto`."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the encoder's convolutions. `auto`: float16 on CUDA, as the published encoder computes; else float32."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Whether torch.compile fuses what surrounds the convolutions. `auto`: yes for `dalle` on CUDA, else no."""
    cache: str = ""
    """Folder that keeps the codes of the fixed views (`data.views`) for later epochs and runs; empty: none."""


@dataclass(frozen=True)
class MaskConfig:
    """One stream's mask on the token grid (paper section 3.2 and Table 9)."""

    kind: Literal["block", "tube", "random_3d", "frame_diff", "random_frame", "random_tube"] = "tube"
    """`block` is the image stream's; the others are the video stream's. `random_tube` is VideoMAE's, the only one whose
    count does not vary: of all frames the same patches, drawn uniformly."""
    ratio: float = 0.5
    """Most patches that one frame's block mask covers, over the patches of a frame (98 of 196)."""
    min_block: int = 16
    """Fewest patches of one block."""
    min_aspect: float = 0.3
    """Least height over width of a block; the largest is its inverse."""
    tube: tuple[float, float] = (0.5, 1.0)
    """Shortest and longest tube, over the depth of the token grid."""
    wrap: bool = False
    """Let a tube that runs over the end continue at the first frame, as the official code does."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are cut (spec: BEVT's joint stage)."""

    clips: str = ""
    """Videos: a folder, tar archive, list of `path label` lines, Kinetics csv, SSv2 or Diving48 json, or manifest of
    `bevt data index`; empty: no video stream."""
    images: str = ""
    """Images: a folder, tar archive, list of `path label` lines or manifest; where `image_source` is `frames`, videos,
    as for `clips`; empty: no image stream."""
    image_source: Literal["pictures", "frames"] = "pictures"
    """What `images` and `val_images` hold. `frames`: videos; each visit takes one frame, drawn uniformly from the video
    (held out: its middle one)."""
    val_clips: str = ""
    """Held-out videos, scored at the end of a run; empty: none."""
    val_images: str = ""
    """Held-out images, likewise."""
    frames: int = 16
    """Frames in a clip."""
    stride: int = 8
    """Source frames from one frame of the clip to the next; a source that is too short loops."""
    sampling: Literal["dense", "segments"] = "dense"
    """`dense`: frames `stride` apart. `segments`: one from each of `frames` equal parts of the video (SSv2)."""
    short_side: tuple[int, int] = (256, 320)
    """The short side is resized (bicubic) to a length drawn uniformly from this range, in pixels."""
    crop: int = 224
    """Side of the square random crop, in pixels; a multiple of 32, of a vision transformer of its patch."""
    crop_area: tuple[float, float] = (0.0, 0.0)
    """RandomResizedCrop in place of `short_side` in training: the crop covers a share of the frame's area that is drawn
    uniformly from this range, at an aspect of 3/4 to 4/3. (0, 0): not so."""
    crop_scales: tuple[float, ...] = ()
    """Multi-scale crop (TSN, arXiv 1608.00859) in place of `short_side` in training: height and width are drawn from
    these shares of the short side, neighbours in the list at most, the place from 13 fixed ones. Empty: not so."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.4
    """Image stream only: brightness, contrast and saturation factors are drawn from 1 - jitter .. 1 + jitter."""
    views: int = 0
    """0: each visit cuts a sample anew. V > 0: each file has V fixed views (frames, crop, flip, jitter), of which each
    visit takes one, with a new mask: what a token cache needs."""
    backend: Literal["auto", "pyav", "dali", "torchcodec"] = "auto"
    """Decoder of videos and images; `auto` times those that can read the files and takes the fastest."""
    workers: int = 4
    """Decoding processes (`dali`: threads); 0 decodes in the training process. The samples do not depend on it."""
    prefetch: int = 2
    """Micro-batches that each worker (`dali`: the pipeline) keeps ready."""
    worker_death: Literal["restart", "stop"] = "restart"
    """A decoding process that dies (killed, out of memory) is named; then `restart` decodes what it had begun anew,
    unless the same micro-batch kills another, and `stop` ends the run (one of one process with a checkpoint)."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    kind: Literal["adamw", "sgd", "nesterov"] = "adamw"
    """`sgd`, `nesterov`: with a momentum, or Nesterov's, that is the first of `betas`."""
    lr: float = 5e-4
    """Peak learning rate; flat, not scaled by the batch."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.05
    """Weight decay (AdamW's decoupled), none on norms and bias tables; of a vision transformer on matrices alone."""
    clip_grad: float = 3.0
    """Largest global gradient norm; 0 switches clipping off."""
    epochs: float = 150.0
    """Length of the run in passes over the clips (over the images where there is no video stream)."""
    warmup_epochs: float = 10.0
    """Linear warm-up, in epochs."""
    warmup_factor: float = 0.1
    """The warm-up starts at this share of `lr`."""
    impl: Literal["torch", "apex"] = "torch"
    """PyTorch's fused AdamW, or NVIDIA apex's FusedAdam (CUDA only; apex built with its CUDA extensions)."""
    max_steps: int = 0
    """Where above 0: the run's length in optimizer steps, in place of `epochs`; the warm-up keeps its share."""


@dataclass(frozen=True)
class BatchConfig:
    """Batches, precision, and what is written when: of every kind of training."""

    clips: int = 256
    """Clips in one optimizer step over all devices, each cut `augment.repeats` times; 0: no video stream."""
    images: int = 2048
    """Images in one optimizer step over all devices; 0: no image stream."""
    micro_clips: int = 8
    """Clips in one forward pass of one device, each cut `augment.repeats` times; accumulation follows from it and from
    the number of devices."""
    micro_images: int = 64
    """Images in one forward pass of one device."""
    precision: Literal["float64", "float32", "bfloat16"] = "bfloat16"
    """Type of the matrix products. `bfloat16` is autocast's: parameters, norms and losses stay float32. `float64`, for
    checking numerics, is the model's, with plain PyTorch for its kernels; the tokenizer has a key of its own."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Whether torch.compile fuses what surrounds the kernels. `auto`: yes on CUDA, else no."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: `ddp` keeps the model whole in each, `fsdp` (FSDP2) shards it, its gradients and moments."""
    seed: int = 0
    """Everything random in the run follows from it and the step."""
    log_every: int = 20
    """Steps between two rows of metrics."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; one is always written at the end and on SIGTERM."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    threads: int = 0
    """CPU threads of the training process; 0 leaves PyTorch's choice."""


@dataclass(frozen=True)
class TrainConfig(BatchConfig):
    """Batches, precision, and what is written when."""

    loss_weight: float = 1.0
    """Lambda: weight of the video stream's loss against the image stream's."""
    cuda_graphs: bool = False
    """Replay the compiled encoder's launches as CUDA graphs (not yet run on a GPU)."""
    memory_budget: float = 0.0
    """GiB of one device: blocks are run again in the backward pass, as few as keep the predicted peak below it (`bevt
    budget`). 0: none."""
    eval_clips: int = 64
    """Held-out clips scored at the end (0: none)."""
    eval_images: int = 256
    """Held-out images scored at the end (0: none)."""


@dataclass(frozen=True)
class Config:
    """One run."""

    recipe: str = "custom"
    """Name of the recipe this came from."""
    path: Literal["fused", "reference"] = "fused"
    """`reference` computes the same the way the official code does: every frame tokenised, every position decoded,
    attention materialised, nothing compiled or fused. Slow: it is what the other is measured against."""
    init: str = ""
    """Checkpoint of this project, image stage or later, whose weights start the run; empty: random weights."""
    model: AnyModel = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    clip_mask: MaskConfig = field(default_factory=MaskConfig)
    image_mask: MaskConfig = field(default_factory=lambda: MaskConfig(kind="block"))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class HeadConfig:
    """The classes, and what is trained on top of the encoder."""

    classes: str = ""
    """Names of the classes: a text file with one a line, the first is class 0 (also `number,name`, or SSv2's
    labels.json). Empty: the labels of the training files, numbers as they are, names in alphabetical order."""
    dropout: float = 0.5
    """Dropout before the linear head."""
    probes: tuple[Literal["linear", "attentive"], ...] = ()
    """Heads that are trained on frozen features, all in one pass, each at every rate of `probe_lrs`; `linear`: on the
    mean over all tokens, `attentive`: cross-attention of one learned query. Empty: one linear head, and all weights are
    trained."""
    probe_lrs: tuple[float, ...] = (1.0, 0.3, 0.1)
    """Learning rates of the probes, times `optim.lr`."""

    @property
    def names(self) -> tuple[str, ...]:
        """One a probe: its kind and its share of the learning rate."""
        return tuple(f"{kind} {rate:g}" for kind in self.probes for rate in self.probe_lrs)


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training samples on the device, alike for all frames of a clip."""

    repeats: int = 1
    """Cuts of each sample that a step learns from (repeated augmentation, arXiv 1901.09335): of `train.clips` files so
    many times as many clips."""
    color: float = 0.0
    """Probability with which brightness, contrast and saturation are changed by factors of 0.6 to 1.4."""
    grey: float = 0.0
    """Probability with which colours are dropped."""
    rand_augment: int = 0
    """Operations of RandAugment (arXiv 1909.13719) that each sample goes through; 0: none."""
    magnitude: int = 7
    """Their strength, 0 to 30."""
    erasing: float = 0.0
    """Probability of random erasing (arXiv 1708.04896)."""
    label_smoothing: float = 0.0
    """Share of a target's weight that is spread over all classes."""
    mixup: float = 0.0
    """Alpha of mixup (arXiv 1710.09412) between the samples of a pair; 0: none."""
    cutmix: float = 0.0
    """Alpha of CutMix (arXiv 1905.04899) likewise; with both, each pair takes one of them."""


@dataclass(frozen=True)
class FinetuneOptimConfig(OptimConfig):
    """The optimizer, its schedule, and each layer's share of the rate."""

    layer_decay: float = 1.0
    """Each layer's rate over that of the next: the head has `lr`, the final norm and the last block this share of it,
    then every block, every merging and the patch embedding one rung each. Of a vision transformer the norm has `lr`."""
    backbone_factor: float = 1.0
    """Rate of everything but the head over `lr`."""
    schedule: Literal["step", "epoch"] = "step"
    """The cosine falls at every step, or at the beginning of every epoch."""
    ema: float = 0.0
    """Share of the averaged weights that a step keeps; the average is what is tested. 0: no average."""


@dataclass(frozen=True)
class FinetuneTrainConfig(BatchConfig):
    """Batches, precision, and what is written when."""

    eval_every: float = 5.0
    """Epochs between two evaluations on the held-out files, one view each; one is always made at the end."""


@dataclass(frozen=True)
class TestConfig:
    """The views whose softmax outputs are averaged for each file."""

    __test__ = False  # pytest would take it for tests

    clips: int = 4
    """Clips, evenly spaced in time (images: 1)."""
    crops: int = 3
    """Square crops along the longer side."""
    memory: float = 4.0
    """GiB that a forward pass may take by prediction; as many views as fit go through together."""
    short_side: int = 0
    """Length of the short side to which held-out frames are resized; 0: the shorter of `data.short_side`."""


@dataclass(frozen=True)
class FinetuneConfig:
    """One run that learns classes: of videos, or of images where `train.clips` is 0."""

    recipe: str = "custom"
    """Name of the recipe this came from."""
    init: str = ""
    """What the run starts from: a checkpoint of this project (any stage), or a file of weights: of a Video Swin by the
    names of official BEVT, Video Swin, Swin, MoBY or torchvision, of a vision transformer by those of VideoMAE,
    TimeSformer, timm or Hugging Face; empty: random weights."""
    model: AnyModel = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    test: TestConfig = field(default_factory=TestConfig)

    @property
    def stream(self) -> Literal["clips", "images"]:
        """What is classified."""
        return "clips" if self.train.clips else "images"

    @property
    def views(self) -> tuple[int, int]:
        """Clips and crops of a test."""
        return self.test.clips if self.stream == "clips" else 1, self.test.crops


@dataclass(frozen=True)
class MoBYConfig:
    """Contrastive learning of images by MoBY (arXiv 2105.04553)."""

    queue: int = 4096
    """Keys of earlier images among which each image's own is to be found; a multiple of `train.images`."""
    temperature: float = 0.2
    """By which similarities are divided."""
    momentum: float = 0.99
    """Share of the key encoder's weights that the first step keeps; it rises to 1 by cosine."""


@dataclass(frozen=True)
class ContrastConfig:
    """One run of contrastive learning: two cuts of each image, distorted each in its own way, are told from others."""

    recipe: str = "custom"
    """Name of the recipe this came from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    moby: MoBYConfig = field(default_factory=MoBYConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: BatchConfig = field(default_factory=BatchConfig)


@dataclass(frozen=True)
class DecoderConfig:
    """VideoMAE's decoder of pixels."""

    embed_dim: int = 384
    """Channels, half of the encoder's."""
    depth: int = 4
    """Blocks."""
    num_heads: int = 6
    """Attention heads."""


@dataclass(frozen=True)
class VideoMAETrainConfig(BatchConfig):
    """Batches, precision, and what is written when."""

    eval_clips: int = 64
    """Held-out clips scored at the end (0: none)."""


@dataclass(frozen=True)
class VideoMAEConfig:
    """One run of VideoMAE's pretraining: the pixels of hidden patches from the visible ones."""

    recipe: str = "custom"
    """Name of the recipe this came from."""
    init: str = ""
    """Checkpoint of this project, or a file of VideoMAE's pretrained weights (the original's or Hugging Face's names),
    that starts the run; empty: random weights."""
    model: ViTConfig = field(default_factory=ViTConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    clip_mask: MaskConfig = field(default_factory=lambda: MaskConfig(kind="random_tube", ratio=0.9))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: VideoMAETrainConfig = field(default_factory=VideoMAETrainConfig)


AnyConfig = Config | FinetuneConfig | ContrastConfig | VideoMAEConfig

_CLASSES: dict[type, str] = {
    Config: "pretrain",
    VideoMAEConfig: "pretrain",
    FinetuneConfig: "finetune",
    ContrastConfig: "contrast",
}


DECODERS = {
    "small": DecoderConfig(192, 4, 3),
    "base": DecoderConfig(384, 4, 6),
    "large": DecoderConfig(512, 12, 8),
    "huge": DecoderConfig(640, 12, 8),
}
"""VideoMAE's, by the encoder's size (its code's `modeling_pretrain.py` and scripts)."""


def resized_config(config: AnyConfig, size: Size) -> AnyConfig:
    """`config` with its model, and VideoMAE's decoder, of a published size."""
    model: Any = resized(config.model, size)
    if isinstance(config, VideoMAEConfig):
        return dataclasses.replace(config, model=model, decoder=DECODERS[size])
    return dataclasses.replace(config, model=model)


def command_of(config: AnyConfig) -> str:
    """The command of `bevt` that runs it."""
    return _CLASSES[type(config)]


def tokenizer_settings(config: Config) -> TokenizerConfig:
    """What a run's tokenizer is built with: on the reference path plain PyTorch, eager."""
    if config.path == "reference":
        return dataclasses.replace(config.tokenizer, impl="reference", compile="no")
    return config.tokenizer


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data (dicts, lists, strings, numbers), for checkpoints and JSON."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = to_dict(value)
        else:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def from_dict(data: dict[str, Any], cls: type = Config, where: str = "") -> Any:
    """Inverse of `to_dict`. Raises ConfigError on a key that does not exist (naming the nearest) or a wrong type."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    kwargs = {}
    for key, value in data.items():
        if key not in names:
            raise ConfigError(
                f"no key {where + key!r} in the configuration; the nearest is {where + nearest(key, names)!r}"
            )
        kwargs[key] = _coerce(value, hints[key], where + key)
    return cls(**kwargs)


def keys(of: Any, where: str = "") -> list[str]:
    """Dotted names of all keys of a configuration, or of a class of them, in order."""
    hints = typing.get_type_hints(of if isinstance(of, type) else type(of))
    out = []
    for f in dataclasses.fields(of):
        value = getattr(of, f.name, None)
        hint = value if dataclasses.is_dataclass(value) else hints[f.name]
        out += keys(hint, f"{where}{f.name}.") if dataclasses.is_dataclass(hint) else [where + f.name]
    return out


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """The one of `names` most like `name`, for error messages."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` of the field `where`, or a ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a group of keys, got {value!r}")
        return from_dict(value, typing.cast(type, hint), where + ".")
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ConfigError(f"{where} must be a list like {hint}, got {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(_coerce(v, t, f"{where}[{i}]") for i, (v, t) in enumerate(zip(value, inner)))
    if origin in (typing.Union, types.UnionType):  # of models: that which has most of the keys
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a group of keys, got {value!r}")
        held = [len(set(value) & {f.name for f in dataclasses.fields(arg)}) for arg in args]
        return from_dict(value, args[held.index(max(held))], where + ".")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def check(config: AnyConfig) -> None:
    """Raise ConfigError where the configuration cannot be run, naming the key. Touches no file."""
    if isinstance(config, Config):
        _check_pretraining(config)
    elif isinstance(config, FinetuneConfig):
        _check_finetuning(config)
    elif isinstance(config, VideoMAEConfig):
        _check_videomae(config)
    else:
        _check_contrast(config)


def _check_pretraining(config: Config) -> None:
    m, d, t, o = config.model, config.data, config.train, config.optim
    _check_run(config)
    if isinstance(m, ViTConfig):
        _check_masked_vit(config, m)
    elif m.quirks == "official" and t.images:
        side, (_, wh, ww) = d.crop // 32, m.window_size  # stage 4's map; the others are 2, 4 and 8 times as large
        if side % wh or side % ww:
            raise ConfigError(
                f"model.quirks 'official' cannot run images of data.crop {d.crop}: stage 4's map of {side}x{side} "
                f"tokens must be a multiple of model.window_size {wh}x{ww}, which the official code never pads or "
                "clips (224 for 7x7); set quirks to 'clean'"
            )
    if t.images and config.image_mask.kind != "block":
        raise ConfigError(f"image_mask.kind must be 'block', got {config.image_mask.kind!r}")
    if t.clips and config.clip_mask.kind == "block":
        raise ConfigError("clip_mask.kind 'block' is the image stream's; use 'tube' or one of Table 9's")
    if t.clips and config.clip_mask.kind == "random_tube":
        raise ConfigError("clip_mask.kind 'random_tube' is VideoMAE's; use 'tube' or one of Table 9's")
    if config.tokenizer.cache and not d.views:
        raise ConfigError(
            "tokenizer.cache keeps the codes of views that come back, but data.views = 0 cuts every sample anew: "
            "set data.views (4, say), or leave tokenizer.cache empty"
        )
    if config.tokenizer.cache and d.backend == "auto":
        raise ConfigError(
            "tokenizer.cache keeps codes of one decoder's pixels, and data.backend 'auto' may take another one every "
            "time: name it ('pyav', say)"
        )
    if config.path == "reference":
        fused = {
            "train.compile": t.compile == "yes",
            "train.cuda_graphs": t.cuda_graphs,
            "train.memory_budget": bool(t.memory_budget),
            "optim.impl": o.impl != "torch",
            "model.attention_impl": m.attention_impl != "auto",
            "model.loss_impl": m.loss_impl != "auto",
            "model.linear_impl": m.linear_impl != "auto",
            "tokenizer.impl": config.tokenizer.impl != "auto",
            "tokenizer.compile": config.tokenizer.compile == "yes",
            "tokenizer.cache": bool(config.tokenizer.cache),
        }
        for key, chosen in fused.items():
            if chosen:
                raise ConfigError(f"{key} has no meaning with path 'reference', which is plain PyTorch: leave it out")
    if t.cuda_graphs and (t.parallel == "fsdp" or t.memory_budget):
        other = "train.parallel 'fsdp'" if t.parallel == "fsdp" else "train.memory_budget"
        raise ConfigError(f"train.cuda_graphs cannot be combined with {other}: take one of them")
    if t.cuda_graphs and t.compile == "no":
        raise ConfigError("train.cuda_graphs needs the compiled encoder: set train.compile to 'yes' or 'auto'")


def _check_masked_vit(config: Config, m: ViTConfig) -> None:
    """A vision transformer as BEVT's encoder."""
    if m.kind != "timesformer":
        raise ConfigError(f"model.kind must be 'timesformer' or a Video Swin's where tokens are masked, got {m.kind!r}")
    if m.patch != 16:
        raise ConfigError(f"model.patch must be 16 where tokens are predicted, one of each patch, got {m.patch}")
    unsaid = {"path": config.path == "reference", "train.memory_budget": bool(config.train.memory_budget)}
    unsaid |= {"train.cuda_graphs": config.train.cuda_graphs}
    for key, chosen in unsaid.items():
        if chosen:
            raise ConfigError(f"{key} is of BEVT with a Video Swin alone: leave it out with model.kind {m.kind!r}")


def _check_videomae(config: VideoMAEConfig) -> None:
    m, o, t = config.model, config.decoder, config.train
    if m.kind != "videomae":
        raise ConfigError(f"model.kind must be 'videomae' where pixels are predicted, got {m.kind!r}")
    if t.images:
        raise ConfigError("train.images must be 0: VideoMAE learns from clips")
    _check_run(config)
    if o.embed_dim < 1 or o.num_heads < 1 or o.depth < 1 or o.embed_dim % o.num_heads:
        raise ConfigError(
            f"decoder.num_heads = {o.num_heads} must divide decoder.embed_dim = {o.embed_dim}, and decoder.depth = "
            f"{o.depth} be above 0"
        )
    if config.clip_mask.kind != "random_tube":
        raise ConfigError(
            "clip_mask.kind must be 'random_tube', since all clips have to hide as many patches, got "
            f"{config.clip_mask.kind!r}"
        )
    for key in ("min_block", "min_aspect", "tube", "wrap"):
        if getattr(config.clip_mask, key) != getattr(MaskConfig, key):
            raise ConfigError(f"clip_mask.{key} has no meaning with clip_mask.kind 'random_tube': leave it out")
    if m.loss_impl != "auto":
        raise ConfigError("model.loss_impl is the masked-token loss's: leave it out")
    if m.drop_path:
        raise ConfigError(f"model.drop_path = {m.drop_path:g} has no meaning where pixels are predicted: set it to 0")
    for key in ("views", "image_source"):
        if getattr(config.data, key) != getattr(DataConfig, key):
            raise ConfigError(f"data.{key} has no meaning where pixels are predicted: leave it out")


def _check_finetuning(config: FinetuneConfig) -> None:
    d, t, h, a = config.data, config.train, config.head, config.augment
    _check_run(config)
    if t.clips and t.images:
        raise ConfigError("train.clips and train.images: classes are learned of one stream, set one of them to 0")
    stream = config.stream
    if t.images and isinstance(config.model, ViTConfig):
        raise ConfigError(f"train.images: model.kind {config.model.kind!r} classifies clips; set train.clips instead")
    if t.images and isinstance(config.model, ModelConfig) and config.model.window_size[0] != 1:
        raise ConfigError(
            f"model.window_size must be (1, h, w) where images are classified, got {config.model.window_size}"
        )
    if 0 < config.test.short_side < d.crop:
        raise ConfigError(f"test.short_side = {config.test.short_side} is below data.crop = {d.crop}")
    for key in ("views", "image_source"):
        if getattr(d, key) != getattr(DataConfig, key):
            raise ConfigError(f"data.{key} has no meaning where classes are learned: leave it out")
    if (a.mixup or a.cutmix) and getattr(t, f"micro_{stream}") % 2:
        raise ConfigError(
            f"augment.mixup and augment.cutmix mix the samples of a pair: train.micro_{stream} = "
            f"{getattr(t, f'micro_{stream}')} must be even"
        )
    if a.rand_augment > 18 or a.magnitude > 30:
        raise ConfigError(
            f"augment.rand_augment must be at most 18, the number of operations, and augment.magnitude at most 30, got "
            f"{a.rand_augment} and {a.magnitude}"
        )
    if h.probes and not h.probe_lrs:
        raise ConfigError("head.probe_lrs is empty: head.probes needs at least one rate")
    if h.probes:
        if len(set(h.names)) < len(h.names):
            raise ConfigError(f"head.probes {h.probes} at head.probe_lrs {h.probe_lrs}: each kind and rate only once")
        neutral = {
            "optim.ema": (config.optim.ema, 0.0),
            "optim.clip_grad": (config.optim.clip_grad, 0.0),
            "optim.layer_decay": (config.optim.layer_decay, 1.0),
            "optim.backbone_factor": (config.optim.backbone_factor, 1.0),
            "model.drop_path": (config.model.drop_path, 0.0),
            "head.dropout": (h.dropout, 0.0),
        }
        for key, (value, nothing) in neutral.items():
            if value != nothing:
                raise ConfigError(
                    f"{key} = {value:g} has no meaning with head.probes, which are independent heads on frozen "
                    f"features: set it to {nothing:g}"
                )
    if config.model.loss_impl != "auto":
        raise ConfigError("model.loss_impl is the masked-token loss's, which learns no classes: leave it out")


def _check_contrast(config: ContrastConfig) -> None:
    t, m = config.train, config.moby
    if t.clips:
        raise ConfigError("train.clips must be 0: images are what is contrasted")
    _check_run(config)
    if config.model.window_size[0] != 1:
        raise ConfigError(f"model.window_size must be (1, h, w), of images, got {config.model.window_size}")
    if m.queue % t.images:
        raise ConfigError(f"moby.queue = {m.queue} is not a multiple of train.images = {t.images}")
    for key in ("views", "jitter", "val_images"):  # the two views have a jitter of their own, and nothing is held out
        if getattr(config.data, key):
            raise ConfigError(f"data.{key} has no meaning where images are contrasted: leave it out")
    if t.parallel == "fsdp":
        raise ConfigError("train.parallel 'fsdp' cannot average the key encoder's shards: leave it at 'ddp'")


def _check_run(config: AnyConfig) -> None:
    """What every training needs."""
    m, d, t, o = config.model, config.data, config.train, config.optim
    check_frames(config)
    _check_heads(m)
    if t.clips + t.images == 0:
        raise ConfigError("train.clips and train.images: at least one stream needs a batch above 0")
    for stream, what in (("clips", "videos"), ("images", "videos" if d.image_source == "frames" else "images")):
        if getattr(t, stream) and not getattr(d, stream):
            raise ConfigError(
                f"data.{stream} is empty but train.{stream} is not 0: "
                f"name a folder of {what}, or set train.{stream} to 0"
            )
    if o.impl == "apex" and t.parallel == "fsdp":
        raise ConfigError("optim.impl 'apex' knows no shards: leave it at 'torch', or train.parallel at 'ddp'")
    if o.impl == "apex" and o.kind != "adamw":
        raise ConfigError(f"optim.impl 'apex' is of AdamW, not of optim.kind {o.kind!r}: leave it at 'torch'")
    if o.kind != "adamw" and (o.eps != OptimConfig.eps or o.betas[1] != OptimConfig.betas[1]):
        raise ConfigError(f"optim.eps and the second of optim.betas have no meaning with optim.kind {o.kind!r}")
    if o.impl == "apex" and t.precision == "float64":
        raise ConfigError("optim.impl 'apex' serves float32 parameters, not train.precision 'float64'")
    if o.warmup_epochs > o.epochs:
        raise ConfigError(f"optim.warmup_epochs = {o.warmup_epochs} is longer than optim.epochs = {o.epochs}")


def _check_heads(m: AnyModel) -> None:
    if isinstance(m, ViTConfig):
        if m.embed_dim % m.num_heads:
            raise ConfigError(f"model.num_heads = {m.num_heads} does not divide model.embed_dim = {m.embed_dim}")
        if m.kind == "vivit_4" and m.num_heads % 2:
            raise ConfigError(
                f"model.num_heads = {m.num_heads} must be even: half of 'vivit_4' attend over space, half over time"
            )
        if m.kind == "timesformer" and m.tubelet != 1:
            raise ConfigError(f"model.tubelet must be 1 of a 'timesformer', got {m.tubelet}")
        of: dict[str, tuple[str, ...]] = {
            "temporal_depth": ("vivit_2",),
            "temporal_init": ("vivit_3",),
            "inflation": ("vivit_1", "vivit_2", "vivit_3", "vivit_4"),
        }
        for key, kinds in of.items():
            if m.kind not in kinds and getattr(m, key) != getattr(ViTConfig, key):
                raise ConfigError(f"model.{key} has no meaning with model.kind {m.kind!r}: leave it out")
        return
    if not len(m.depths) == len(m.num_heads) == 4:
        raise ConfigError(f"model.depths and model.num_heads need 4 stages, got {m.depths} and {m.num_heads}")
    for i, heads in enumerate(m.num_heads):
        if heads < 1 or (m.embed_dim << i) % heads:
            raise ConfigError(
                f"model.num_heads[{i}] = {heads} does not divide the {m.embed_dim << i} channels of stage {i + 1}"
            )


def check_frames(config: AnyConfig) -> None:
    """The part of `check` that matters where frames are read without a model, as for fitting a tokenizer."""
    d, m = config.data, config.model
    _check_ranges(config)
    if d.crop % m.multiple:
        why = f"model.patch {m.patch}" if isinstance(m, ViTConfig) else "patch 4, three mergings"
        raise ConfigError(f"data.crop must be a multiple of {m.multiple} ({why}), got {d.crop}")
    if d.short_side[0] < d.crop or d.short_side[1] < d.short_side[0]:
        raise ConfigError(
            f"data.short_side must be a range that starts at data.crop = {d.crop} or above, got {d.short_side}"
        )
    if d.crop_area != (0, 0) and not 0 < d.crop_area[0] <= d.crop_area[1] <= 1:
        raise ConfigError(f"data.crop_area must be a range above 0 and up to 1, or (0, 0) for none, got {d.crop_area}")
    if d.crop_scales and d.crop_area != (0, 0):
        raise ConfigError("data.crop_scales and data.crop_area are two ways of one crop: set one of them")
    for i, scale in enumerate(d.crop_scales):
        if not 0 < scale <= 1:
            raise ConfigError(f"data.crop_scales[{i}] must be above 0 and up to 1, got {scale}")
    if d.frames % m.tubelet:
        of = "even (a token spans two frames)" if m.tubelet == 2 else f"a multiple of model.tubelet = {m.tubelet}"
        raise ConfigError(f"data.frames must be {of}, got {d.frames}")
    if isinstance(m, ViTConfig) and m.kind == "timesformer" and d.frames < 2:
        raise ConfigError("data.frames must be 2 or above: a 'timesformer' takes one frame for an image")


def _lengths(m: AnyModel) -> dict[str, int]:
    """Numbers of a model that count something, by key."""
    if isinstance(m, ViTConfig):
        names = ("depth", "num_heads", "patch", "tubelet", "temporal_depth")
        return {name: getattr(m, name) for name in names}
    named = {f"depths[{i}]": depth for i, depth in enumerate(m.depths)}
    return {**named, **{f"window_size[{i}]": size for i, size in enumerate(m.window_size)}}


def _check_ranges(config: AnyConfig) -> None:
    """Raise ConfigError for the first number that lies outside what its key can mean."""
    m, d, t, o = config.model, config.data, config.train, config.optim
    above_zero = {
        "model.embed_dim": m.embed_dim,
        "model.mlp_ratio": m.mlp_ratio,
        **{f"model.{key}": value for key, value in _lengths(m).items()},
        "data.frames": d.frames,
        "data.stride": d.stride,
        "data.crop": d.crop,
        "data.prefetch": d.prefetch,
        "optim.lr": o.lr,
        "optim.eps": o.eps,
        "optim.epochs": o.epochs,
        "train.micro_clips": t.micro_clips,
        "train.micro_images": t.micro_images,
        "train.log_every": t.log_every,
        "train.checkpoint_every": t.checkpoint_every,
        "train.keep": t.keep,
    }
    zero_or_above = {
        "data.workers": d.workers,
        "data.views": d.views,
        "optim.weight_decay": o.weight_decay,
        "optim.clip_grad": o.clip_grad,
        "optim.warmup_epochs": o.warmup_epochs,
        "optim.max_steps": o.max_steps,
        "train.clips": t.clips,
        "train.images": t.images,
        "train.threads": t.threads,
        "train.seed": t.seed,
    }
    shares = {"data.flip": d.flip, "data.jitter": d.jitter, "optim.warmup_factor": o.warmup_factor}
    below_one = {"model.drop_path": m.drop_path, "optim.betas[0]": o.betas[0], "optim.betas[1]": o.betas[1]}
    if isinstance(config, Config):
        zero_or_above |= {
            f"train.{name}": getattr(config.train, name)
            for name in ("loss_weight", "memory_budget", "eval_clips", "eval_images")
        }
        for name, mask in (("clip_mask", config.clip_mask), ("image_mask", config.image_mask)):
            above_zero |= {
                f"{name}.min_block": mask.min_block,
                f"{name}.ratio": mask.ratio,
                f"{name}.tube[0]": mask.tube[0],
            }
            above_zero[f"{name}.min_aspect"] = mask.min_aspect
            shares |= {
                f"{name}.ratio": mask.ratio,
                f"{name}.min_aspect": mask.min_aspect,
                f"{name}.tube[1]": mask.tube[1],
            }
            if mask.tube[1] < mask.tube[0]:
                raise ConfigError(f"{name}.tube must be a range, got {mask.tube}")
    elif isinstance(config, VideoMAEConfig):
        zero_or_above["train.eval_clips"] = config.train.eval_clips
        shares["clip_mask.ratio"] = config.clip_mask.ratio
    elif isinstance(config, ContrastConfig):
        above_zero |= {"moby.queue": config.moby.queue, "moby.temperature": config.moby.temperature}
        shares["moby.momentum"] = config.moby.momentum
    else:
        h, a, p = config.head, config.augment, config.optim
        above_zero |= {f"test.{name}": getattr(config.test, name) for name in ("clips", "crops", "memory")}
        zero_or_above["test.short_side"] = config.test.short_side
        above_zero |= {f"head.probe_lrs[{i}]": rate for i, rate in enumerate(h.probe_lrs)}
        above_zero |= {
            "optim.layer_decay": p.layer_decay,
            "optim.backbone_factor": p.backbone_factor,
            "train.eval_every": config.train.eval_every,
        }
        above_zero["augment.repeats"] = a.repeats
        shares |= {"augment.color": a.color, "augment.grey": a.grey}
        zero_or_above |= {
            f"augment.{name}": getattr(a, name) for name in ("rand_augment", "magnitude", "mixup", "cutmix")
        }
        shares |= {
            "augment.erasing": a.erasing,
            "optim.layer_decay": p.layer_decay,
        }
        below_one |= {"head.dropout": h.dropout, "augment.label_smoothing": a.label_smoothing, "optim.ema": p.ema}
    rules: tuple[tuple[dict[str, float], str, Callable[[float], bool]], ...] = (
        (above_zero, "above 0", lambda x: x > 0),
        (zero_or_above, "0 or above", lambda x: x >= 0),
        (shares, "from 0 to 1", lambda x: 0 <= x <= 1),
        (below_one, "0 or above and below 1", lambda x: 0 <= x < 1),
    )
    for values, says, holds in rules:
        for key, value in values.items():
            if not (math.isfinite(value) and holds(value)):
                raise ConfigError(f"{key} must be {says}, got {value}")
