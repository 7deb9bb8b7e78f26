"""The recipes: what their docstrings say is what they are."""

from __future__ import annotations

import inspect
import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevt import budget, cli, masking
from bevt.config import (
    SIZES,
    AnyConfig,
    BatchConfig,
    Config,
    ContrastConfig,
    DataConfig,
    FinetuneConfig,
    MaskConfig,
    MoBYConfig,
    Size,
    check,
    command_of,
    resized,
)
from bevt.models.bevt import MaskedInput
from bevt.models.classifier import VideoSwinClassifier
from bevt.recipes import ALL_RECIPES, CONTRAST_RECIPES, FINETUNE_RECIPES, RECIPES
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train.optim import total_steps
from bevt.train.pretrain import build_model

PAPER = [name for name in RECIPES if "demo" not in name and not name.startswith("replicate")]
CLASSES = [name for name in FINETUNE_RECIPES if "demo" not in name and not name.startswith("replicate")]
"""Of learning classes."""

GRID = (8, 14, 14)
"""16 frames of 224 pixels."""


def parts(name: str) -> dict[str, str]:
    """The docstring's paragraphs by what they begin with; of several commands, each with what it is for."""
    doc = inspect.getdoc(ALL_RECIPES[name]) or ""
    found = re.findall(r"^(Command[^:]*|Cost|Expected|Settings): (.*?)(?=\n\n|\n[A-Z][^\n:]*: |\Z)", doc, re.M | re.S)
    return {key: " ".join(text.split()) for key, text in found}


def commands(name: str) -> list[str]:
    """The command lines of a docstring."""
    return [text for key, text in parts(name).items() if key.startswith("Command")]


def parsed(command: str) -> Any:
    """The configuration of a `bevt pretrain` command, by the command line's own parser; MASK may be left open."""
    words = shlex.split(command.replace(" MASK ", " "))
    assert words[:2] == ["bevt", "pretrain"]
    default, rest = cli._recipe(words[2:], "pretrain", RECIPES)
    kind: Any = cli.KINDS[type(default)]
    return cli._parse(kind, rest, "bevt pretrain", kind(out=cli.tyro.MISSING, config=default)).config


def finetuned(command: str) -> FinetuneConfig:
    """Likewise of a `bevt finetune` command."""
    words = shlex.split(command)
    assert words[:2] == ["bevt", "finetune"]
    default, rest = cli._recipe(words[2:], "finetune", FINETUNE_RECIPES)
    arguments = cli.FinetuneArgs(out=cli.tyro.MISSING, config=default)
    return cli._parse(cli.FinetuneArgs, rest, "bevt finetune", arguments).config


def contrasted(command: str) -> ContrastConfig:
    """Likewise of a `bevt contrast` command."""
    words = shlex.split(command)
    assert words[:2] == ["bevt", "contrast"]
    default, rest = cli._recipe(words[2:], "contrast", CONTRAST_RECIPES)
    arguments = cli.ContrastArgs(out=cli.tyro.MISSING, config=default)
    return cli._parse(cli.ContrastArgs, rest, "bevt contrast", arguments).config


def mask_rows() -> dict[str, str]:
    """Of Table 9: flags by the mask's name."""
    doc = RECIPES["mask_ablation"].__doc__ or ""
    return dict(re.findall(r"^ +(\S.*?)  +(--clip-mask\S+ [\S ]*\S)  +[\d.]+  +[\d.]+$", doc, re.M))


def masked(flags: str) -> Config:
    """The configuration of a row of Table 9."""
    return parsed(commands("mask_ablation")[1].replace(" MASK ", f" {flags} "))


@pytest.mark.parametrize("name", PAPER)
def test_docstring_says_command_cost_and_result(name: str) -> None:
    said = parts(name)
    assert {"Cost", "Expected", "Settings"} <= said.keys()
    assert any(f"bevt pretrain {name} " in command for command in commands(name))


