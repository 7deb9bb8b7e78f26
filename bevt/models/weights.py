"""Weights between checkpoints: the official BEVT names, torchvision's swin3d, and this project's own stages.

A conversion here is a pure function from state dict to state dict. Only `load` writes into a model, and it is strict:
what the caller did not name as expected to be missing or unused is an error that lists it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt.config import UserError

State = dict[str, Tensor]

OFFICIAL_NAMES = (
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
"""Prefixes of `BEVT`'s parameters and of the official checkpoint's (its commit 8881b21)."""


class WeightsError(UserError):
    """Weights that do not fit a model; the message lists every key that is missing, left over or of another shape."""


@dataclass(frozen=True)
class Report:
    """What `load` did."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Parameters of the model that kept their initial values (all of them named as expected by the caller)."""
    unused: tuple[str, ...]
    """Keys of the state dict that the model has no place for (likewise)."""

    def __str__(self) -> str:
        """One line for the log."""
        text = f"{len(self.loaded)} tensors loaded"
        if self.missing:
            text += f"; kept at their initial values: {_briefly(self.missing)}"
        if self.unused:
            text += f"; not used: {_briefly(self.unused)}"
        return text


def load(
    model: nn.Module, state: Mapping[str, Tensor], *, missing: Sequence[str] = (), unused: Sequence[str] = ()
) -> Report:
    """Copy `state` into `model`. `missing` and `unused` are regular expressions (full match) for expected leftovers.

    Raises WeightsError, before anything is written, for any other missing or unused key and for every other shape.
    """
    own = dict(model.state_dict())
    absent = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    problems = []
    if bad := [k for k in absent if not _matches(k, missing)]:
        problems.append(f"missing: {_briefly(bad)}")
    if bad := [k for k in extra if not _matches(k, unused)]:
        problems.append(f"left over: {_briefly(bad)}")
    if bad := [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]:
        problems.append(f"of another shape: {_briefly(bad)}")
    if problems:
        raise WeightsError(f"these weights are not of this {type(model).__name__}; " + "; ".join(problems))
    with torch.no_grad():
        for key, value in own.items():
            if key in state:
                value.copy_(state[key])
    return Report(tuple(k for k in own if k in state), tuple(absent), tuple(extra))


def from_official(state: Mapping[str, Tensor]) -> State:
    """An official BEVT checkpoint's `state_dict` under `BEVT`'s names.

    The tokenizer (`cls_head.vae_encoder.*`) and the derived `relative_position_index` buffers are left out. A model
    that runs these weights as their authors did has `quirks="official"`. Raises WeightsError for any unknown key.
    """
    kept = {
        k: v for k, v in state.items() if not _matches(k, (r"cls_head\.vae_encoder\..*", r".*relative_position_index"))
    }
    return _renamed(kept, [(official, own) for own, official in OFFICIAL_NAMES], "an official BEVT checkpoint")


def to_official(state: Mapping[str, Tensor]) -> State:
    """Inverse of `from_official`, without the tokenizer and the derived buffers."""
    return _renamed(state, list(OFFICIAL_NAMES), "a BEVT model")


def from_official_backbone(state: Mapping[str, Tensor]) -> State:
    """An official BEVT checkpoint as the start of finetuning: encoder, video patch embedding and `norm`.

    The LayerNorm shared by the decoders becomes the classifier's final norm, as in the official code (quirk C).
    """
    keep = (r"patch_embed\..*", r"encoder\..*", r"norm\..*")
    return {k: v for k, v in from_official(state).items() if _matches(k, keep)}


