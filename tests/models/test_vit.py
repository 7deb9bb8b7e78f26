"""The vision transformers against Hugging Face's independent ones: outputs, losses, gradients and names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.foreign import torchvision_schemas
from bevt.config import DecoderConfig, ViTConfig, plain
from bevt.models import vit_names, weights
from bevt.models.bevt import MaskedInput, Stream, TimeSformerBEVT
from bevt.models.classifier import ViTClassifier
from bevt.models.names import WeightsError
from bevt.models.videomae import VideoMAE, normalised
from bevt.models.vit import EPS, Attention, VideoTransformer, grid_of, taken

torchvision_schemas()  # transformers imports it where it is installed
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

CLASSES = 7

SIZES = [
    pytest.param((32, 2, 2, 16, 2, 4, 32), id="small"),
    pytest.param((48, 3, 4, 8, 2, 8, 24), id="patch 8"),
    pytest.param((192, 4, 3, 16, 2, 8, 64), id="wider"),
]
"""Channels, depth, heads, patch, tubelet, frames, crop."""

BASE = (768, 12, 12, 16, 2, 16, 224)
"""VideoMAE-B's."""


def _settings(size: tuple[int, ...]) -> dict[str, Any]:
    dim, depth, heads, patch, _, frames, crop = size
    return dict(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        patch_size=patch,
        num_frames=frames,
        image_size=crop,
        layer_norm_eps=1e-6,
        num_labels=CLASSES,
        attn_implementation="eager",
    )


def _videomae(size: tuple[int, ...], **more: Any) -> Any:
    return transformers.VideoMAEConfig(**_settings(size), tubelet_size=size[4], **more)


def _vivit(size: tuple[int, ...]) -> Any:
    return transformers.VivitConfig(**_settings(size), tubelet_size=[size[4], size[3], size[3]])


def _timesformer(size: tuple[int, ...]) -> Any:
    return transformers.TimesformerConfig(**_settings(size), drop_path_rate=0)


KINDS: dict[str, tuple[str, str, Callable[[tuple[int, ...]], Any]]] = {
    "videomae": ("videomae", "VideoMAEForVideoClassification", _videomae),
    "vivit_1": ("vivit", "VivitForVideoClassification", _vivit),
    "timesformer": ("timesformer", "TimesformerForVideoClassification", _timesformer),
}
"""Hugging Face's prefix, class and configuration, by kind."""


def _theirs(kind: str, size: tuple[int, ...]) -> nn.Module:
    _, name, configure = KINDS[kind]
    return scrambled(getattr(transformers, name)(configure(size)))


