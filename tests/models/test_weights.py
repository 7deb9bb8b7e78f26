"""Key maps: strict, both ways, with every leftover named; inflation from 2D to 3D."""

from __future__ import annotations

import pytest
import torch

from bevt.config import ModelConfig
from bevt.models import weights
from bevt.models.bevt import BEVT
from bevt.models.classifier import VideoSwinClassifier
from bevt.models.weights import WeightsError

TINY = ModelConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(4, 3, 3))

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


def test_official_names_round_trip() -> None:
    model = BEVT(TINY, 50)
    official = weights.to_official(model.state_dict())
    assert set(OFFICIAL_KEYS) <= set(official)
    back = weights.from_official(official)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_official_shapes_of_swin_b() -> None:
    """Shapes that the official modules give their parameters (`swin_transformer_bevt.py`, in_channels=1024)."""
    with torch.device("meta"):
        official = weights.to_official(BEVT(ModelConfig(), 8192).state_dict())
    shapes = {k: tuple(v.shape) for k, v in official.items()}
    assert shapes["backbone.mask_token"] == (1, 1, 128)
    assert shapes["backbone.fpn.0.weight"] == (1024, 1024, 2, 2)
    assert shapes["backbone.fpn_s.0.weight"] == (1024, 1024, 1, 2, 2)
    assert shapes["backbone.fpn_t.0.weight"] == (1024, 1024, 2, 1, 1)
    assert shapes["backbone.lm_down.weight"] == shapes["backbone.lm_down_st.0.weight"] == (1024, 1536)
    assert shapes["backbone.layers.0.blocks.0.attn.relative_position_bias_table"] == (15 * 13 * 13, 4)
    assert shapes["cls_head.lm_head.weight"] == (8192, 1024)


def test_tokenizer_and_derived_buffers_of_an_official_checkpoint_are_left_out() -> None:
    official = weights.to_official(BEVT(TINY, 50).state_dict())
    official["cls_head.vae_encoder.blocks.input.w"] = torch.zeros(1)
    official["backbone.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(1)
    weights.load(BEVT(TINY, 50), weights.from_official(official))


def test_unknown_official_keys_are_an_error() -> None:
    with pytest.raises(WeightsError, match=r"unknown keys backbone\.surprise"):
        weights.from_official({"backbone.surprise": torch.zeros(1)})


def test_finetuning_starts_with_the_decoders_norm() -> None:
    """Quirk C."""
    model = BEVT(TINY, 50)
    torch.nn.init.normal_(model.norm.weight)
    backbone = weights.from_official_backbone(weights.to_official(model.state_dict()))
    classifier = VideoSwinClassifier(TINY, 10)
    report = weights.load(classifier, backbone, missing=[r"head\..*"])
    assert report.missing == ("head.weight", "head.bias")
    assert torch.equal(classifier.norm.weight, model.norm.weight)


def test_load_is_strict_and_writes_nothing_on_error() -> None:
    model, state = BEVT(TINY, 50), dict(BEVT(TINY, 50).state_dict())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del state["norm.weight"]
    state["extra"] = torch.zeros(1)
    state["head.bias"] = torch.zeros(51)
    with pytest.raises(WeightsError) as caught:
        weights.load(model, state)
    for part in ("missing: norm.weight", "left over: extra", "of another shape: head.bias (51,) for (50,)"):
        assert part in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inflation_repeats_the_image_model_over_time() -> None:
    flat = ModelConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(1, 3, 3))
    image = BEVT(flat, 50, ("images",))
    joint = BEVT(TINY, 50)
    report = weights.load(joint, weights.inflate(image.state_dict(), (4, 3, 3)), missing=[r"video_decoder\..*"])
    assert all(name.startswith("video_decoder.") for name in report.missing)
    assert report.unused == ()
    table = joint.encoder.layers[0].blocks[0].attn.relative_position_bias_table.view(7, 25, 1)
    assert all(
        torch.equal(table[i], image.encoder.layers[0].blocks[0].attn.relative_position_bias_table) for i in range(7)
    )
    pixels = torch.randn(2, 3, 64, 64)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    joint.eval(), image.eval()
    assert torch.equal(joint.decode("images", pixels, mask), image.decode("images", pixels, mask))
    still = pixels.unsqueeze(2).repeat(1, 1, 2, 1, 1)
    torch.testing.assert_close(joint.patch_embed(still), joint.patch_embed_2d(pixels), rtol=1e-4, atol=1e-5)


def test_inflation_refuses_tables_of_another_window() -> None:
    flat = ModelConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(1, 3, 3))
    state = BEVT(flat, 50, ("images",)).state_dict()
    with pytest.raises(WeightsError, match="25 rows; the table of a 2D window 7x7 has 169"):
        weights.inflate(state, (8, 7, 7))


def test_resized_tables_keep_a_linear_function_of_time() -> None:
    """Trilinear interpolation is exact for it, away from the ends."""
    ramp = torch.arange(15.0)[:, None, None].expand(15, 13, 13).reshape(-1, 1)
    out = weights.resize_tables({"a.relative_position_bias_table": ramp}, (8, 7, 7), (16, 7, 7))
    got = out["a.relative_position_bias_table"].view(31, 13, 13)[:, 3, 4]
    expected = ((torch.arange(31.0) + 0.5) * 15 / 31 - 0.5).clamp(0, 14)
    torch.testing.assert_close(got, expected)
