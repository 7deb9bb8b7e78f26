"""Weights of one vision transformer for another: of images for clips, of other sizes; pure functions of state dicts.

What an image model lacks starts as its family's code has it (scenic `model_utils.py`, TimeSformer `models/helpers.py`)
but for three things: `vivit_2` takes the image model's class token, which scenic draws anew; positions of a
`timesformer` are interpolated between their rows and columns, where its code takes the nearest of one flat list; and
`vivit_3` may start with nothing over time, as ViViT's paper has it (section 3.4), where scenic copies by default
(`config.temporal_init`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt.config import Pixels, ViTConfig, ViTKind
from bevt.models import weights
from bevt.models.classifier import ViTClassifier
from bevt.models.names import Source, State, WeightsError
from bevt.models.vit import CLASS_TOKEN, Size3

POSITIONS = "encoder.pos_embed"

LATER = "encoder.temporal.pos_embed"
"""Places in time of ViViT's second model, a class token's first."""


def start(model: ViTClassifier, source: Source) -> weights.Report:
    """Start a classifier from `source` (`vit_names.recognise`).

    Where the source's kind of model normalises levels otherwise, its patch embedding is changed to read this model's.
    The head keeps its initial values. Raises WeightsError, before anything is written, where anything else is absent or
    of another shape.
    """
    config, grid = model.encoder.config, model.encoder.grid
    try:
        state, missing, unused = fitted(source.state, config, grid)
        missing += [r"head\..*"]
        if "norm.weight" not in state and config.kind == "videomae":  # of pretraining, which a decoder read
            missing += [r"norm\..*"]
        left = [key for key in state if key.startswith("head.")]
        state = {key: value for key, value in state.items() if key not in left}
        if source.pixels and source.pixels != config.pixels:
            state |= reading(config.pixels, state, source.pixels)
        report = weights.load(model, state, missing=missing)
    except WeightsError as error:
        raise WeightsError(f"{source.what}: {error}") from error
    return replace(report, unused=(*left, *unused, *source.dropped))


def fitted(state: Mapping[str, Tensor], config: ViTConfig, grid: Size3) -> tuple[State, list[str], list[str]]:
    """`state` as a model of `config` and `grid` has it, patterns of the names that it may lack, and what was left out.

    - Patch embeddings of images become tubes (`config.inflation`).
    - Positions of images are repeated over time, or stay those of space; of another height and width they are
      interpolated (bilinear, corners on corners). Places in time for another number of frames: the nearest of a
      `timesformer`, of `vivit_2` linearly interpolated, ends on ends.
    - `timesformer` from images: attention over time and its norm are copies of those over space, its last linear layer
      keeps its start, zero. `vivit_3`: attention over time is a copy, or keeps its start
      (`config.temporal_init`); its norm keeps it. `vivit_2`: all over time keeps its start.
    - A ViViT from a `timesformer`: its places in time are added to those in space (of `vivit_2` they are left out), and
      its attention over time is `vivit_3`'s, last linear layer and all; the others have no place for it.

    Raises WeightsError where positions cannot be converted.
    """
    out = dict(state)
    missing: list[str] = []
    unused: list[str] = []
    kind, (depth, height, width) = config.kind, grid
    embed = out.get("encoder.patch_embed.proj.weight")
    planar = (embed is not None and embed.ndim == 4) or "encoder.spatial_norm.weight" in out  # places are of a frame
    if embed is not None and embed.ndim == 4 and kind != "timesformer":
        out["encoder.patch_embed.proj.weight"] = inflated(embed, config)
    if kind.startswith("vivit") and "encoder.time_embed" in out:
        out, unused = _without_divided(out, config, depth)
    classed = "encoder.cls_token" in out
    if classed and kind not in CLASS_TOKEN:
        del out["encoder.cls_token"]
        unused.append("encoder.cls_token")
    times = out.pop("encoder.time_embed", None) if kind.startswith("vivit") else None
    if times is not None and kind == "vivit_2":
        unused.append("encoder.time_embed")
    if POSITIONS in out and kind != "videomae":
        places = (1 if kind in ("timesformer", "vivit_2") else depth, height, width)
        out[POSITIONS] = _positions(out[POSITIONS], places, classed, kind, planar)
        if times is not None and kind != "vivit_2":
            later = times.repeat_interleave(height * width, dim=1)
            out[POSITIONS] = out[POSITIONS] + F.pad(later, (0, 0, int(kind in CLASS_TOKEN), 0))
    if kind == "timesformer":
        if "encoder.time_embed" in out:
            out["encoder.time_embed"] = _times(out["encoder.time_embed"], depth)
        else:
            missing += [r"encoder\.time_embed"]
    if kind == "vivit_2" and not any(key.startswith("encoder.temporal.") for key in out):
        missing += [r"encoder\.temporal\..*", r"norm\..*"]
        for key in [key for key in out if key.startswith("norm.")]:
            out[f"encoder.spatial_{key}"] = out.pop(key)
    if kind == "vivit_2" and LATER in out:
        out[LATER] = torch.cat([out[LATER][:, :1], _times(out[LATER][:, 1:], depth, "linear")], dim=1)
    if kind in ("timesformer", "vivit_3") and not any(".temporal_attn." in key for key in out):
        copied = ["attn", "norm1"] if kind == "timesformer" else ["attn"] * (config.temporal_init == "copy")
        for part in copied:
            for key in [key for key in out if re.fullmatch(rf"encoder\.blocks\.\d+\.{part}\..*", key)]:
                out[key.replace(f".{part}.", f".temporal_{part}.")] = out[key].clone()
        kept = {"attn", "norm1", "fc"} - set(copied)
        missing += [rf"encoder\.blocks\.\d+\.temporal_{part}\..*" for part in sorted(kept)]
    return out, missing, unused


def _without_divided(state: State, config: ViTConfig, depth: int) -> tuple[State, list[str]]:
    """A `timesformer`'s for a ViViT: attention over time as its third model has it, or none; `depth` times. And what is
    left out.
    """
    out, unused = dict(state), []
    out["encoder.time_embed"] = _times(out["encoder.time_embed"], depth)
    for key in [key for key in state if ".temporal_" in key]:
        value = out.pop(key)
        if config.kind != "vivit_3":
            unused.append(key)
            continue
        if ".temporal_fc." in key:
            continue
        if match := re.fullmatch(r"(.*)\.temporal_attn\.proj\.(weight|bias)", key):
            width = value.shape[0] if value.ndim else 0
            for name, shape in (("weight", (width, width)), ("bias", (width,))):
                if (last := state.get(f"{match[1]}.temporal_fc.{name}")) is None or last.shape != shape:
                    raise WeightsError(
                        f"{key} is {tuple(value.shape)}, and {match[1]}.temporal_fc.{name} "
                        f"{'absent' if last is None else tuple(last.shape)}"
                    )
            value = state[f"{match[1]}.temporal_fc.weight"] @ value
            if match[2] == "bias":
                value = value + state[f"{match[1]}.temporal_fc.bias"]
        out[key] = value
    return out, unused


def _times(times: Tensor, depth: int, mode: str = "nearest") -> Tensor:
    """(1, d, C) -> (1, depth, C): the nearest each, or between its neighbours, ends on ends (`linear`)."""
    if times.shape[1] == depth:
        return times
    corners = True if mode == "linear" else None
    return F.interpolate(times.transpose(1, 2), size=depth, mode=mode, align_corners=corners).transpose(1, 2)


def inflated(weight: Tensor, config: ViTConfig) -> Tensor:
    """(C, 3, p, p) of images -> (C, 3, tubelet, p, p): in the central frame, or divided over all."""
    frames = config.tubelet
    if config.inflation == "average":
        return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    out = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    out[:, :, frames // 2] = weight
    return out


def reading(pixels: Pixels, state: Mapping[str, Tensor], before: Pixels) -> State:
    """The patch embedding that makes of levels normalised as `pixels` what `state`'s makes of those as `before`."""
    weight, bias = (state[f"encoder.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    channel = (1, 3, *[1] * (weight.ndim - 2))
    scale = torch.tensor([new / old for new, old in zip(pixels.std, before.std)], dtype=weight.dtype)
    moved = [(new - old) / std for new, old, std in zip(pixels.mean, before.mean, before.std)]
    shift = (weight * torch.tensor(moved, dtype=weight.dtype).view(channel)).flatten(1).sum(1)
    return {
        "encoder.patch_embed.proj.weight": weight * scale.view(channel),
        "encoder.patch_embed.proj.bias": bias + shift,
    }


def _positions(places: Tensor, grid: Size3, classed: bool, kind: ViTKind, planar: bool) -> Tensor:
    """(1, [1 +] n, C) for `grid`, with a class token's in front where `kind` has one; `planar`: they are a frame's."""
    (depth, height, width), wanted = grid, kind in CLASS_TOKEN
    first, rest = places[:, : int(classed)], places[:, int(classed) :]
    if wanted and not classed:
        raise WeightsError(f"{POSITIONS} has no place for a class token, which a {kind!r} has")
    if (planar and depth > 1) or rest.shape[1] != depth * height * width:
        side = math.isqrt(rest.shape[1])
        if not planar or (rest.shape[1] != height * width and side * side != rest.shape[1]):
            raise WeightsError(
                f"{POSITIONS} has {rest.shape[1]} places, which is neither {depth} x {height} x {width} nor the square "
                "of an image model: model.kind, data.frames, data.crop, model.tubelet and model.patch must be those "
                "that it was trained with"
            )
        if rest.shape[1] != height * width:
            image = rest.unflatten(1, (side, side)).movedim(-1, 1).float()
            image = F.interpolate(image, size=(height, width), mode="bilinear", align_corners=True)
            rest = image.flatten(2).transpose(1, 2).to(places.dtype)
        rest = rest.repeat(1, depth, 1)
    return torch.cat([first, rest], dim=1) if wanted else rest.contiguous()