def scrambled(model: nn.Module) -> nn.Module:
    """`model` with all parameters random: what starts as zero would hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(noise * scale + ("norm" in name and name.endswith("weight")))
    return model.eval()


def _config(kind: str, size: tuple[int, ...]) -> tuple[ViTConfig, tuple[int, int, int]]:
    dim, depth, heads, patch, tubelet, frames, crop = size
    config = ViTConfig(
        kind=kind,  # type: ignore[arg-type]
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        patch=patch,
        tubelet=1 if kind == "timesformer" else tubelet,
    )
    return config, grid_of(config, frames, crop)


def _ours(kind: str, size: tuple[int, ...]) -> ViTClassifier:
    config, grid = _config(kind, size)
    return ViTClassifier(config, CLASSES, grid).eval()


def _clips(size: tuple[int, ...], batch: int = 2) -> Tensor:
    """(B, 3, T, rows, columns)."""
    frames, crop = size[5:]
    return torch.randn(batch, 3, frames, crop, crop, generator=torch.Generator().manual_seed(2))


def _close(got: Tensor, expected: Tensor, what: str) -> None:
    error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    assert error <= 1e-4, f"{what}: relative difference {error:.2e}"


def _same_gradients(
    ours: nn.Module, theirs: nn.Module, translate: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """By our names, each relative to its own largest value."""
    expected = translate({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert set(got) == set(expected)
    for name, grad in got.items():
        _close(grad, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_equals_hugging_faces(kind: str, size: tuple[int, ...]) -> None:
    theirs, ours = _theirs(kind, size), _ours(kind, size)
    source = vit_names.recognise(theirs.state_dict())
    weights.load(ours, source.state)
    pixels = _clips(size)
    labels = torch.tensor([1, 4])
    expected = theirs(pixel_values=pixels.transpose(1, 2), labels=labels)
    logits = ours(pixels)
    loss = nn.functional.cross_entropy(logits, labels)
    _close(logits, expected.logits, "logits")
    _close(loss, expected.loss, "loss")
    expected.loss.backward()
    loss.backward()
    _same_gradients(ours, theirs, lambda grads: vit_names.recognise(grads).state)


@pytest.mark.parametrize("size", [*SIZES, pytest.param(BASE, id="base", marks=pytest.mark.slow)])
def test_pretraining_equals_hugging_faces(size: tuple[int, ...]) -> None:
    config, grid = _config("videomae", size)
    decoder = DecoderConfig(embed_dim=size[0] // 2, depth=2, num_heads=2)
    more = dict(decoder_hidden_size=size[0] // 2, decoder_num_hidden_layers=2, decoder_num_attention_heads=2)
    theirs = transformers.VideoMAEForPreTraining(
        _videomae(size, use_mean_pooling=False, decoder_intermediate_size=2 * size[0], **more)
    )
    theirs.decoder.norm.eps = 1e-6  # the one norm that their configuration does not reach; the original's are all 1e-6
    scrambled(theirs)
    ours = VideoMAE(config, decoder, grid)
    weights.load(ours, vit_names.recognise(theirs.state_dict(), whole=True).state)
    depth, tokens = grid[0], grid[1] * grid[2]
    batch = 1 if size == BASE else 2
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    mask = (order < int(0.9 * tokens) if tokens >= 10 else order < tokens - 1).repeat(1, depth)
    pixels = _clips(size, batch)
    hidden, visible = (m.nonzero()[:, 1].view(batch, -1) for m in (mask, ~mask))
    std = torch.tensor(transformers.image_utils.IMAGENET_DEFAULT_STD)
    expected = theirs(pixel_values=pixels.transpose(1, 2), bool_masked_pos=mask)
    _close(ours.predict(ours.encoder.patches(pixels), visible, hidden), expected.logits, "pixels")
    loss = ours(pixels, visible, hidden, std)["loss_clips"]
    _close(loss, expected.loss, "loss")
    expected.loss.backward()
    loss.backward()
    _same_gradients(ours, theirs, lambda grads: vit_names.recognise(grads, whole=True).state)


@pytest.mark.parametrize("kind", KINDS)
def test_names_go_to_hugging_face_and_back(kind: str, tmp_path: Path) -> None:
    """A folder that their own reader takes: what is exported has the names of published files."""
    size = (48, 3, 4, 8, 2, 8, 24)
    root, name, _configure = KINDS[kind]
    theirs = _theirs(kind, size)
    theirs.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    ours = _ours(kind, size)
    weights.load(ours, vit_names.recognise(published).state)
    exported = vit_names.to_hugging_face(ours.state_dict(), root)  # type: ignore[arg-type]
    assert set(exported) == set(published)
    assert all(torch.equal(exported[key], value) for key, value in published.items())
    save_file({key: value.contiguous() for key, value in exported.items()}, tmp_path / "model.safetensors")
    read = getattr(transformers, name).from_pretrained(tmp_path, attn_implementation="eager").eval()
    pixels = _clips(size)
    _close(ours(pixels), read(pixel_values=pixels.transpose(1, 2)).logits, "logits")


@pytest.mark.parametrize("size", SIZES)
def test_an_image_is_what_hugging_faces_vit_makes_of_it(size: tuple[int, ...]) -> None:
    """A TimeSformer of one frame, nothing over time, is a plain ViT: what BEVT's image stream runs through."""
    dim, depth, heads, patch, _, _, crop = size
    config, (_, height, width) = _config("timesformer", size)
    theirs = scrambled(
        transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=dim,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=4 * dim,
                patch_size=patch,
                image_size=crop,
                layer_norm_eps=1e-6,
                num_labels=CLASSES,
                attn_implementation="eager",
            )
        )
    )
    source = vit_names.recognise(theirs.state_dict())
    assert source.what == "a ViT by Hugging Face's names"
    still = VideoTransformer(config, (4, height, width), still=True)
    own = {key.removeprefix("encoder."): value for key, value in source.state.items() if key.startswith("encoder.")}
    weights.load(still, own)
    images = torch.randn(2, 3, crop, crop, generator=torch.Generator().manual_seed(2))
    token = still(still.patches(images))[:, 0]
    norm = nn.functional.layer_norm(token, (dim,), source.state["norm.weight"], source.state["norm.bias"], EPS)
    logits = nn.functional.linear(norm, source.state["head.weight"], source.state["head.bias"])
    _close(logits, theirs(pixel_values=images).logits, "logits")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stream", ["clips", "images"])
