"""What the trainer's tests run: a very small joint stage on the embedded dataset, with an untrained tokenizer."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TORCHRUN, changed, command, output
from torch import Tensor

from bevt.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    FinetuneTrainConfig,
    HeadConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    TestConfig,
    TokenizerConfig,
    TrainConfig,
)
from bevt.data import shapes
from bevt.data.batch import Batch
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train.finetune import finetune
from bevt.train.pretrain import pretrain

CODES = 32


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded tokenizer of 32 codes."""
    path = tmp_path_factory.mktemp("tokenizer") / "vq.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VQModel(VQConfig(image_size=32, vocab_size=CODES, code_dim=4, width=4, blocks=0))
        torch.nn.init.normal_(model.codebook)
    VQTokenizer(model).save(path)
    return path


@pytest.fixture(scope="session")
def config(dataset: shapes.ShapesPaths, tokenizer_path: Path) -> Config:
    """Six steps of 2 clips and 4 images at 64 pixels in two micro-batches; in-process, every step logged."""
    return Config(
        recipe="joint_stage",
        model=ModelConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(4, 3, 3)),
        tokenizer=TokenizerConfig(kind="vq", path=str(tokenizer_path)),
        image_mask=MaskConfig(kind="block", min_block=4),
        clip_mask=MaskConfig(kind="tube", min_block=4),
        data=DataConfig(
            clips=str(dataset.train_clips),
            images=str(dataset.train_images),
            frames=4,
            stride=2,
            short_side=(64, 80),
            crop=64,
            backend="pyav",
            workers=0,
        ),
        optim=OptimConfig(lr=1e-3, max_steps=6, epochs=1, warmup_epochs=0.3),
        train=TrainConfig(
            clips=2,
            images=4,
            micro_clips=1,
            micro_images=2,
            precision="float32",
            log_every=1,
            checkpoint_every=2,
            eval_clips=3,
            eval_images=5,
        ),
    )


@pytest.fixture(scope="session")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, finished."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(config, out, quiet=True)
    return out


@pytest.fixture(scope="session")
def pair(config: Config) -> Config:
    """A run for two processes: 16 steps, of which 3.5 are an epoch, and a checkpoint after every fourth."""
    return changed(config, optim={"max_steps": 16}, train={"checkpoint_every": 4, "threads": 1})


@pytest.fixture(scope="session")
def undisturbed_pair(pair: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, by two processes that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "pair"
    output(command(pair, out, python=TORCHRUN), timeout=240)
    return out


@pytest.fixture
def plain(config: Config) -> Config:
    """Without drop path."""
    return replace(config, model=replace(config.model, drop_path=0.0))


@pytest.fixture
def batch() -> Batch:
    """4 clips and 8 images with equally many masked positions in each sample: 6 a frame, of at most 8."""
    rng = torch.Generator().manual_seed(0)

    def masks(*shape: int) -> Tensor:
        order = torch.rand(*shape, 16, generator=rng).argsort(-1)
        return (order < 6).unflatten(-1, (4, 4))

    return Batch(
        clips=torch.randint(256, (4, 4, 64, 64, 3), generator=rng, dtype=torch.uint8),
        clip_masks=masks(4, 2),
        images=torch.randint(256, (8, 64, 64, 3), generator=rng, dtype=torch.uint8),
        image_masks=masks(8),
        image_jitter=torch.tensor([[1.1, 0.9, 1.2, 2.0, 0.0, 1.0]]).repeat(8, 1),
    )


@pytest.fixture(scope="session")
def lists(dataset: shapes.ShapesPaths) -> Path:
    """Folder with `train.txt` and `val.txt`: clips labelled 0, 1, 2 in turn; and `images.txt`, `val_images.txt`."""
    folder = Path(dataset.labels).parent
    with open(dataset.labels, newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    for name, split in (
        ("train.txt", "train_clips/"),
        ("val.txt", "val_clips/"),
        ("images.txt", "train_images/"),
        ("val_images.txt", "val_images/"),
    ):
        mine = [path for path in paths if path.startswith(split)]
        (folder / name).write_text("".join(f"{path} {i % 3}\n" for i, path in enumerate(mine)))
    return folder


@pytest.fixture(scope="session")
def tuned(config: Config, lists: Path) -> FinetuneConfig:
    """Six steps of 4 clips in two micro-batches, with everything that draws random numbers."""
    return FinetuneConfig(
        recipe="ssv2",
        model=replace(config.model, drop_path=0.2),
        head=HeadConfig(dropout=0.3),
        data=replace(
            config.data,
            clips=str(lists / "train.txt"),
            images="",
            val_clips=str(lists / "val.txt"),
            crop_area=(0.3, 1.0),
            short_side=(64, 64),
            jitter=0.0,
        ),
        augment=AugmentConfig(rand_augment=2, magnitude=7, erasing=0.5, label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        optim=FinetuneOptimConfig(
            lr=1e-3, clip_grad=1.0, layer_decay=0.8, max_steps=6, epochs=3, warmup_epochs=0.5, schedule="epoch", ema=0.9
        ),
        train=FinetuneTrainConfig(
            clips=4,
            images=0,
            micro_clips=2,
            precision="float32",
            log_every=1,
            checkpoint_every=3,
            eval_every=1,
            threads=1,
        ),
        test=TestConfig(clips=2, crops=3),
    )


@pytest.fixture(scope="session")
def finished_tuning(tuned: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    result = finetune(tuned, out, quiet=True)
    assert result.finished
    assert set(result.evaluation) == {"val_top1", "val_mean_class"}
    return out
