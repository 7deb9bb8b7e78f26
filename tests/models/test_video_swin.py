"""Video Swin against torchvision's, its cost against the published figures, and the image stream's special cases."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bevt.config import SIZES, ModelConfig, plain
from bevt.models import names, weights
from bevt.models.classifier import VideoSwinClassifier
from bevt.models.video_swin import PatchMerging, VideoSwin, WindowAttention3D, clip_window

TORCHVISION = {"swin3d_t": SIZES["tiny"], "swin3d_s": SIZES["small"], "swin3d_b": SIZES["base"]}
TINY = ModelConfig(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=(8, 7, 7), drop_path=0.0)
CLEAN = plain(ModelConfig())
OFFICIAL = replace(CLEAN, quirks="official")


def _torchvision(video: ModuleType, name: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(video, name)().eval()
    for key, p in model.named_parameters():
        if key.endswith(("bias", "bias_table")):  # initialised to zero, where an error could hide
            nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin3d_t", (16, 224, 224)),
        ("swin3d_t", (4, 224, 256)),  # time clips below the window; 8 columns in stage 4 pad to 14
        ("swin3d_t", (6, 230, 250)),  # odd maps: padded patches, padded windows, padded merging
        ("swin3d_s", (8, 224, 224)),
        ("swin3d_b", (8, 224, 224)),
    ],
)
def test_outputs_equal_torchvision(torchvision_video: ModuleType, name: str, size: tuple[int, int, int]) -> None:
    theirs = _torchvision(torchvision_video, name)
    ours = VideoSwinClassifier(TORCHVISION[name], 400).eval()
    weights.load(ours, names.from_torchvision(theirs.state_dict()))
    clips = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected, got = theirs(clips), ours(clips)
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-4, f"{name} at {size}: relative difference {error:.2e}"


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_names_round_trip(torchvision_video: ModuleType, name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision_video, name)().state_dict()
    with torch.device("meta"):
        ours = VideoSwinClassifier(TORCHVISION[name], 400).state_dict()
    renamed = names.from_torchvision(theirs)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in ours.items()}
    back = names.to_torchvision(ours, (8, 7, 7))
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in theirs.items()}


def test_torchvision_derived_indices_are_equal(torchvision_video: ModuleType) -> None:
    theirs = torchvision_video.swin3d_t().state_dict()
    back = names.to_torchvision(names.from_torchvision(theirs), (8, 7, 7))
    assert all(torch.equal(back[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    ("shape", "published", "digits"),
    [((1, 3, 16, 224, 224), 140.7, 1), ((1, 3, 32, 224, 224), 281, 0), ((1, 3, 2, 224, 224), 15.4, 1)],
    ids=["16 frames", "32 frames", "an image (one token of depth)"],
)
def test_swin_b_multiply_adds(shape: tuple[int, ...], published: float, digits: int) -> None:
    with torch.device("meta"):
        model = VideoSwinClassifier(ModelConfig(), 400, device="meta")
        with FlopCounterMode(display=False) as counter:
            model.features(torch.empty(shape))
    assert round(counter.get_total_flops() / 2e9, digits) == published


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 28.16), ("small", 49.82), ("base", 88.05), ("large", 196.95)]
)  # torchvision's published sizes, 400 classes
def test_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = VideoSwinClassifier(SIZES[name], 400)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_windows_clip_and_then_do_not_shift() -> None:
    assert clip_window((8, 56, 56), (8, 7, 7), (4, 3, 3)) == ((8, 7, 7), (0, 3, 3))
    assert clip_window((16, 7, 56), (8, 7, 7), (4, 3, 3)) == ((8, 7, 7), (4, 0, 3))
    assert clip_window((1, 3, 6), (8, 7, 7), (4, 3, 3)) == ((1, 3, 6), (0, 0, 0))


def test_an_image_reads_the_zero_distance_rows_of_the_table() -> None:
    """Paper section 3.3; spec: rows 7*169 .. 8*169 of the (8, 7, 7) table."""
    torch.manual_seed(0)
    attention = WindowAttention3D(CLEAN, 32, 2, (0, 3, 3))
    x = torch.randn(2, 1, 14, 14, 32)
    flat = WindowAttention3D(replace(CLEAN, window_size=(1, 7, 7)), 32, 2, (0, 3, 3))
    state = attention.state_dict()
    state["relative_position_bias_table"] = state["relative_position_bias_table"][7 * 169 : 8 * 169]
    flat.load_state_dict(state)
    assert torch.equal(attention(x), flat(x))
    with torch.no_grad():
        attention.relative_position_bias_table[: 7 * 169] += 1.0
        attention.relative_position_bias_table[8 * 169 :] -= 1.0
    assert torch.equal(attention(x), flat(x))


def _official_image_attention(attention: WindowAttention3D, x: torch.Tensor) -> torch.Tensor:
    """The official image branch in its own terms: roll by the block's shift, but mask by half a window always."""
    b, _, h, w, c = x.shape
    heads, (_, wh, ww) = attention.num_heads, attention.window_size
    half, shift = (wh // 2, ww // 2), attention.shift[1:]
    region = torch.zeros(h, w)
    for i, rows in enumerate((slice(0, h - wh), slice(h - wh, h - half[0]), slice(h - half[0], h))):
        for j, columns in enumerate((slice(0, w - ww), slice(w - ww, w - half[1]), slice(w - half[1], w))):
            region[rows, columns] = 3 * i + j

    def windows(t: torch.Tensor) -> torch.Tensor:  # (B, h, w, n) -> (B, windows, wh * ww, n)
        t = t.view(t.shape[0], h // wh, wh, w // ww, ww, -1).permute(0, 1, 3, 2, 4, 5)
        return t.reshape(t.shape[0], -1, wh * ww, t.shape[-1])

    rolled = x[:, 0].roll((-shift[0], -shift[1]), (1, 2))
    q, k, v = attention.qkv(windows(rolled)).view(b, -1, wh * ww, 3, heads, c // heads).permute(3, 0, 1, 4, 2, 5)
    regions = windows(region[None, ..., None])[0, ..., 0]
    mask = -100.0 * (regions[:, None, :] != regions[:, :, None]).float()
    row, column = torch.arange(wh * ww) // ww, torch.arange(wh * ww) % ww
    index = (row[:, None] - row + wh - 1) * (2 * ww - 1) + column[:, None] - column + ww - 1
    zero = (attention.window_size[0] - 1) * (2 * wh - 1) * (2 * ww - 1)
    bias = attention.relative_position_bias_table[zero + index].permute(2, 0, 1)
    scores = q @ k.mT * (c // heads) ** -0.5 + bias + mask[:, None]
    out = (scores.softmax(-1) @ v).transpose(2, 3).reshape(b, h // wh, w // ww, wh, ww, c)
    out = out.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c).roll(shift, (1, 2))
    return attention.proj(out).unsqueeze(1)


@pytest.mark.parametrize("shift", [(0, 0, 0), (4, 3, 3)], ids=["unshifted block", "shifted block"])
@pytest.mark.parametrize("size", [14, 7], ids=["stage 3", "stage 4"])
def test_official_quirks_of_the_image_stream(shift: tuple[int, int, int], size: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttention3D(OFFICIAL, 32, 2, shift)
    x = torch.randn(2, 1, size, size, 32)
    torch.testing.assert_close(attention(x), _official_image_attention(attention, x), rtol=1e-5, atol=1e-6)
    clean = WindowAttention3D(CLEAN, 32, 2, shift)
    clean.load_state_dict(attention.state_dict())
    same = size == 14 and any(shift)  # the one case in which the official code has no accident
    assert torch.allclose(attention(x), clean(x), atol=1e-6) == same


def test_official_quirks_leave_clips_alone() -> None:
    torch.manual_seed(0)
    clean = VideoSwin(TINY)
    official = VideoSwin(replace(TINY, quirks="official"))
    official.load_state_dict(clean.state_dict())
    x = torch.randn(1, 2, 56, 56, 16)
    assert all(torch.equal(a, b) for a, b in zip(clean(x), official(x)))


def test_official_quirks_refuse_a_map_that_would_need_padding() -> None:
    attention = WindowAttention3D(OFFICIAL, 32, 2, (0, 0, 0))
    with pytest.raises(ValueError, match=r"12x12.*multiple of the 7x7 window"):
        attention(torch.randn(1, 1, 12, 12, 32))


def test_patch_merging_takes_neighbours_in_the_published_order() -> None:
    merging = PatchMerging(CLEAN, 1)
    nn.init.eye_(merging.reduction.weight)
    merging.norm = nn.Identity()  # type: ignore[assignment]
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 2, 2, 1)
    assert merging(x).flatten().tolist() == [0.0, 2.0]  # (row 0, column 0), (row 1, column 0), ...


def test_drop_path_factors_are_of_their_sample_block_and_branch() -> None:
    """0 leaves the residual alone, 1 is no factor, and a sample's do not touch another's."""
    torch.manual_seed(0)
    model = VideoSwin(TINY)
    x = torch.randn(2, 2, 28, 28, 16)
    ones = torch.ones(8, 2, 2)
    plain = model(x)
    assert all(torch.equal(a, b) for a, b in zip(model(x, ones), plain))
    assert torch.equal(model(x, torch.zeros(8, 2, 2))[0], x)
    dropped = ones.clone()
    dropped[1, 0, 1] = 0.0  # the second block's attention in the second sample
    first, *_, last = model(x, dropped)
    block0, block1 = model.layers[0].blocks
    halfway = block0(x)
    torch.testing.assert_close(first[1], (halfway + block1.mlp(block1.norm2(halfway)))[1])
    torch.testing.assert_close(last[0], plain[-1][0])
    assert not torch.allclose(last[1], plain[-1][1])