def test_masked_tokens_of_a_timesformer(stream: Stream, size: tuple[int, ...]) -> None:
    """BEVT's loss with Hugging Face's blocks, norm and head: hidden patches become the mask token, then places are
    added; an image has none in time.
    """
    dim, _, _, patch, _, frames, crop = size
    config, grid = _config("timesformer", size)
    ours, model = (scrambled(TimeSformerBEVT(config, 11, grid=grid)) for _ in range(2))
    kind = "divided_space_time" if stream == "clips" else "space_only"
    settings = {**_settings(size), "num_labels": 11, "attention_type": kind, "drop_path_rate": 0}
    theirs: Any = transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**settings)).eval()
    own = {name: value for name, value in ours.state_dict().items() if name != "mask_token"}
    absent, extra = theirs.load_state_dict(vit_names.to_hugging_face(own, "timesformer"), strict=False)
    assert not absent
    assert all(stream == "images" and ("temporal" in name or "time_embed" in name) for name in extra)

    generator = torch.Generator().manual_seed(2)
    depth, (_, height, width) = frames if stream == "clips" else 1, grid
    pixels = torch.randn(2, depth, 3, crop, crop, generator=generator)
    mask = torch.rand(2, depth, height, width, generator=generator) < 0.5
    codes = torch.randint(11, mask.shape, generator=generator)
    encoder: Any = model.encoder
    embed = encoder.patch_embed.proj
    x = nn.functional.conv2d(pixels.flatten(0, 1), embed.weight, embed.bias, stride=patch).flatten(2).transpose(1, 2)
    x = torch.where(mask.view(2 * depth, -1, 1), model.mask_token, x) + encoder.pos_embed[:, 1:]
    x = x.view(2, depth, -1, dim)
    if stream == "clips":
        x = x + encoder.time_embed.unsqueeze(2)
    first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1)
    places = x.transpose(1, 2).flatten(1, 2)  # theirs have all frames of a place side by side
    tokens = theirs.timesformer.encoder(torch.cat([first, places], dim=1)).last_hidden_state[:, 1:]
    logits = theirs.classifier(theirs.timesformer.layernorm(tokens)).view(2, -1, depth, 11).transpose(1, 2)
    logits = logits.reshape(*mask.shape, 11)[mask]
    expected = nn.functional.cross_entropy(logits, codes[mask])

    given = (pixels.transpose(1, 2), mask, codes) if stream == "clips" else (pixels[:, 0], mask[:, 0], codes[:, 0])
    loss, accuracy = ours.stream_loss(stream, MaskedInput(*given, slots=mask.numel()))
    _close(loss, expected, "loss")
    assert accuracy.item() == pytest.approx((logits.argmax(-1) == codes[mask]).float().mean().item())
    loss.backward()
    expected.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    blocks = vit_names.recognise({**theirs.state_dict(), **grads}).state
    other = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert other.keys() >= {"mask_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight", "encoder.cls_token"}
    assert len(got) == len(other) + len(grads)
    for name, grad in got.items():
        _close(grad, other[name] if name in other else blocks[name], f"gradient of {name}")


