"""Whose names the weights of a vision transformer have, and the same tensors under this project's, and back.

Known are VideoMAE's original names (pretrained and finetuned), TimeSformer's, timm's image models (the names of both
are this project's inside a block), Hugging Face's VideoMAE, ViViT, TimeSformer and ViT as published files and as
`state_dict()` of transformers 5 have them, and the models of this project. Every map is strict, as in `names.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bevt.config import ViTConfig, ViTKind
from bevt.models.names import SWIN_SIGNS, Source, State, WeightsError, briefly, mapped, matches

Pairs = tuple[tuple[str, str], ...]
"""Beginnings of this project's names, and of others' in their place."""


@dataclass(frozen=True)
class _Names:
    """Somebody's names: those of the parts outside of blocks, of the lists of blocks, and inside a block."""

    outside: Pairs
    lists: Pairs
    inside: Pairs = ()
    """Empty: as here."""

    def translate(self, key: str, *, back: bool) -> str | None:
        """The name here of `key`, or with `back` theirs of one here; None: unknown."""

        def sides(pair: tuple[str, str]) -> tuple[str, str]:
            return pair if back else (pair[1], pair[0])

        for old, new in map(sides, self.lists):
            if match := re.fullmatch(re.escape(old) + r"\.(\d+)\.(.+)", key):
                rest = _replaced(match[2], [sides(pair) for pair in self.inside]) if self.inside else match[2]
                return None if rest is None else f"{new}.{match[1]}.{rest}"
        return _replaced(key, [sides(pair) for pair in self.outside])


def _replaced(key: str, pairs: list[tuple[str, str]]) -> str | None:
    """`key` with the beginning that one of the pairs names replaced, up to a dot or the end."""
    for old, new in pairs:
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return None


_HF_BLOCK: Pairs = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.qkv", "attention.attention.qkv"),
    ("attn.q_bias", "attention.attention.q_bias"),
    ("attn.v_bias", "attention.attention.v_bias"),
    ("attn.query", "attention.attention.query"),
    ("attn.key", "attention.attention.key"),
    ("attn.value", "attention.attention.value"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("temporal_norm1", "temporal_layernorm"),
    ("temporal_attn.qkv", "temporal_attention.attention.qkv"),
    ("temporal_attn.proj", "temporal_attention.output.dense"),
    ("temporal_fc", "temporal_dense"),
)

_HF_DECODER: Pairs = (
    ("encoder_to_decoder", "encoder_to_decoder"),
    ("mask_token", "mask_token"),
    ("decoder.norm", "decoder.norm"),
    ("decoder.head", "decoder.head"),
)


def _hugging_face(root: str) -> _Names:
    embeddings = f"{root}.embeddings"
    norm = "fc_norm" if root == "videomae" else f"{root}.layernorm"
    return _Names(
        outside=(
            ("encoder.patch_embed.proj", f"{embeddings}.patch_embeddings.projection"),
            ("encoder.cls_token", f"{embeddings}.cls_token"),
            ("encoder.pos_embed", f"{embeddings}.position_embeddings"),
            ("encoder.time_embed", f"{embeddings}.time_embeddings"),
            ("norm", norm),
            ("norm", f"{root}.layernorm"),
            ("head", "classifier"),
            *_HF_DECODER,
        ),
        lists=(("encoder.blocks", f"{root}.encoder.layer"), ("decoder.blocks", "decoder.decoder_layers")),
        inside=_HF_BLOCK,
    )


_ENCODER_PARTS = ("patch_embed", "cls_token", "pos_embed", "time_embed")

_ORIGINAL = _Names(
    outside=(
        *((f"encoder.{part}", part) for part in _ENCODER_PARTS),
        ("norm", "fc_norm"),
        ("norm", "norm"),
        ("head", "head"),
    ),
    lists=(("encoder.blocks", "blocks"),),
)
"""timm's, and of finetuned VideoMAE, whose norm comes after the mean."""

_TIMESFORMER = _Names(
    outside=tuple((own, f"model.{theirs}") for own, theirs in _ORIGINAL.outside if theirs != "fc_norm"),
    lists=(("encoder.blocks", "model.blocks"),),
)

_VIDEOMAE = _Names(
    outside=(
        ("encoder.patch_embed", "encoder.patch_embed"),
        ("norm", "encoder.norm"),
        ("encoder_to_decoder", "encoder_to_decoder"),
        ("mask_token", "mask_token"),
        ("decoder.norm", "decoder.norm"),
        ("decoder.head", "decoder.head"),
    ),
    lists=(("encoder.blocks", "encoder.blocks"), ("decoder.blocks", "decoder.blocks")),
)
"""Of its pretraining."""

_OWN = _Names(
    outside=(
        *((f"encoder.{part}",) * 2 for part in (*_ENCODER_PARTS, "spatial_norm", "temporal")),
        *((part, part) for part in ("norm", "head", "mask_token", "encoder_to_decoder", "decoder")),
    ),
    lists=(("encoder.blocks", "encoder.blocks"),),
)


