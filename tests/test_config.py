"""The configuration: strict both ways, and errors that name the key."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from bevt.config import Config, ConfigError, DataConfig, MaskConfig, TrainConfig, check, from_dict, keys, to_dict
from bevt.recipes import ALL_RECIPES, RECIPES


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_recipes_survive_json(name: str) -> None:
    config = ALL_RECIPES[name]()
    assert config.recipe == name
    assert from_dict(json.loads(json.dumps(to_dict(config))), type(config)) == config


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_recipes_run_once_data_is_named(name: str) -> None:
    config = ALL_RECIPES[name]()
    check(replace(config, data=replace(config.data, clips="videos", images="images")))


def test_official_quirks_need_whole_windows() -> None:
    config = RECIPES["joint_stage"]()
    named = replace(config, data=replace(config.data, clips="videos", images="images"))
    official = replace(named, model=replace(named.model, quirks="official"))
    check(official)
    small = replace(official, data=replace(official.data, crop=256))
    with pytest.raises(ConfigError, match=r"model.quirks 'official' cannot run images of data.crop 256: .*map of 8x8"):
        check(small)
    check(replace(small, train=replace(small.train, images=0)))


def test_joint_stage_is_the_official_configuration() -> None:
    """`swin_base_patch244_window877_bevt_in1k_k400.py` at 8881b21, and the table of the paper's appendix."""
    c = RECIPES["joint_stage"]()
    assert (c.model.embed_dim, c.model.depths, c.model.num_heads) == (128, (2, 2, 18, 2), (4, 8, 16, 32))
    assert (c.model.window_size, c.model.drop_path) == ((8, 7, 7), 0.3)
    assert (c.data.frames, c.data.stride, c.data.crop, c.data.short_side) == (16, 8, 224, (256, 320))
    assert (c.data.flip, c.data.jitter) == (0.5, 0.4)
    assert (c.optim.lr, c.optim.betas, c.optim.weight_decay, c.optim.clip_grad) == (5e-4, (0.9, 0.999), 0.05, 3.0)
    assert (c.optim.epochs, c.optim.warmup_epochs, c.optim.warmup_factor) == (150, 10, 0.1)
    assert (c.train.clips, c.train.images, c.train.loss_weight) == (256, 2048, 1.0)
    assert (c.clip_mask.kind, c.clip_mask.ratio, c.clip_mask.min_block, c.clip_mask.tube) == (
        "tube",
        0.5,
        16,
        (0.5, 1.0),
    )
    assert c.image_mask == replace(c.clip_mask, kind="block")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"optim": {"lrr": 1.0}}, "'optim.lrr'.*nearest is 'optim.lr'"),
        ({"optmi": {}}, "'optmi'.*nearest is 'optim'"),
        ({"optim": {"lr": "fast"}}, "optim.lr must be float, got 'fast'"),
        ({"optim": 3}, "optim must be a group of keys, got 3"),
        ({"train": {"clips": 1.5}}, "train.clips must be int"),
        ({"train": {"clips": True}}, "train.clips must be int, got True"),
        ({"train": {"parallel": "tp"}}, "train.parallel must be one of 'ddp', 'fsdp', got 'tp'"),
        ({"model": {"window_size": [7, 7]}}, "model.window_size must be a list"),
        ({"model": {"depths": [2, "2"]}}, r"model.depths\[1\] must be int, got '2'"),
    ],
)
def test_from_dict_names_what_is_wrong(data: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_dict(data)


BASE = Config(data=DataConfig(clips="videos", images="images"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (replace(BASE, model=replace(BASE.model, depths=(2, 2))), "need 4 stages"),
        (
            replace(BASE, model=replace(BASE.model, num_heads=(3, 8, 16, 32))),
            r"num_heads\[0\] = 3 does not divide the 128",
        ),
        (replace(BASE, data=replace(BASE.data, crop=100)), "data.crop must be a multiple of 32.*got 100"),
        (replace(BASE, data=replace(BASE.data, short_side=(200, 256))), "data.short_side.*224 or above"),
        (replace(BASE, data=replace(BASE.data, frames=7)), "data.frames must be even"),
        (replace(BASE, data=replace(BASE.data, clips="")), "data.clips is empty but train.clips is not 0"),
        (replace(BASE, data=replace(BASE.data, images="")), "data.images is empty"),
        (replace(BASE, train=TrainConfig(clips=0, images=0)), "at least one stream"),
        (replace(BASE, clip_mask=MaskConfig(kind="block")), "clip_mask.kind 'block'"),
        (replace(BASE, image_mask=MaskConfig(kind="tube")), "image_mask.kind must be 'block'"),
        (replace(BASE, clip_mask=MaskConfig(ratio=0.0)), "clip_mask.ratio"),
        (replace(BASE, clip_mask=MaskConfig(tube=(0.8, 0.5))), "clip_mask.tube must be a range"),
        (replace(BASE, clip_mask=MaskConfig(tube=(0.5, 1.5))), r"clip_mask.tube\[1\] must be from 0 to 1, got 1.5"),
        (replace(BASE, optim=replace(BASE.optim, lr=0.0)), "optim.lr must be above 0"),
        (replace(BASE, optim=replace(BASE.optim, lr=float("nan"))), "optim.lr must be above 0, got nan"),
        (replace(BASE, optim=replace(BASE.optim, warmup_epochs=200)), "warmup_epochs = 200 is longer"),
        (replace(BASE, train=replace(BASE.train, log_every=0)), "train.log_every must be above 0, got 0"),
        (replace(BASE, train=replace(BASE.train, keep=0)), "train.keep must be above 0"),
        (replace(BASE, data=replace(BASE.data, workers=-1)), "data.workers must be 0 or above"),
        (replace(BASE, model=replace(BASE.model, drop_path=1.0)), "model.drop_path must be 0 or above and below 1"),
    ],
)
def test_check_names_what_cannot_run(config: Config, says: str) -> None:
    check(BASE)
    with pytest.raises(ConfigError, match=says):
        check(config)


def test_keys_are_dotted() -> None:
    assert "data.short_side" in keys(Config)
    assert "recipe" in keys(Config)


def test_configuration_and_recipes_need_the_standard_library_only() -> None:
    code = (
        "import sys, bevt.recipes; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'tyro'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