@pytest.mark.parametrize("kind", ["videomae", "timesformer", "vivit_1", "vivit_2", "vivit_3", "vivit_4"])
def test_xformers_is_asked_in_its_layout(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention takes (batch, tokens, heads, channels of a head), as its documentation says: a stand-in of it."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("blhc,bmhc->bhlm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhlm,bmhc->blhc", scores.softmax(-1), v)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    size = (48, 2, 4, 8, 2, 6, 24)
    model = scrambled(_ours(kind, size))
    pixels = _clips(size)
    expected = model(pixels)
    for module in model.modules():
        if isinstance(module, Attention):
            module.impl = "xformers"
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)
    _close(model(pixels), expected, "logits")


def _softmax_attention(block: nn.Module, x: Tensor, over: list[list[int]], heads: range) -> Tensor:
    """(L, C) -> (L, len(heads) * C / h), one token and head at a time; i attends to the tokens `over[i]`."""
    attention: Any = block
    q, k, v = attention.qkv(x).view(len(x), 3, attention.num_heads, -1).unbind(1)
    rows = []
    for i, others in enumerate(over):
        parts = []
        for h in heads:
            scores = torch.stack([q[i, h] @ k[j, h] for j in others]) / q.shape[-1] ** 0.5
            parts.append(sum(w * v[j, h] for w, j in zip(scores.softmax(0), others)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x)), approximate="tanh"))


def _by_hand(model: ViTClassifier, pixels: Tensor) -> Tensor:
    """Logits of one clip by ViViT models 2 to 4 as the paper's section 3.3 describes them, one token at a time."""
    encoder: Any = model.encoder
    depth, height, width = encoder.grid
    n, config = height * width, encoder.config
    x = encoder.patch_embed.proj(pixels).flatten(2)[0].T  # (D N, C), depth first
    every = range(config.num_heads)
    if config.kind == "vivit_2":
        frames = []
        for d in range(depth):
            y = torch.cat([encoder.cls_token[0], x[d * n : (d + 1) * n]]) + encoder.pos_embed[0]
            for block in encoder.blocks:
                whole = [list(range(n + 1))] * (n + 1)
                y = y + block.attn.proj(_softmax_attention(block.attn, block.norm1(y), whole, every))
                y = _mlp(block, y)
            frames.append(encoder.spatial_norm(y)[0])
        y = torch.cat([encoder.temporal.cls_token[0], torch.stack(frames)]) + encoder.temporal.pos_embed[0]
        for block in encoder.temporal.blocks:
            whole = [list(range(depth + 1))] * (depth + 1)
            y = y + block.attn.proj(_softmax_attention(block.attn, block.norm1(y), whole, every))
            y = _mlp(block, y)
        return model.head(model.norm(y)[0])
    y = x + encoder.pos_embed[0]
    in_time = [[j for j in range(depth * n) if j % n == i % n] for i in range(depth * n)]
    in_space = [[j for j in range(depth * n) if j // n == i // n] for i in range(depth * n)]
    for block in encoder.blocks:
        if config.kind == "vivit_3":
            attend = block.temporal_attn
            y = y + attend.proj(_softmax_attention(attend, block.temporal_norm1(y), in_time, every))
            y = y + block.attn.proj(_softmax_attention(block.attn, block.norm1(y), in_space, every))
        else:
            z, half = block.norm1(y), config.num_heads // 2
            time = _softmax_attention(block.attn, z, in_time, range(half))
            space = _softmax_attention(block.attn, z, in_space, range(half, config.num_heads))
            y = y + block.attn.proj(torch.cat([time, space], dim=1))
        y = _mlp(block, y)
    return model.head(model.norm(y).mean(0))


@pytest.mark.parametrize("kind", ["vivit_2", "vivit_3", "vivit_4"])
def test_the_other_models_of_vivit_by_hand(kind: str) -> None:
    """Nobody else has them in PyTorch: one token and one head at a time, gradients too."""
    size = (16, 2, 4, 8, 2, 6, 16)
    ours, model = (scrambled(_ours(kind, size)) for _ in range(2))
    pixels = _clips(size, 1)
    logits, expected = ours(pixels)[0], _by_hand(model, pixels)
    _close(logits, expected, "logits")
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), model.named_parameters()):
        assert p.grad is not None
        assert q.grad is not None, name
        _close(p.grad, q.grad, name)