@pytest.mark.parametrize("name", PAPER)
def test_commands_can_be_run(name: str) -> None:
    """They parse, name every path that is needed, and what they start from has been written before."""
    written = {"runs/image_stage"}
    if name == "timesformer_joint_stage":
        written |= {shlex.split(command)[-1] for command in commands("timesformer_image_stage")}
    for command in commands(name):
        if command.startswith("bevt finetune "):
            continue  # of the other list
        if command.startswith("bevt tokenizer fit "):
            words = shlex.split(command)[3:]
            written.add(str(cli._parse(cli.TokenizerFitArgs, words, "bevt tokenizer fit").out))
            continue
        config = parsed(command)
        check(config)
        assert config.init.removesuffix("/checkpoints/last") in {"", *written}
        if isinstance(config, Config):
            assert config.tokenizer.path in {"encoder.pkl", *written}
            assert (config.tokenizer.kind == "vq") == config.tokenizer.path.startswith("vq")
        written.add(shlex.split(command)[-1])


def test_commands_of_demos_can_be_run() -> None:
    """They parse, and what they start from is what another of them writes."""
    starts, written = {""}, {""}
    for command in (each for name in ALL_RECIPES if "_demo" in name for each in commands(name)):
        if command.startswith("bevt tokenizer fit "):
            written.add(str(cli._parse(cli.TokenizerFitArgs, shlex.split(command)[3:], "bevt tokenizer fit").out))
            continue
        config = parsed(command) if command.startswith("bevt pretrain ") else finetuned(command)
        check(config)
        starts |= {config.init.removesuffix("/checkpoints/last")}
        starts |= {config.tokenizer.path} if isinstance(config, Config) else set()
        written.add(shlex.split(command)[-1])
    assert len(starts) == 5
    assert starts <= written