def _impossible(state: State) -> list[str]:
    """What no model has, among that which may be converted before shapes are compared."""
    patches, bias = (state.get(f"encoder.patch_embed.proj.{name}") for name in ("weight", "bias"))
    assert patches is not None
    if patches.ndim not in (4, 5) or patches.shape[1] != 3 or 0 in patches.shape:
        return [f"encoder.patch_embed.proj.weight {tuple(patches.shape)}"]
    if bias is None or bias.shape != patches.shape[:1]:
        return [f"encoder.patch_embed.proj.bias {'absent' if bias is None else tuple(bias.shape)}"]
    token = int("encoder.cls_token" in state)
    least = {"cls_token": 1, "pos_embed": 1 + token, "time_embed": 1, "temporal.pos_embed": 2}
    bad = []
    for name, places in least.items():
        value = state.get(f"encoder.{name}")
        if value is not None and (value.ndim != 3 or value.shape[::2] != (1, len(patches)) or value.shape[1] < places):
            bad.append(f"encoder.{name} {tuple(value.shape)}")
    if "head.weight" in state and state["head.weight"].ndim != 2:
        bad.append(f"head.weight {tuple(state['head.weight'].shape)}")
    return bad


def recognise(state: Mapping[str, Tensor], *, whole: bool = False) -> Source:
    """Find out whose names these are, and take what a classifier has a place for; with `whole` a decoder too.

    The names of the `Source` are a `ViTClassifier`'s (with `whole`, a `VideoMAE`'s); queries, keys and values are
    joined. Raises WeightsError where nobody's names fit, and for every key that those recognised would not have.
    """
    if any(matches(key, SWIN_SIGNS) for key in state):
        raise WeightsError("these are weights of a Swin, from which no vision transformer can start")
    state = _as_published(state)
    for kind in _KINDS:
        if any(re.fullmatch(kind.sign, key) for key in state):
            break
    else:
        raise WeightsError(
            "the names are none of VideoMAE, ViViT, TimeSformer, a ViT (timm, Hugging Face) or this project's vision "
            f"transformers: {briefly(list(state))}"
        )
    unread = (*kind.drop, *(() if whole else _DECODER), *(kind.drop_norm if not whole else ()))
    dropped = tuple(key for key in state if matches(key, unread))
    kept = {key: value for key, value in state.items() if key not in dropped}
    out = joined(_translated(kept, kind.names, kind.what, back=False))
    if "encoder.patch_embed.proj.weight" not in out:
        raise WeightsError(f"{kind.what}, but without the weight of a patch embedding: {briefly(list(state))}")
    if bad := _impossible(out):
        raise WeightsError(f"{kind.what}, but with {briefly(bad)}, which no such model has")
    return Source(kind.what, out, dropped, pixels=ViTConfig(kind=kind.of).pixels if kind.of else None)


def to_videomae(state: Mapping[str, Tensor]) -> State:
    """A `VideoMAE` or its `ViTClassifier` under the original repository's names."""
    names = _VIDEOMAE if "encoder_to_decoder.weight" in state else _ORIGINAL
    return _translated(state, names, "a VideoMAE", back=True)


def to_timesformer(state: Mapping[str, Tensor]) -> State:
    """A `timesformer` classifier under the original repository's names."""
    return _translated(state, _TIMESFORMER, "a timesformer classifier", back=True)


def to_hugging_face(state: Mapping[str, Tensor], root: Literal["videomae", "vivit", "timesformer"]) -> State:
    """A classifier, or a `VideoMAE`, under the names that Hugging Face's published files of that model have.

    Of ViViT only the first model exists there. Raises WeightsError for what it has no name for.
    """
    names = _hugging_face(root)
    if "encoder_to_decoder.weight" in state:  # the encoder's own norm, where a classifier has one behind the mean
        names = _Names(tuple(p for p in names.outside if p[1] != "fc_norm"), names.lists, names.inside)
    return _translated(state if root == "timesformer" else split(state), names, f"Hugging Face's {root}", back=True)


def joined(state: Mapping[str, Tensor]) -> State:
    """With queries, keys and values of each attention in one `qkv`."""
    out = dict(state)
    for key in state:
        if match := re.fullmatch(r"(.*)\.query\.(weight|bias)", key):
            parts = [f"{match[1]}.{part}.{match[2]}" for part in ("query", "key", "value")]
            if absent := [part for part in parts if part not in state]:
                raise WeightsError(f"{key} without {', '.join(absent)}")
            shapes = [tuple(state[part].shape) for part in parts]
            if len(set(shapes)) > 1 or not shapes[0]:
                raise WeightsError(f"{', '.join(parts)} are of shapes {', '.join(map(str, shapes))}")
            out[f"{match[1]}.qkv.{match[2]}"] = torch.cat([out.pop(part) for part in parts])
    return out


def split(state: Mapping[str, Tensor]) -> State:
    """Inverse of `joined`."""
    out = dict(state)
    for key in state:
        if match := re.fullmatch(r"(.*)\.qkv\.(weight|bias)", key):
            for part, value in zip(("query", "key", "value"), out.pop(key).chunk(3)):
                out[f"{match[1]}.{part}.{match[2]}"] = value.clone()
    return out