def test_drop_path_takes_whole_branches() -> None:
    """Factor 0 is a branch that adds nothing (of a TimeSformer over time: nothing but the bias of its last layer, which
    lies behind it); the factors of one clip do not touch another's.
    """
    for kind in ("videomae", "timesformer", "vivit_1", "vivit_2", "vivit_3", "vivit_4"):
        size = (16, 2, 2, 8, 2, 4, 16)
        model = scrambled(_ours(kind, size))
        blocks, branches = len(model.encoder.config.drop_path_rates), model.encoder.config.branches
        assert blocks == (2 + 4 if kind == "vivit_2" else 2)
        pixels = _clips(size)
        drop = torch.ones(blocks, branches, 2)
        _close(model(pixels, drop), model(pixels), kind)
        drop[:, :, 1] = 0
        dropped = model(pixels, drop)
        _close(dropped[0], model(pixels)[0], kind)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if (".proj." in name and "patch_embed" not in name) or ".fc2." in name:
                    p.zero_()  # branches that add nothing
        _close(model(pixels)[1], dropped[1], kind)


@pytest.mark.parametrize("heads", [False, True])
def test_videomaes_original_names(heads: bool) -> None:
    """The keys of its published files, pretrained and finetuned, there and back."""
    size = (48, 2, 4, 8, 2, 8, 24)
    config, grid = _config("videomae", size)
    block = {"norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight"}
    block |= {
        "attn.proj.bias",
        "norm2.weight",
        "norm2.bias",
        *(f"mlp.fc{i}.{p}" for i in "12" for p in ("weight", "bias")),
    }
    embed = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    if heads:
        model: nn.Module = scrambled(_ours("videomae", size))
        published = {f"blocks.{i}.{key}" for i in range(2) for key in block} | embed
        published |= {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    else:
        model = scrambled(VideoMAE(config, DecoderConfig(embed_dim=24, depth=1, num_heads=2), grid))
        published = {f"encoder.{key}" for key in embed | {f"blocks.{i}.{key}" for i in range(2) for key in block}}
        published |= {"encoder.norm.weight", "encoder.norm.bias", "encoder_to_decoder.weight", "mask_token"}
        published |= {f"decoder.{key}" for key in {f"blocks.0.{key}" for key in block}}
        published |= {f"decoder.{part}.{p}" for part in ("norm", "head") for p in ("weight", "bias")}
    exported = vit_names.to_videomae(model.state_dict())
    assert set(exported) == published
    back = vit_names.recognise(exported, whole=True)
    assert "VideoMAE" in back.what
    assert back.state.keys() == model.state_dict().keys()
    assert all(torch.equal(back.state[key], value) for key, value in model.state_dict().items())


def test_timesformers_original_names() -> None:
    """Those of facebookresearch/TimeSformer, `models/vit.py`, under `model.`."""
    model = scrambled(_ours("timesformer", (48, 2, 4, 8, 1, 4, 24)))
    exported = vit_names.to_timesformer(model.state_dict())
    assert {key for key in exported if ".blocks.1." not in key} == {
        *(f"model.{key}" for key in ("cls_token", "pos_embed", "time_embed")),
        *(f"model.{part}.{p}" for part in ("patch_embed.proj", "norm", "head") for p in ("weight", "bias")),
        *(
            f"model.blocks.0.{part}.{p}"
            for part in (
                *("norm1", "attn.qkv", "attn.proj", "temporal_norm1", "temporal_attn.qkv", "temporal_attn.proj"),
                *("temporal_fc", "norm2", "mlp.fc1", "mlp.fc2"),
            )
            for p in ("weight", "bias")
        ),
    }
    back = vit_names.recognise(exported)
    assert back.what == "a TimeSformer by its original names"
    assert all(torch.equal(back.state[key], value) for key, value in model.state_dict().items())


def test_names_of_nobody() -> None:
    with pytest.raises(WeightsError, match="the names are none of VideoMAE, ViViT, TimeSformer, a ViT"):
        vit_names.recognise({"layers.0.weight": torch.zeros(1)})
    model = _ours("videomae", (48, 2, 4, 8, 2, 8, 24))
    state = {**vit_names.to_videomae(model.state_dict()), "blocks.0.attn.extra": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"left over: encoder\.blocks\.0\.attn\.extra"):
        weights.load(model, vit_names.recognise(state).state)
    with pytest.raises(WeightsError, match=r"unknown keys encoder\.spatial_norm\.weight"):
        vit_names.to_hugging_face(_ours("vivit_2", (48, 2, 4, 8, 2, 8, 24)).state_dict(), "vivit")


PUBLISHED = {
    "VideoMAE-B (mmaction2, README of its configuration: 87 M, 180 G)": (ViTConfig(), 16, 224, 87, 180, 0.01),
    "VideoMAE-L (likewise: 305 M, 597 G)": (
        ViTConfig(embed_dim=1024, depth=24, num_heads=16), 16, 224, 305, 597, 0.01,
    ),
    "ViViT-B/16x2 model 1 (arXiv 2103.15691, table 2)": (ViTConfig(kind="vivit_1"), 32, 224, 88.9, 455.2, 0.01),
    "ViViT-B/16x2 model 2 (likewise)": (ViTConfig(kind="vivit_2"), 32, 224, 115.1, 284.4, 0.01),
    "ViViT-B/16x2 model 3 (likewise)": (ViTConfig(kind="vivit_3"), 32, 224, 117.3, 372.3, 0.01),
    "ViViT-B/16x2 model 4 (likewise)": (ViTConfig(kind="vivit_4"), 32, 224, 88.9, 277.1, 0.01),
    "TimeSformer (arXiv 2102.05095, table 2: 121.4 M, 0.59 T for three views)": (
        ViTConfig(kind="timesformer", tubelet=1), 8, 224, 121.4, 590 / 3, 0.01,
    ),
    "TimeSformer-HR (likewise, table 5: 5.11 T for three views)": (
        ViTConfig(kind="timesformer", tubelet=1), 16, 448, None, 5110 / 3, 0.01,
    ),
    "TimeSformer-L (likewise: 7.14 T for three views)": (
        ViTConfig(kind="timesformer", tubelet=1), 96, 224, None, 7140 / 3, 0.01,
    ),
}  # fmt: skip
"""Configuration, frames, crop; parameters in millions and multiply-adds of a view in 10**9, and how near ours are."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published_ones(name: str) -> None:
    config, frames, crop, million, giga, near = PUBLISHED[name]
    with torch.device("meta"):
        model = ViTClassifier(plain(config), 400, grid_of(config, frames, crop))
        pixels = torch.empty(1, 3, frames, crop, crop)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels)
    counted = sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9
    print(f"{name}: {counted[0]:.2f} M, {counted[1]:.2f} G")
    assert million is None or counted[0] == pytest.approx(million, rel=near)
    assert counted[1] == pytest.approx(giga, rel=near)


def test_a_perfect_prediction_rebuilds_the_clip() -> None:
    """What the loss takes off is put back where it was: pixels, colours, patches."""
    size = (16, 1, 2, 8, 2, 4, 32)
    config, grid = _config("videomae", size)
    model = VideoMAE(config, DecoderConfig(embed_dim=8, depth=1, num_heads=2), grid)
    pixels, std = _clips(size), torch.tensor([0.2, 0.3, 0.4])
    order = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    hidden, visible = order[:, :24].sort(1).values, order[:, 24:].sort(1).values
    targets, _ = normalised(taken(model.encoder.patches(pixels).flatten(1, 2), hidden), std)
    model.predict = lambda *_: targets  # type: ignore[method-assign]
    torch.testing.assert_close(model.rebuilt(pixels, visible, hidden, std), pixels, rtol=1e-5, atol=1e-5)
    model.predict = lambda *_: torch.zeros_like(targets)  # type: ignore[method-assign]
    flat = model.encoder.patches(model.rebuilt(pixels, visible, hidden, std)).flatten(1, 2)
    assert torch.equal(taken(flat, visible), taken(model.encoder.patches(pixels).flatten(1, 2), visible))
    means = taken(flat, hidden).unflatten(-1, (3, -1))
    torch.testing.assert_close(means, means.mean(-1, keepdim=True).expand_as(means), rtol=1e-5, atol=1e-5)
