"""Runs that start from the weights of another: inflated, in part, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import changed, signalling

from bevt.config import Config
from bevt.models.weights import WeightsError
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train import checkpoint
from bevt.train.pretrain import pretrain


@pytest.fixture(scope="module")
def image_stage(config: Config) -> Config:
    """The image stream alone, with 2D windows."""
    return changed(config, model={"window_size": (1, 3, 3)}, train={"clips": 0}, optim={"max_steps": 2})


@pytest.fixture(scope="module")
def image_weights(image_stage: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last checkpoint."""
    return pretrain(image_stage, tmp_path_factory.mktemp("image_stage"), quiet=True).checkpoint


def first_checkpoint(config: Config, init: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights with which a run from `init` starts."""
    with monkeypatch.context() as patch:
        patch.setattr("bevt.train.pretrain.build_optimizer", signalling())
        result = pretrain(replace(config, init=str(init)), out, quiet=True)
    assert result.step == 0
    return checkpoint.load(result.checkpoint)["model"]


def test_joint_stage_from_the_image_stage(
    config: Config, image_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared weights as they were; patch embedding and bias tables inflated to clips; the run goes on from there."""
    old = checkpoint.load(image_weights)["model"]
    new = first_checkpoint(config, image_weights, tmp_path, monkeypatch)
    table = "encoder.layers.2.blocks.1.attn.relative_position_bias_table"
    assert torch.equal(new["patch_embed.proj.weight"].sum(2), old["patch_embed_2d.proj.weight"])
    assert torch.equal(new[table], old[table].repeat(2 * 4 - 1, 1))
    same = [key for key in old if key in new and old[key].shape == new[key].shape]
    assert {"head.weight", "mask_token", "image_decoder.fuse.weight", "norm.weight"} <= set(same)
    assert all(torch.equal(old[key], new[key]) for key in same)
    assert all(key.startswith(("patch_embed.", "video_decoder.")) for key in new.keys() - old.keys())
    assert pretrain(replace(config, init=str(image_weights)), tmp_path, resume=True, quiet=True).finished


def test_image_stage_from_itself(
    image_stage: Config, image_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights, and no optimizer state."""
    old, new = (
        checkpoint.load(image_weights)["model"],
        first_checkpoint(image_stage, image_weights, tmp_path, monkeypatch),
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_video_only_from_the_joint_stage(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What images alone use is left out."""
    old = checkpoint.load(finished / "checkpoints" / "last")["model"]
    new = first_checkpoint(
        changed(config, train={"images": 0}), finished / "checkpoints" / "last", tmp_path, monkeypatch
    )
    assert all(torch.equal(old[key], value) for key, value in new.items())
    assert all(key.startswith(("patch_embed_2d.", "image_decoder.")) for key in old.keys() - new.keys())


def test_weights_of_another_size(config: Config, image_weights: Path, tmp_path: Path) -> None:
    """The file, a tensor and both shapes."""
    wide = replace(changed(config, model={"embed_dim": 32}), init=str(image_weights))
    with pytest.raises(
        WeightsError, match=r"step_00000002: .* of another shape: mask_token \(1, 1, 16\) for \(1, 1, 32\)"
    ):
        pretrain(wide, tmp_path, quiet=True)


def test_weights_for_another_tokenizer(config: Config, image_weights: Path, tmp_path: Path) -> None:
    """Even one of the same size."""
    path = tmp_path / "other.safetensors"
    VQTokenizer(VQModel(VQConfig(image_size=32, vocab_size=32, code_dim=4, width=4, blocks=0))).save(path)
    other = replace(changed(config, tokenizer={"path": str(path)}), init=str(image_weights))
    with pytest.raises(WeightsError, match=r"step_00000002: its head predicts the codes of another tokenizer"):
        pretrain(other, tmp_path / "run", quiet=True)


def test_clips_from_images_with_3d_windows(config: Config, tmp_path: Path) -> None:
    """Such tables cannot be inflated: the message says which recipe's can."""
    images = changed(config, train={"clips": 0}, optim={"max_steps": 1})
    path = pretrain(images, tmp_path / "images", quiet=True).checkpoint
    with pytest.raises(
        WeightsError, match=r"3D windows \(4, 3, 3\) has no weights for clips; start from .*image_stage"
    ):
        pretrain(replace(config, init=str(path)), tmp_path / "run", quiet=True)
