"""Whose names a state dict has, and the same tensors under this project's: pure functions of state dicts.

Known are the official BEVT and Video Swin (also mmaction2's), Microsoft's Swin and MoBY, torchvision's `swin_*` and
`swin3d_*`, and the models of this project. Every map is strict: a key that it does not know is an error that lists it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bevt.config import Pixels, UserError

State = dict[str, Tensor]
Prefixes = Sequence[tuple[str, str]]
"""Beginnings of this project's names, and of others' in their place."""

OFFICIAL_NAMES: Prefixes = (
    ("patch_embed.", "backbone.patch_embed."),
    ("patch_embed_2d.", "backbone.patch_embed_2d."),
    ("mask_token", "backbone.mask_token"),
    ("encoder.layers.", "backbone.layers."),
    ("image_decoder.up.", "backbone.fpn.0."),
    ("image_decoder.fuse.", "backbone.lm_down."),
    ("video_decoder.up.", "backbone.fpn_s.0."),
    ("video_decoder.fuse.", "backbone.lm_down_st.0."),
    ("video_decoder.frames.", "backbone.fpn_t.0."),
    ("norm.", "backbone.norm."),
    ("head.", "cls_head.lm_head."),
)
"""`BEVT`'s, and the official checkpoint's (its commit 8881b21)."""

VIDEO_SWIN_NAMES: Prefixes = (
    ("patch_embed.", "backbone.patch_embed."),
    ("encoder.layers.", "backbone.layers."),
    ("norm.", "backbone.norm."),
    ("head.", "cls_head.fc_cls."),
)
"""`VideoSwinClassifier`'s, and those of Video Swin and of what the official BEVT code finetunes."""

SWIN_NAMES: Prefixes = (
    ("patch_embed_2d.", "patch_embed."),
    ("encoder.layers.", "layers."),
    ("norm.", "norm."),
    ("head.", "head."),
)
"""Those of a classifier of images, and of Microsoft's Swin."""

MOBY_NAMES: Prefixes = [(own, f"encoder.{theirs}") for own, theirs in SWIN_NAMES]
"""Likewise, and of the online encoder in a checkpoint of MoBY (SwinTransformer/Transformer-SSL)."""

OWN_NAMES: Prefixes = [(p, p) for p in ("patch_embed.", "patch_embed_2d.", "encoder.layers.", "norm.", "head.")]

SWIN_SIGNS = (r".*relative_position_bias_table",)
VIT_SIGNS = (
    r"(encoder\.|model\.)?blocks\.\d+\.(attn|mlp)\..*",
    r"((videomae|vivit|timesformer|vit)\.)?(embeddings\.patch_embeddings|layers\.\d+\.attention\.q_proj)\..*",
)
"""Names that only weights of a Swin, or only those of a vision transformer, have."""

DERIVED = (r".*\.relative_position_index", r".*\.attn_mask")
"""Buffers that follow from the window and the size of the images."""


class WeightsError(UserError):
    """Weights that cannot be read or do not fit; the message names the file or every key, and what is wrong with it."""


@dataclass(frozen=True)
class Source:
    """What a classifier can start from."""

    what: str
    """Whose weights these are, in words."""
    state: State
    """`encoder.*`, `norm.*`, `patch_embed.*` (clips) or `patch_embed_2d.*` (images) or both; `head.*` if of classes."""
    dropped: tuple[str, ...] = ()
    """Keys that have no part in a classifier: those of recognised weights under their old names."""
    masked: bool = False
    """Of masked-token pretraining, whose `norm` came after the decoders and not after the encoder (quirk C)."""
    pixels: Pixels | None = None
    """How levels were normalised that these weights read; None: as the model that takes them does it."""


