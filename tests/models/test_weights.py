"""Inflation from 2D to 3D, other windows, and starts of classifiers: strict, with every leftover named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from swins import FLAT, SEVEN, SWIN_T, TINY, ImageClassifier, equal, official_pretraining, scrambled
from torch import Tensor, nn

from bevt.models import names, weights
from bevt.models.bevt import BEVT
from bevt.models.classifier import VideoSwinClassifier
from bevt.models.names import Source, WeightsError


def _close(got: Tensor, expected: Tensor) -> None:
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-4, f"relative difference {error:.2e}"


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
    assert equal(dict(model.state_dict()), before)


def test_inflation_repeats_the_image_model_over_time() -> None:
    image = BEVT(FLAT, 50, ("images",))
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
    state = BEVT(FLAT, 50, ("images",)).state_dict()
    with pytest.raises(WeightsError, match="25 rows; the table of a 2D window 7x7 has 169"):
        weights.inflate(state, (8, 7, 7))


def test_resized_tables_keep_a_linear_function_of_time() -> None:
    """Trilinear interpolation is exact for it, away from the ends."""
    ramp = torch.arange(15.0)[:, None, None].expand(15, 13, 13).reshape(-1, 1)
    out = weights.resize_tables({"a.relative_position_bias_table": ramp}, (8, 7, 7), (16, 7, 7))
    got = out["a.relative_position_bias_table"].view(31, 13, 13)[:, 3, 4]
    expected = ((torch.arange(31.0) + 0.5) * 15 / 31 - 0.5).clamp(0, 14)
    torch.testing.assert_close(got, expected)


def test_image_classifier_gives_the_logits_of_torchvisions_swin(swin: nn.Module) -> None:
    ours = ImageClassifier(SWIN_T, 1000)
    source = names.recognise(swin.state_dict())
    report = weights.take(ours, source)
    assert report.missing == ()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        _close(ours(images), swin(images))


@pytest.mark.parametrize("window", [(8, 7, 7), (2, 7, 7)], ids=["one window in time", "shifted in time"])
def test_an_inflated_swin_sees_a_still_clip_as_the_image(swin: nn.Module, window: tuple[int, int, int]) -> None:
    """Keys that differ by time alone are equal, and so are their biases: attention to them sums to the image's."""
    ours = VideoSwinClassifier(replace(SWIN_T, window_size=window), 1000).eval()
    weights.load(ours, weights.for_classifier(names.recognise(swin.state_dict()), window, "clips", norm=False).state)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        _close(ours(images.unsqueeze(2).repeat(1, 1, 8, 1, 1)), swin(images))


@pytest.mark.parametrize("stream", ["clips", "images"])
def test_a_classifier_starts_with_the_encoder_of_a_pretraining(stream: Any) -> None:
    model, official = official_pretraining()
    clips = stream == "clips"
    ours = VideoSwinClassifier(TINY, 5) if clips else ImageClassifier(TINY, 5)
    report = weights.start(ours, names.recognise(official), (4, 3, 3), stream, norm=True)
    assert report.missing == ("head.weight", "head.bias")
    assert any(k.startswith("patch_embed_2d." if clips else "patch_embed.") for k in report.unused)
    pixels = torch.randn(2, 3, *([8] if clips else []), 64, 64)
    embed = ours.patch_embed if clips else ours.patch_embed_2d
    mask = torch.zeros(2, *([4] if clips else []), 4, 4, dtype=torch.bool)
    assert torch.equal(ours.encoder(embed(pixels))[-1], model.encode(stream, pixels, mask)[1])
    assert torch.equal(ours.norm.weight, model.norm.weight)