def _translated(state: Mapping[str, Tensor], names: _Names, what: str, *, back: bool) -> State:
    return mapped(state, lambda key: names.translate(key, back=back), what)


_RENAMED: tuple[tuple[str, str], ...] = (
    (r"^(videomae\..*attention\.attention)\.query\.bias$", r"\1.q_bias"),
    (r"^(videomae\..*attention\.attention)\.value\.bias$", r"\1.v_bias"),
    (r"^(decoder\.decoder_layers\..*attention\.attention)\.query\.bias$", r"\1.q_bias"),
    (r"^(decoder\.decoder_layers\..*attention\.attention)\.value\.bias$", r"\1.v_bias"),
    (r"^((?:vivit|vit)\.)layers\.(\d+)\.attention\.q_proj\.", r"\1encoder.layer.\2.attention.attention.query."),
    (r"^((?:vivit|vit)\.)layers\.(\d+)\.attention\.k_proj\.", r"\1encoder.layer.\2.attention.attention.key."),
    (r"^((?:vivit|vit)\.)layers\.(\d+)\.attention\.v_proj\.", r"\1encoder.layer.\2.attention.attention.value."),
    (r"^((?:vivit|vit)\.)layers\.(\d+)\.attention\.o_proj\.", r"\1encoder.layer.\2.attention.output.dense."),
    (r"^((?:vivit|vit)\.)layers\.(\d+)\.mlp\.fc1\.", r"\1encoder.layer.\2.intermediate.dense."),
    (r"^((?:vivit|vit)\.)layers\.(\d+)\.mlp\.fc2\.", r"\1encoder.layer.\2.output.dense."),
    (r"^((?:vivit|vit)\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
)
"""What transformers 5 calls parameters that its published files call otherwise."""


def _as_published(state: Mapping[str, Tensor]) -> State:
    """Hugging Face's names as its files have them; all others as they are."""
    patches = state.get("embeddings.patch_embeddings.projection.weight")
    if patches is not None:  # a model by itself, without a head
        tubes = "vivit" if "embeddings.cls_token" in state else "videomae"
        flat = "timesformer" if "embeddings.time_embeddings" in state else "vit"
        state = {f"{tubes if patches.ndim == 5 else flat}.{key}": value for key, value in state.items()}

    def published(key: str) -> str:
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        return key

    return {published(key): value for key, value in state.items()}


_DECODER = (r"decoder\..*", r"encoder_to_decoder\..*", r"mask_token")


@dataclass(frozen=True)
class _Kind:
    """Somebody's names."""

    what: str
    sign: str
    """A key that only they have, of those further down the list."""
    names: _Names
    drop: tuple[str, ...] = ()
    of: ViTKind | None = None
    """What kind of model all of them are, by which levels were normalised; None: of any image model."""
    drop_norm: tuple[str, ...] = ()
    """The norm of pretraining, which came before a decoder: a classifier has one of its own."""


_KINDS = (
    _Kind(
        "a VideoMAE by Hugging Face's names",
        r"videomae\.embeddings\..*",
        _hugging_face("videomae"),
        (r"position_embeddings", r"videomae\.embeddings\.position_embeddings"),
        "videomae",
        (r"videomae\.layernorm\..*",),
    ),
    _Kind(
        "a ViViT by Hugging Face's names",
        r"vivit\.embeddings\..*",
        _hugging_face("vivit"),
        (r"vivit\.pooler\..*",),
        "vivit_1",
    ),
    _Kind(
        "a TimeSformer by Hugging Face's names",
        r"timesformer\.embeddings\..*",
        _hugging_face("timesformer"),
        of="timesformer",
    ),
    _Kind("a ViT by Hugging Face's names", r"vit\.embeddings\..*", _hugging_face("vit"), (r"vit\.pooler\..*",)),
    _Kind("a TimeSformer by its original names", r"model\.blocks\..*", _TIMESFORMER, of="timesformer"),
    _Kind(
        "VideoMAE's pretraining by its original names",
        r"encoder\.norm\.weight",
        _VIDEOMAE,
        of="videomae",
        drop_norm=(r"encoder\.norm\..*",),
    ),
    _Kind("a VideoMAE of this project", r"encoder_to_decoder\..*", _OWN, of="videomae", drop_norm=(r"norm\..*",)),
    _Kind("a BEVT of this project", r"mask_token", _OWN, (r"head\..*",), "timesformer"),
    _Kind(
        "a VideoMAE classifier of this project", r"encoder\.blocks\.0\.attn\.q_bias", _OWN, (r"heads\..*",), "videomae"
    ),
    _Kind("a TimeSformer of this project", r"encoder\.time_embed", _OWN, (r"heads\..*",), "timesformer"),
    _Kind("a ViViT of this project", r"encoder\.blocks\..*", _OWN, (r"heads\..*",), "vivit_1"),
    _Kind("VideoMAE by its original names", r"blocks\.0\.attn\.q_bias", _ORIGINAL, of="videomae"),
    _Kind("a ViT by timm's names", r"blocks\..*", _ORIGINAL, (r"pre_logits\..*",)),
)