def recognise(state: Mapping[str, Tensor]) -> Source:
    """Find out whose names these are, and take what a classifier has a place for.

    Raises WeightsError where nobody's names fit, and for every key that those who were recognised would not have.
    """
    if any(matches(key, VIT_SIGNS) for key in state):
        raise WeightsError("these are weights of a vision transformer, from which no Video Swin can start")
    for kind in _KINDS:
        if any(re.fullmatch(kind.sign, key) for key in state):
            break
    else:
        raise WeightsError(
            "the names are none of official BEVT, Video Swin, Swin, MoBY, torchvision or this project: "
            + briefly(list(state))
        )
    kept, dropped = _without(state, (*kind.drop, *DERIVED))
    kept = kind.rename(kept, kind.what)
    found = {name: kept[f"{name}.proj.weight"] for name in _AXES if f"{name}.proj.weight" in kept}
    if not found:
        raise WeightsError(f"{kind.what}, but without the weight of a patch embedding: {briefly(list(state))}")
    for name, weight in found.items():
        if weight.ndim != _AXES[name]:
            raise WeightsError(
                f"{kind.what}, but its patch embedding is {tuple(weight.shape)}, where {_AXES[name]} axes belong"
            )
    return Source(kind.what, kept, tuple(dropped), kind.masked)


def from_official(state: Mapping[str, Tensor]) -> State:
    """An official BEVT checkpoint's `state_dict` under `BEVT`'s names.

    The tokenizer (`cls_head.vae_encoder.*`) and the derived `relative_position_index` buffers are left out. A model
    that runs these weights as their authors did has `quirks="official"`. Raises WeightsError for any unknown key.
    """
    kept, _ = _without(state, (r"cls_head\.vae_encoder\..*", *DERIVED))
    return _from(OFFICIAL_NAMES)(kept, "an official BEVT checkpoint")


def to_official(state: Mapping[str, Tensor]) -> State:
    """Inverse of `from_official`, without the tokenizer and the derived buffers."""
    return _renamed(state, OFFICIAL_NAMES, "a BEVT model")


def to_video_swin(state: Mapping[str, Tensor], window_size: tuple[int, int, int]) -> State:
    """A `VideoSwinClassifier` of clips under Video Swin's names, derived `relative_position_index` buffers included.

    They are what mmaction reads as `state_dict`, as the official BEVT code writes it. Raises WeightsError for any
    unknown key.
    """
    return _with_index(_renamed(state, VIDEO_SWIN_NAMES, "a VideoSwinClassifier of clips"), window_size)


def from_torchvision(state: Mapping[str, Tensor]) -> State:
    """Torchvision's `swin3d_*` under `VideoSwinClassifier`'s names. Raises WeightsError for any unknown key."""
    return _from_torchvision(_without(state, DERIVED)[0], "a torchvision swin")