def test_the_decoders_norm_stays_out_where_the_caller_says_so() -> None:
    """Without quirk C."""
    ours = VideoSwinClassifier(TINY, 5)
    report = weights.start(ours, names.recognise(official_pretraining()[1]), (4, 3, 3), "clips", norm=False)
    assert torch.equal(ours.norm.weight, torch.ones(128))
    assert set(report.missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert {"norm.weight", "norm.bias"} <= set(report.unused)


def test_images_see_a_video_classifier_as_a_still_clip_of_one_token() -> None:
    """Two equal frames are one token of depth, whose window clips to zero distance in time."""
    video = scrambled(VideoSwinClassifier(TINY, 5))
    ours = ImageClassifier(TINY, 5)
    weights.load(
        ours, weights.for_classifier(names.recognise(video.state_dict()), (1, 3, 3), "images", norm=True).state
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        _close(ours(images), video(images.unsqueeze(2).repeat(1, 1, 2, 1, 1)))


def test_images_keep_the_rows_of_zero_distance_as_they_are() -> None:
    key = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    source = names.recognise(VideoSwinClassifier(SEVEN, 5).state_dict())
    got = weights.for_classifier(source, (1, 7, 7), "images", norm=True).state[key]
    assert torch.equal(got, source.state[key][7 * 169 : 8 * 169])


def test_tables_of_another_depth_are_resized() -> None:
    source = names.recognise(VideoSwinClassifier(SEVEN, 5).state_dict())
    got = weights.for_classifier(source, (16, 7, 7), "clips", norm=True).state
    assert equal(got, weights.resize_tables(source.state, (8, 7, 7), (16, 7, 7)))
    weights.load(VideoSwinClassifier(replace(SEVEN, window_size=(16, 7, 7)), 5), got)


@pytest.mark.parametrize("stream", ["clips", "images"])
def test_tables_of_another_height_or_width_are_refused(stream: Any) -> None:
    source = names.recognise(VideoSwinClassifier(TINY, 5).state_dict())
    with pytest.raises(WeightsError, match=r"bias_table has 175 rows, .* the 169 of a window 7x7"):
        weights.for_classifier(source, (4, 7, 7), stream, norm=True)


def test_a_head_stays_as_it_was_unless_asked_for(swin3d: nn.Module) -> None:
    source = names.recognise(swin3d.state_dict())
    ours = VideoSwinClassifier(SEVEN, 11)
    before = ours.head.weight.clone()
    report = weights.start(ours, source, (8, 7, 7), "clips", norm=False)
    assert torch.equal(ours.head.weight, before)
    assert (report.missing, report.unused[:2]) == (("head.weight", "head.bias"),) * 2
    weights.take(ours, source)
    assert torch.equal(ours.head.weight, swin3d.head.weight)


def test_a_report_counts_names_that_differ_by_numbers_as_one() -> None:
    report = weights.Report(("a",), (), tuple(f"layers.{i}.blocks.{j}.conv2" for i in range(4) for j in range(9)))
    assert str(report) == "1 tensors loaded; not used: layers.*.blocks.*.conv2"


def _without(source: Source, key: str) -> Source:
    return replace(source, state={k: v for k, v in source.state.items() if k != key})


def test_starts_that_do_not_fit_are_refused(swin3d: nn.Module) -> None:
    source = names.recognise(swin3d.state_dict())
    eleven = VideoSwinClassifier(SEVEN, 11)

    def start(model: nn.Module, source: Source) -> weights.Report:
        return weights.start(model, source, (8, 7, 7), "clips", norm=False)

    def refused(message: str, model: nn.Module, source: Source, load: Any = start) -> None:
        with pytest.raises(WeightsError, match=message):
            load(model, source)

    refused(r"swin: .*missing: norm\.bias", eleven, _without(source, "norm.bias"))
    refused(r"missing: patch_embed\.norm\.bias", eleven, _without(source, "patch_embed.norm.bias"))
    refused(
        r"another shape: head\.weight \(11, 128\) for \(5, 128\)", VideoSwinClassifier(SEVEN, 5), source, weights.take
    )
    refused(r"left over: encoder\.layers\.2", VideoSwinClassifier(replace(SEVEN, depths=(2, 2, 1, 2)), 11), source)
    refused(r"no classes to be tested on: finetune", eleven, _without(source, "head.weight"), weights.take)
