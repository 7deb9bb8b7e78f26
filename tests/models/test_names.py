"""Key maps: strict, both ways, with every leftover named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from swins import TINY, ImageClassifier, equal, official_pretraining
from torch import Tensor, nn

from bevt.config import ModelConfig
from bevt.models import names, weights
from bevt.models.bevt import BEVT
from bevt.models.classifier import VideoSwinClassifier
from bevt.models.names import Source, WeightsError

OFFICIAL_KEYS = (
    "backbone.patch_embed.proj.weight",
    "backbone.patch_embed_2d.norm.bias",
    "backbone.mask_token",
    "backbone.layers.2.blocks.1.attn.relative_position_bias_table",
    "backbone.layers.0.blocks.0.mlp.fc1.weight",
    "backbone.layers.1.downsample.reduction.weight",
    "backbone.norm.weight",
    "backbone.lm_down.weight",
    "backbone.fpn.0.weight",
    "backbone.lm_down_st.0.bias",
    "backbone.fpn_s.0.weight",
    "backbone.fpn_t.0.bias",
    "cls_head.lm_head.weight",
)


def _microsoft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's 2D Swin by the names of microsoft/Swin-Transformer, with the buffers that it keeps."""
    table = {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm"}
    for stage in range(4):
        table[f"features.{2 * stage + 2}"] = f"layers.{stage}.downsample"
        for block in range(6):
            table[f"features.{2 * stage + 1}.{block}"] = f"layers.{stage}.blocks.{block}"
    out = {}
    for key, value in state.items():
        for theirs in sorted(table, key=len, reverse=True):
            if key.startswith(theirs + "."):
                key = table[theirs] + key[len(theirs) :]
                break
        out[key.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")] = value
    out["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return out


def _mmaction(state: dict[str, Tensor], norm: str = "norm") -> dict[str, Tensor]:
    """Torchvision's video Swin by the names of Video Swin's recogniser."""
    out = {}
    for key, value in state.items():
        part, *rest = key.split(".")
        if part == "head":
            new = ["cls_head", "fc_cls", *rest]
        elif part == "norm":
            new = ["backbone", norm, *rest]
        elif part == "features" and int(rest[0]) % 2:
            new = ["backbone", "layers", str(int(rest[0]) // 2), "downsample", *rest[1:]]
        elif part == "features":
            new = ["backbone", "layers", str(int(rest[0]) // 2), "blocks", *rest[1:]]
        else:
            new = ["backbone", part, *rest]
        out[".".join(new).replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")] = value
    return out


def _moby(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Microsoft's Swin as the online encoder in a checkpoint of SwinTransformer/Transformer-SSL (`models/moby.py`)."""
    encoder = {k: v for k, v in state.items() if not k.startswith("head.")}
    others = (
        "projector.linear_out.bias",
        "projector_k.linear_out.bias",
        "predictor.linear_hidden.2.num_batches_tracked",
    )
    return {
        **{f"encoder.{k}": v for k, v in encoder.items()},
        **{f"encoder_k.{k}": torch.zeros_like(v) for k, v in encoder.items()},
        **dict.fromkeys((*others, "queue1", "queue2", "queue_ptr"), torch.zeros(1)),
    }


def test_official_names_round_trip() -> None:
    model = BEVT(TINY, 50)
    official = names.to_official(model.state_dict())
    assert set(OFFICIAL_KEYS) <= set(official)
    assert equal(names.from_official(official), model.state_dict())


def test_official_shapes_of_swin_b() -> None:
    """Shapes that the official modules give their parameters (`swin_transformer_bevt.py`, in_channels=1024)."""
    with torch.device("meta"):
        official = names.to_official(BEVT(ModelConfig(), 8192).state_dict())
    shapes = {k: tuple(v.shape) for k, v in official.items()}
    assert shapes["backbone.mask_token"] == (1, 1, 128)
    assert shapes["backbone.fpn.0.weight"] == (1024, 1024, 2, 2)
    assert shapes["backbone.fpn_s.0.weight"] == (1024, 1024, 1, 2, 2)
    assert shapes["backbone.fpn_t.0.weight"] == (1024, 1024, 2, 1, 1)
    assert shapes["backbone.lm_down.weight"] == shapes["backbone.lm_down_st.0.weight"] == (1024, 1536)
    assert shapes["backbone.layers.0.blocks.0.attn.relative_position_bias_table"] == (15 * 13 * 13, 4)
    assert shapes["cls_head.lm_head.weight"] == (8192, 1024)


def test_tokenizer_and_derived_buffers_of_an_official_checkpoint_are_left_out() -> None:
    weights.load(BEVT(TINY, 50), names.from_official(official_pretraining()[1]))


def test_unknown_official_keys_are_an_error() -> None:
    with pytest.raises(WeightsError, match=r"unknown keys backbone\.surprise"):
        names.from_official({"backbone.surprise": torch.zeros(1)})


def test_an_official_pretraining_is_recognised_and_all_that_a_classifier_lacks_is_named() -> None:
    model, official = official_pretraining()
    source = names.recognise(official)
    parts = ("patch_embed.", "patch_embed_2d.", "encoder.", "norm.")
    assert (source.what, source.masked) == ("an official BEVT pretraining checkpoint", True)
    assert equal(source.state, {k: v for k, v in model.state_dict().items() if k.startswith(parts)})
    assert {k.split(".")[1] for k in source.dropped} == {
        *("mask_token", "lm_down", "fpn", "lm_down_st", "fpn_s", "fpn_t", "lm_head", "vae_encoder", "layers")
    }


@pytest.mark.parametrize("norm", ["norm", "norm3"], ids=["Video Swin", "mmaction2"])
def test_video_swin_names_are_recognised(swin3d: nn.Module, norm: str) -> None:
    theirs = swin3d.state_dict()
    source = names.recognise(_mmaction(theirs, norm))
    assert (source.what, source.masked) == ("a Video Swin checkpoint", False)
    assert equal(source.state, names.from_torchvision(theirs))
    assert len(source.dropped) == 8
    assert all(k.endswith("relative_position_index") for k in source.dropped)


def test_a_classifier_goes_to_video_swins_names_and_back(swin3d: nn.Module) -> None:
    theirs = swin3d.state_dict()
    exported = names.to_video_swin(names.from_torchvision(theirs), (8, 7, 7))
    assert equal(exported, _mmaction(theirs))


def test_a_classifier_of_images_has_no_name_in_video_swin() -> None:
    with pytest.raises(WeightsError, match=r"not a VideoSwinClassifier of clips: unknown keys patch_embed_2d\.proj"):
        names.to_video_swin(ImageClassifier(TINY, 5).state_dict(), (1, 3, 3))


@pytest.mark.parametrize(
    ("what", "rename", "classes"),
    [("a Swin checkpoint", _microsoft, True), ("a checkpoint of MoBY", lambda state: _moby(_microsoft(state)), False)],
)
def test_names_of_image_models_are_recognised(
    swin: nn.Module, what: str, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]], classes: bool
) -> None:
    """They give what torchvision's names give, of which `test_weights.py` compares outputs."""
    theirs = swin.state_dict()
    source, expected = names.recognise(rename(theirs)), names.recognise(theirs)
    assert (source.what, source.masked) == (what, False)
    assert (expected.what, expected.masked) == ("a torchvision swin", False)
    assert equal(source.state, {k: v for k, v in expected.state.items() if classes or not k.startswith("head.")})


def test_all_else_in_a_checkpoint_of_moby_is_named(swin: nn.Module) -> None:
    moby = _moby(_microsoft(swin.state_dict()))
    dropped = names.recognise(moby).dropped
    assert {k.split(".")[0] for k in dropped} == {
        *("encoder", "encoder_k", "projector", "projector_k", "predictor", "queue1", "queue2", "queue_ptr")
    }
    assert all(k.endswith(("relative_position_index", "attn_mask")) for k in dropped if k.startswith("encoder."))


@pytest.mark.parametrize("streams", [("clips",), ("images",), ("clips", "images")])
def test_own_pretraining_is_recognised(streams: tuple[Any, ...]) -> None:
    state = BEVT(TINY, 50, streams).state_dict()
    source = names.recognise(state)
    assert (source.what, source.masked) == ("a BEVT of this project", True)
    assert sorted((*source.state, *source.dropped)) == sorted(state)
    assert {k.split(".")[0] for k in source.dropped} == {
        *("mask_token", "head"),
        *(f"{stream.removesuffix('s').replace('clip', 'video')}_decoder" for stream in streams),
    }


def test_own_moby_is_recognised() -> None:
    online = {k: v for k, v in ImageClassifier(TINY, 5).state_dict().items() if not k.startswith("head.")}
    others = {**{f"key.{k}": v for k, v in online.items()}, **dict.fromkeys(("predictor.fc1.bias", "queues"), Tensor())}
    source = names.recognise({**online, **others})
    assert source == Source("a MoBY of this project", source.state, tuple(others))
    assert equal(source.state, online)


@pytest.mark.parametrize("model", [VideoSwinClassifier(TINY, 5), ImageClassifier(TINY, 5)], ids=["clips", "images"])
def test_own_classifiers_are_recognised(model: nn.Module) -> None:
    source = names.recognise(model.state_dict())
    assert source == Source("a classifier of this project", source.state)
    assert equal(source.state, model.state_dict())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"stem.weight": (1,)}, r"none of official BEVT.*: stem\.weight"),
        ({"layers.0.x": (1,), "absolute_pos_embed": (1,)}, r"not a Swin checkpoint: unknown keys absolute_pos_embed"),
        (
            {"backbone.mask_token": (1,), "cls_head.fc_cls.bias": (1,)},
            r"not an official .* keys cls_head\.fc_cls",
        ),
        ({"features.1.0.norm1.weight": (1,)}, r"a torchvision swin, but without .* patch embedding: features\.1\.0"),
        ({"layers.0.x": (1,), "patch_embed.proj.weight": (4, 3, 2, 4, 4)}, r"is \(4, 3, 2, 4, 4\), where 4 axes"),
    ],
    ids=["nobody's", "Swin's and one more", "two heads", "no patch embedding", "a patch embedding of clips"],
)
def test_names_that_do_not_fit_are_refused(state: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        names.recognise({key: torch.zeros(shape) for key, shape in state.items()})