def to_torchvision(state: Mapping[str, Tensor], window_size: tuple[int, int, int]) -> State:
    """Inverse of `from_torchvision`, with the derived `relative_position_index` buffers that torchvision stores."""

    def rename(key: str) -> str | None:
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(blocks|downsample)\.(.*)", key):
            stage, kind, rest = int(match[1]), match[2], match[3]
            if kind == "downsample":
                return f"features.{2 * stage + 1}.{rest}"
            rest = rest.replace("mlp.fc1.", "mlp.0.").replace("mlp.fc2.", "mlp.3.")
            return f"features.{2 * stage}.{rest}"
        return key if re.match(r"(patch_embed|norm|head)\.", key) else None

    return _with_index(mapped(state, rename, "a VideoSwinClassifier"), window_size)


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether one of the regular expressions fits the whole key."""
    return any(re.fullmatch(p, key) for p in patterns)


def briefly(names: Sequence[str], most: int = 8) -> str:
    """The first names and the number of those after them, for a message."""
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def _without(state: Mapping[str, Tensor], patterns: Sequence[str]) -> tuple[State, list[str]]:
    """The tensors whose names no pattern fits, and the names of the others."""
    dropped = [key for key in state if matches(key, patterns)]
    return {key: value for key, value in state.items() if key not in dropped}, dropped


def _from_torchvision(state: Mapping[str, Tensor], what: str) -> State:
    """Both `swin3d_*` and `swin_*`, whose patch embedding is features.0 and moves the stages up by one."""
    planar = int("features.0.0.weight" in state)

    def rename(key: str) -> str | None:
        if planar and (match := re.fullmatch(r"features\.0\.([02])\.(.*)", key)):
            return f"patch_embed_2d.{'proj' if match[1] == '0' else 'norm'}.{match[2]}"
        if match := re.fullmatch(r"features\.(\d+)\.(.*)", key):
            part, rest = int(match[1]) - planar, match[2]
            if part % 2:
                return f"encoder.layers.{part // 2}.downsample.{rest}"
            rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            return f"encoder.layers.{part // 2}.blocks.{rest}"
        return key if re.match(r"(patch_embed|norm|head)\.", key) else None

    return mapped(state, rename, what)


def _with_index(state: State, window_size: tuple[int, int, int]) -> State:
    """`state` with the index beside every bias table."""
    index = _relative_position_index(window_size)
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    return {**state, **{key.replace("bias_table", "index"): index.clone() for key in tables}}


def _relative_position_index(window: tuple[int, int, int]) -> Tensor:
    """(N, N) rows of the bias table for a window of N tokens, in torchvision's and the official code's order."""
    axes = [torch.arange(w) for w in window]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    offset = coords[:, :, None] - coords[:, None, :] + torch.tensor(window)[:, None, None] - 1
    _, wh, ww = window
    return (offset[0] * (2 * wh - 1) + offset[1]) * (2 * ww - 1) + offset[2]


def mapped(state: Mapping[str, Tensor], rename: Callable[[str], str | None], what: str) -> State:
    """Every tensor under its new name; WeightsError lists the keys of which `rename` makes none."""
    out, unknown = {}, []
    for key, value in state.items():
        name = rename(key)
        if name is None:
            unknown.append(key)
        else:
            out[name] = value
    if unknown:
        raise WeightsError(f"not {what}: unknown keys {briefly(unknown)}")
    return out


def _renamed(state: Mapping[str, Tensor], prefixes: Prefixes, what: str) -> State:
    def rename(key: str) -> str | None:
        for old, new in prefixes:
            if key.startswith(old):
                return new + key[len(old) :]
        return None

    return mapped(state, rename, what)


def _from(names: Prefixes) -> Callable[[Mapping[str, Tensor], str], State]:
    """The map from others' names to this project's."""
    reverse = [(theirs, own) for own, theirs in names]
    return lambda state, what: _renamed(state, reverse, what)


_AXES = {"patch_embed": 5, "patch_embed_2d": 4}
"""Of the weights of patch embeddings."""


@dataclass(frozen=True)
class _Kind:
    """Somebody's names."""

    what: str
    sign: str
    """A key that only they have, of those further down the list."""
    rename: Callable[[Mapping[str, Tensor], str], State]
    drop: tuple[str, ...] = ()
    masked: bool = False


_KINDS = (
    _Kind(
        "an official BEVT pretraining checkpoint",
        r"backbone\.mask_token|backbone\.patch_embed_2d\..*|cls_head\.lm_head\..*",
        _from(OFFICIAL_NAMES),
        (r"backbone\.(mask_token|lm_down.*|fpn.*)", r"cls_head\.(lm_head|vae_encoder)\..*"),
        masked=True,
    ),
    # mmaction2 names a norm by the stage after which it comes; only the last stage has one.
    # mmcv's EMAHook keeps the other weights beside those that are tested.
    _Kind(
        "a Video Swin checkpoint",
        r"backbone\..*",
        _from((*VIDEO_SWIN_NAMES, ("norm.", "backbone.norm3."))),
        (r"ema_.*",),
    ),
    _Kind(
        "a checkpoint of MoBY",
        r"encoder\.patch_embed\..*",
        _from(MOBY_NAMES),
        (r"(encoder_k|projector|projector_k|predictor)\..*", r"queue(1|2|_ptr)"),
    ),
    _Kind("a torchvision swin", r"features\..*", _from_torchvision),
    _Kind("a Swin checkpoint", r"layers\..*", _from(SWIN_NAMES)),
    _Kind(
        "a BEVT of this project",
        r"mask_token",
        _from(OWN_NAMES),
        (r"mask_token", r"(video_decoder|image_decoder|head)\..*"),
        masked=True,
    ),
    _Kind("a MoBY of this project", r"queues", _from(OWN_NAMES), (r"(projector|predictor|key)\..*", r"queues")),
    _Kind("a classifier of this project", r"encoder\.layers\..*", _from(OWN_NAMES), (r"heads\..*",)),
)