@pytest.mark.parametrize(
    ("name", "streams", "kind", "source"),
    [
        ("image_stage", ("images",), "dalle", "pictures"),
        ("joint_stage", ("clips", "images"), "dalle", "pictures"),
        ("joint_frames", ("clips", "images"), "dalle", "frames"),
        ("joint_vq", ("clips", "images"), "vq", "pictures"),
        ("video_only", ("clips",), "dalle", "pictures"),
        ("mask_ablation", ("clips", "images"), "dalle", "pictures"),
    ],
)
def test_streams(name: str, streams: tuple[str, ...], kind: str, source: str) -> None:
    """Built as the trainer builds it (with few channels), the model has the streams and no parameter that idles."""
    config = RECIPES[name]()
    assert config.recipe == name
    assert (config.tokenizer.kind, config.data.image_source) == (kind, source)
    few = replace(config.model, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    model = build_model(replace(config, model=few), 32, torch.device("cpu"))
    assert model.streams == streams
    generator = torch.Generator().manual_seed(0)
    clip, image = (1, 2, 2, 2), (1, 2, 2)
    inputs = {
        "clips": MaskedInput(
            torch.rand(1, 3, 4, 32, 32, generator=generator),
            torch.ones(clip, dtype=torch.bool),
            torch.zeros(1, 4, 2, 2, dtype=torch.int64),
            16,
        ),
        "images": MaskedInput(
            torch.rand(1, 3, 32, 32, generator=generator),
            torch.ones(image, dtype=torch.bool),
            torch.zeros(image, dtype=torch.int64),
            4,
        ),
    }
    out = model(**{stream: inputs[stream] for stream in streams})
    torch.stack([out[f"loss_{stream}"] for stream in streams]).sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_sizes(size: str) -> None:
    """Channels, depths and Video Swin's drop path; the image stage keeps its own, which is lower."""
    joint = parsed(f"bevt pretrain joint_stage --size {size} --out runs/joint").model
    assert joint == SIZES[size]  # type: ignore[index]
    assert joint.drop_path == {"tiny": 0.1, "small": 0.1, "base": 0.3}[size]
    image = parsed(f"bevt pretrain image_stage --size {size} --out runs/image").model
    assert image == replace(joint, window_size=(1, 7, 7), drop_path=0.1)


TABLE_9 = {
    "tube 0.5T-T, 40 %": (MaskConfig(ratio=0.4), {4, 5, 6, 7, 8}),
    "tube 0.5T-T, 50 %": (MaskConfig(ratio=0.5), {4, 5, 6, 7, 8}),
    "tube 0.5T-T, 60 %": (MaskConfig(ratio=0.6), {4, 5, 6, 7, 8}),
    "tube 0.5T-T, 70 %": (MaskConfig(ratio=0.7), {4, 5, 6, 7, 8}),
    "tube 0.25T-0.75T": (MaskConfig(tube=(0.25, 0.75)), {2, 3, 4, 5, 6}),
    "tube 0.75T-T": (MaskConfig(tube=(0.75, 1.0)), {6, 7, 8}),
    "tube T": (MaskConfig(tube=(1.0, 1.0)), {8}),
    "Random-3D": (MaskConfig(kind="random_3d"), {8}),
    "Frame-Diff": (MaskConfig(kind="frame_diff"), {4, 5, 6, 7, 8}),
    "Random-Frame": (MaskConfig(kind="random_frame"), {4, 5, 6, 7, 8}),
}
"""Mask, and how many frames of eight it touches."""


def test_table_9_is_whole() -> None:
    """Ten rows in the docstring, those of the paper."""
    assert mask_rows().keys() == TABLE_9.keys()


@pytest.mark.parametrize("name", TABLE_9)
def test_masks_of_table_9(name: str) -> None:
    """The row's flags give its mask and change nothing else; 512 draws have its frames, share and shape."""
    config, (expected, touched) = masked(mask_rows()[name]), TABLE_9[name]
    check(config)
    assert config.clip_mask == expected
    assert replace(config, clip_mask=MaskConfig()) == masked("")
    masks = masking.generate(config.clip_mask, np.arange(512), GRID)
    frames = masks.any((2, 3))
    assert set(frames.sum(1).tolist()) == touched
    share = masks.sum() / frames.sum() / 196  # of the frames that are touched
    if name == "Random-3D":
        assert (masks.sum((1, 2, 3)) == 588).all()  # what tubes of 50 % hide on average: 0.375
        return
    assert expected.ratio - 0.02 < share <= expected.ratio + 0.5 / 196
    alike = [len(np.unique(mask[rows], axis=0)) == 1 for mask, rows in zip(masks, frames, strict=True)]
    assert any(alike) != (name == "Frame-Diff")
    runs = [np.ptp(np.flatnonzero(row)) + 1 == row.sum() for row in frames]
    assert all(runs) != (name == "Random-Frame")


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of the sizes that `bevt tokenizer fit` gives one, not trained."""
    sizes = cli.TokenizerFitArgs(out=Path())
    path = tmp_path_factory.mktemp("tokenizer") / "vq.safetensors"
    config = VQConfig(112, sizes.vocab_size, sizes.code_dim, sizes.width)
    VQTokenizer(VQModel(config)).save(path)
    return str(path)


@cache
def counted(config: budget.Trained) -> list[budget.Component]:
    """The rows of the budget, but for parts of rows."""
    return [row for row in budget.counted(config) if not row.name.startswith(" ")]


def cost(config: Any, clips: int = 0) -> tuple[str, str, str]:
    """TFLOP a step, EFLOP and hours, as `bevt budget` counts them, with its defaults but for `clips` above 0."""
    given, train = cli.BudgetArgs(config), config.train
    given = replace(given, clips=clips or given.clips)
    if train.clips:  # a clip costs the same with images beside it: BEVT-V is not counted again
        config = replace(config, recipe="", train=replace(train, images=2048))
    step = sum(row.step_flop(train.clips, train.images) for row in counted(config))
    files = given.clips / train.clips if train.clips else given.images / train.images
    flop = step * total_steps(config.optim, files)
    hours = flop / (given.gpus * given.tflops * 1e12 * given.efficiency) / 3600
    return f"{step / 1e12:.1f}", f"{flop / 1e18:.2f}", f"{hours:.1f}"


def said(name: str, what: str) -> tuple[str, ...]:
    """The same figures as the docstring has them of a size or a mask."""
    found = re.search(re.escape(what) + r" ([\d.]+) TFLOP a step, ([\d.]+) EFLOP, ([\d.]+) h", parts(name)["Cost"])
    return found.groups() if found else ()


@pytest.mark.parametrize("size", ["base", "small", "tiny"])
@pytest.mark.parametrize("name", ["image_stage", "joint_stage", "joint_vq", "video_only"])
def test_costs(name: str, size: Size, vq: str) -> None:
    config = RECIPES[name]()
    if config.tokenizer.kind == "vq":
        config = replace(config, tokenizer=replace(config.tokenizer, path=vq))
    assert said(name, size) == cost(replace(config, model=resized(config.model, size)))


@pytest.mark.parametrize(
    ("name", "size", "clips"),
    [
        ("videomae_pretrain_k400", "base", 0),
        ("videomae_pretrain_k400_large", "large", 0),
        ("videomae_pretrain_ssv2", "base", 168913),
        ("videomae_pretrain_ssv2_large", "large", 168913),
        ("timesformer_image_stage", "base", 0),
        ("timesformer_joint_stage", "base", 0),
    ],
)
def test_costs_of_vision_transformers(name: str, size: str, clips: int, vq: str) -> None:
    config: Any = RECIPES[name]()
    if isinstance(config, Config):
        config = replace(config, tokenizer=replace(config.tokenizer, path=vq))
    assert said(name, size) == cost(config, clips)


@pytest.mark.parametrize("mask", ["tube 0.5T-T, 50 %", "tube 0.25T-0.75T", "tube T"])
def test_costs_of_table_9(mask: str) -> None:
    config = masked(mask_rows()[mask])
    assert said("mask_ablation", mask) == cost(replace(RECIPES["mask_ablation"](), clip_mask=config.clip_mask))


def test_frames_cost_what_images_cost() -> None:
    """As the docstring says: the configuration differs in where images come from alone."""
    config = RECIPES["joint_frames"]()
    assert replace(config, recipe="joint_stage", data=DataConfig()) == RECIPES["joint_stage"]()


def test_the_list_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    """`bevt pretrain` names each with its first line, which ends there and fits a terminal of 120 columns."""
    for command, recipes in (("pretrain", RECIPES), ("finetune", FINETUNE_RECIPES), ("contrast", CONTRAST_RECIPES)):
        with pytest.raises(SystemExit):
            cli.COMMANDS[command,]([])
        lines = capsys.readouterr().out.splitlines()[3:]
        assert [line.split()[0] for line in lines] == list(recipes)
        assert all(len(line) <= 120 and line.endswith(".") for line in lines)


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_a_recipe_knows_its_name_and_command(name: str) -> None:
    """What `bevt test` and `bevt slurm` go by."""
    config = ALL_RECIPES[name]()
    assert config.recipe == name
    known = {"pretrain": RECIPES, "finetune": FINETUNE_RECIPES, "contrast": CONTRAST_RECIPES}
    assert name in known[command_of(config)]


@pytest.mark.parametrize("name", [*CLASSES, "image_contrastive"])
def test_docstring_says_command_and_result(name: str) -> None:
    said = parts(name)
    assert {"Command", "Expected", "Settings"} <= said.keys()
    command = "contrast" if name == "image_contrastive" else "finetune"
    assert said["Command"].startswith(f"bevt {command} {name} ")


@pytest.mark.parametrize("name", [*CLASSES, "image_contrastive"])
def test_commands_of_learning_classes_can_be_run(name: str) -> None:
    """They parse, name every path that is needed, and start from or test what has been written before."""
    written = {"runs/joint_stage", "runs/vivit_k400_large"}
    for pretraining in RECIPES:
        written |= {shlex.split(command)[-1] for command in commands(pretraining) if " pretrain " in command}
    for command in commands(name):
        words = shlex.split(command)
        if words[1] == "test":
            path = words[3].removesuffix("/checkpoints/last")
            assert path in written
            default, rest = cli._recipe(words[2:], "test", FINETUNE_RECIPES)
            assert default == FINETUNE_RECIPES[name]()
            assert cli._parse(cli.TestArgs, rest[1:], "bevt test", cli.TestArgs(config=default)).config == default
            continue
        config: AnyConfig = contrasted(command) if words[1] == "contrast" else finetuned(command)
        check(config)
        if isinstance(config, FinetuneConfig):
            if not config.init.endswith(".safetensors"):  # somebody's file
                assert config.init.removesuffix("/checkpoints/last") in {"", *written}
            stream = "clips" if config.train.clips else "images"
            assert getattr(config.data, f"val_{stream}")
        written.add(words[words.index("--out") + 1])


TABLE = {
    "k400": {
        "optim.betas": (0.9, 0.999), "optim.lr": 3e-4, "optim.layer_decay": 0.9, "optim.backbone_factor": 1.0,
        "optim.weight_decay": 0.001, "optim.epochs": 60, "optim.warmup_epochs": 2.5, "optim.warmup_factor": 0.1,
        "optim.schedule": "epoch", "optim.clip_grad": 40, "optim.ema": 0.0, "model.drop_path": 0.3,
        "model.window_size": (8, 7, 7), "head.dropout": 0.5, "train.clips": 64, "train.images": 0, "data.frames": 32,
        "data.sampling": "dense", "data.stride": 2, "data.crop": 224, "data.crop_area": (0.08, 1.0), "data.flip": 0.5,
        "augment.rand_augment": 0, "augment.erasing": 0.0, "augment.label_smoothing": 0.0, "augment.mixup": 0.0,
        "augment.cutmix": 0.0, "test.clips": 4, "test.crops": 3, "data.short_side": (224, 224),
    },
    "ssv2": {
        "optim.betas": (0.9, 0.999), "optim.lr": 5e-4, "optim.layer_decay": 1.0, "optim.backbone_factor": 0.1,
        "optim.weight_decay": 0.05, "optim.epochs": 60, "optim.warmup_epochs": 2.5, "optim.warmup_factor": 0.1,
        "optim.schedule": "epoch", "optim.clip_grad": 0, "model.drop_path": 0.4, "model.window_size": (16, 7, 7),
        "head.dropout": 0.5, "train.clips": 64, "train.images": 0, "data.frames": 32, "data.sampling": "segments",
        "data.crop": 224, "data.crop_area": (0.08, 1.0), "data.flip": 0.0, "augment.rand_augment": 4,
        "augment.magnitude": 7, "augment.erasing": 0.25, "augment.label_smoothing": 0.1, "augment.mixup": 0.0,
        "augment.cutmix": 0.0, "test.clips": 1, "test.crops": 3, "data.short_side": (224, 224),
    },
}  # fmt: skip
"""The paper's appendix and the official configurations, key by key."""


@pytest.mark.parametrize("name", TABLE)
def test_finetuning_settings(name: str) -> None:
    config = FINETUNE_RECIPES[name]()
    assert replace(config.model, drop_path=0.3, window_size=(8, 7, 7)) == SIZES["base"]
    for key, value in TABLE[name].items():
        group, _, field = key.partition(".")
        assert getattr(getattr(config, group), field) == value, key


def test_the_average_of_eight_micro_batches() -> None:
    """Something-Something's: mmcv's hook keeps 0.9998 of the average at each of the eight that make a step."""
    assert FINETUNE_RECIPES["ssv2"]().optim.ema == pytest.approx(0.9998**8, abs=5e-6)


def test_diving48_is_finetuned_as_kinetics() -> None:
    """Nothing was published but the number of parameters, of the 8x7x7 window."""
    assert replace(FINETUNE_RECIPES["diving48"](), recipe="k400") == FINETUNE_RECIPES["k400"]()


def test_settings_of_moby() -> None:
    """Those of its authors' Swin-T (arXiv 2105.04553, section 4)."""
    config = CONTRAST_RECIPES["image_contrastive"]()
    assert config.moby == MoBYConfig(queue=4096, temperature=0.2, momentum=0.99)
    assert config.model == replace(SIZES["base"], window_size=(1, 7, 7), drop_path=0.2)
    assert config.train == BatchConfig(clips=0, images=512)
    optim = config.optim
    assert (optim.lr, optim.weight_decay, optim.epochs, optim.warmup_epochs) == (1e-3, 0.05, 300, 5)


def test_parameters_of_the_classifier() -> None:
    """Swin-B with Kinetics-400's classes: as many as torchvision says of its `swin3d_b`, 88.1 M in the paper."""
    config = FINETUNE_RECIPES["k400"]()
    with torch.device("meta"):
        model = VideoSwinClassifier(config.model, 400)
    count = sum(p.numel() for p in model.parameters())
    assert count == 88_048_984
    assert count / 1e6 == pytest.approx(88.1, abs=0.06)