def from_torchvision(state: Mapping[str, Tensor]) -> State:
    """Torchvision's `swin3d_*` under `VideoSwinClassifier`'s names. Raises WeightsError for any unknown key."""
    kept = {k: v for k, v in state.items() if not k.endswith("relative_position_index")}

    def rename(key: str) -> str | None:
        if match := re.fullmatch(r"features\.(\d+)\.(.*)", key):
            part, rest = int(match[1]), match[2]
            if part % 2:
                return f"encoder.layers.{part // 2}.downsample.{rest}"
            rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            return f"encoder.layers.{part // 2}.blocks.{rest}"
        return key if re.match(r"(patch_embed|norm|head)\.", key) else None

    return _mapped(kept, rename, "a torchvision swin3d")


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

    out = _mapped(state, rename, "a VideoSwinClassifier")
    index = _relative_position_index(window_size)
    for key in [k for k in out if k.endswith("relative_position_bias_table")]:
        out[key.replace("bias_table", "index")] = index.clone()
    return out


def inflate(state: Mapping[str, Tensor], window_size: tuple[int, int, int]) -> State:
    """2D to 3D: the weights of an image-stage `BEVT` (window (1, h, w)) for one with clips (window (d, h, w)).

    The video patch embedding repeats the image one over the two frames of a patch, divided by two; bias tables repeat
    over all 2d - 1 temporal distances (official `inflate_weights`). The video decoder has no 2D counterpart: it stays
    out, as do tables of another spatial window, which raise WeightsError.
    """
    out = dict(state)
    frames = 2
    out["patch_embed.proj.weight"] = (
        state["patch_embed_2d.proj.weight"].unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    )
    for name in ("proj.bias", "norm.weight", "norm.bias"):
        out[f"patch_embed.{name}"] = state[f"patch_embed_2d.{name}"].clone()
    depth, height, width = window_size
    for key in [k for k in state if k.endswith("relative_position_bias_table")]:
        rows = (2 * height - 1) * (2 * width - 1)
        if state[key].shape[0] != rows:
            raise WeightsError(
                f"{key} has {state[key].shape[0]} rows; the table of a 2D window {height}x{width} has {rows}"
            )
        out[key] = state[key].repeat(2 * depth - 1, 1)
    return out


def resize_tables(state: Mapping[str, Tensor], old: tuple[int, int, int], new: tuple[int, int, int]) -> State:
    """Bias tables of window `old` for window `new` by trilinear interpolation (spec: 8x7x7 to 16x7x7 for SSv2)."""
    out = dict(state)
    old_size, new_size = ([2 * w - 1 for w in window] for window in (old, new))
    for key in [k for k in state if k.endswith("relative_position_bias_table")]:
        table = state[key]
        if table.shape[0] != old_size[0] * old_size[1] * old_size[2]:
            raise WeightsError(f"{key} has {table.shape[0]} rows, which is no table of window {old}")
        grid = table.T.reshape(1, -1, *old_size).float()
        grid = F.interpolate(grid, size=new_size, mode="trilinear", align_corners=False)
        out[key] = grid.flatten(2)[0].T.to(table.dtype).contiguous()
    return out


def _relative_position_index(window: tuple[int, int, int]) -> Tensor:
    """(N, N) rows of the bias table for a window of N tokens, in torchvision's and the official code's order."""
    axes = [torch.arange(w) for w in window]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    offset = coords[:, :, None] - coords[:, None, :] + torch.tensor(window)[:, None, None] - 1
    _, wh, ww = window
    return (offset[0] * (2 * wh - 1) + offset[1]) * (2 * ww - 1) + offset[2]


def _mapped(state: Mapping[str, Tensor], rename: Callable[[str], str | None], what: str) -> State:
    out, unknown = {}, []
    for key, value in state.items():
        name = rename(key)
        if name is None:
            unknown.append(key)
        else:
            out[name] = value
    if unknown:
        raise WeightsError(f"not {what}: unknown keys {_briefly(unknown)}")
    return out


def _renamed(state: Mapping[str, Tensor], prefixes: list[tuple[str, str]], what: str) -> State:
    def rename(key: str) -> str | None:
        for old, new in prefixes:
            if key.startswith(old):
                return new + key[len(old) :]
        return None

    return _mapped(state, rename, what)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(p, key) for p in patterns)


def _briefly(names: Sequence[str], most: int = 8) -> str:
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
