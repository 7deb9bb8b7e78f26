"""The vision transformers against Hugging Face's independent ones: outputs, losses, gradients and names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.foreign import torchvision_schemas
from bevt.config import DecoderConfig, ViTConfig
from bevt.models import vit_names, weights
from bevt.models.classifier import ViTClassifier
from bevt.models.videomae import VideoMAE
from bevt.models.vit import grid_of

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
