"""Weights from files into models: read without running code, inflated, resized, and loaded strictly.

A conversion here is a pure function from state dict to state dict (whose names these are: `names.py`). Only `load`
writes into a model: what the caller did not name as expected to be missing or unused is an error that lists it.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bevt.models.names import Source, State, WeightsError, briefly, matches


@dataclass(frozen=True)
class Report:
    """What `load` did."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Parameters of the model that kept their initial values (all of them named as expected by the caller)."""
    unused: tuple[str, ...]
    """Keys of the state dict that the model has no place for (likewise)."""

    def __str__(self) -> str:
        """One line for the log, in which names that differ by numbers alone are one."""
        text = f"{len(self.loaded)} tensors loaded"
        for what, names in (("kept at their initial values", self.missing), ("not used", self.unused)):
            if names:
                kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
                text += f"; {what}: {briefly(list(kinds))}"
        return text


def read_file(path: Path) -> State:
    """Tensors of a `.safetensors` file, or of the state dict in any other, which torch.save has written; on the CPU.

    The state dict may lie under `state_dict` (mmcv), `model` (Swin, MoBY, VideoMAE), `module` (DeepSpeed, VideoMAE) or
    `model_state` (TimeSformer); `module.` of a parallel wrapper is taken off its names. Runs none of a pickle's code.
    Raises WeightsError where there is no such file, where it is damaged, needs code of its own, or holds no state dict.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is a folder, not a file of weights" if path.is_dir() else f"no file {path}")
    try:
        held: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except Exception as error:  # damaged bytes surface as almost any error
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{path} was refused: its pickle asks for {asked[1]}, and pickled code is never run. If you trust whom "
                "it is from, read it once with torch.load(..., weights_only=False) and torch.save its state dict alone"
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise WeightsError(
            f"{path} cannot be read as a file of weights: {type(error).__name__} {reason}; it is cut short, or neither "
            "from torch.save nor safetensors under that suffix"
        ) from error
    for name in ("state_dict", "model", "module", "model_state"):
        if isinstance(held, dict) and isinstance(held.get(name), dict):
            held = held[name]
    if not isinstance(held, dict):
        raise WeightsError(f"{path} holds no state dict, but a {type(held).__name__}")
    if not held:
        raise WeightsError(f"{path} holds no tensors")
    if others := [str(key) for key, value in held.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise WeightsError(f"{path} holds no state dict: {briefly(others)} are not tensors")
    return {key.removeprefix("module."): value for key, value in held.items()}


def _unpickled(path: Path) -> Any:
    """What torch.save has written. Swin's training code puts its configuration beside the model, a dict in disguise,
    VideoMAE's its arguments.
    """
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode"), Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def load(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    missing: Sequence[str] = (),
    unused: Sequence[str] = (),
    advice: str = "",
) -> Report:
    """Copy `state` into `model`. `missing` and `unused` are regular expressions (full match) for expected leftovers,
    `advice` is for whoever has given weights of another model.

    Raises WeightsError, before anything is written, for any other missing or unused key, for every other shape, and for
    numbers that are not finite.
    """
    own = dict(model.state_dict())
    shared = [k for k in own if k in state]
    absent = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    problems = []
    if bad := [k for k in absent if not matches(k, missing)]:
        problems.append(f"missing: {briefly(bad)}")
    if bad := [k for k in extra if not matches(k, unused)]:
        problems.append(f"left over: {briefly(bad)}")
    if bad := [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in shared if state[k].shape != own[k].shape
    ]:
        problems.append(f"of another shape: {briefly(bad)}")
    if bad := [f"{k} {state[k].dtype}" for k in shared if state[k].is_floating_point() != own[k].is_floating_point()]:
        problems.append(f"of another type: {briefly(bad)}")
    if problems:
        told = "; ".join([*problems, advice] if advice else problems)
        raise WeightsError(f"these weights are not of this {type(model).__name__}; {told}")
    if bad := [k for k in shared if not state[k].isfinite().all()]:
        raise WeightsError(f"these weights are not finite, of a run that has diverged, or damaged: {briefly(bad)}")
    with torch.no_grad():
        for key in shared:
            own[key].copy_(state[key])
    return Report(tuple(shared), tuple(absent), tuple(extra))


AS_TRAINED = (
    "to be tested, --size and model.kind, patch and tubelet, data.frames and data.crop must be those that it was "
    "trained with, of a Swin model.window_size and whether it sees clips or images"
)


def take(model: nn.Module, source: Source) -> Report:
    """Give a classifier that is to be tested all of `source`, head included, as it is: what a start would make anew or
    convert was never trained.

    Of VideoMAE positions are no weights, so that nothing tells whether its grid was another. Raises WeightsError,
    before anything is written, where anything is absent or of another shape.
    """
    if "head.weight" not in source.state:
        raise WeightsError(f"{source.what} has no classes to be tested on: finetune it first")
    try:  # of both patch embeddings of a Swin, only its stream's is used
        return load(model, source.state, unused=[r"patch_embed(_2d)?\..*"], advice=AS_TRAINED)
    except WeightsError as error:
        raise WeightsError(f"{source.what}: {error}") from error


def start(
    model: nn.Module,
    source: Source,
    window: tuple[int, int, int],
    stream: Literal["clips", "images"],
    *,
    norm: bool,
) -> Report:
    """Start a classifier (`VideoSwinClassifier`, or one with its names) from `source`; arguments: `for_classifier`.

    The head keeps its initial values. Raises WeightsError, before anything is written, where anything else is absent or
    of another shape.
    """
    fit = for_classifier(source, window, stream, norm=norm)
    left = [k for k in fit.state if k.startswith("head.")]
    missing = [r"head\..*"] + ([r"norm\..*"] if source.masked and not norm else [])
    try:
        report = load(model, {k: v for k, v in fit.state.items() if k not in left}, missing=missing)
    except WeightsError as error:
        raise WeightsError(f"{source.what}: {error}") from error
    return replace(report, unused=(*left, *fit.dropped))


def for_classifier(
    source: Source, window: tuple[int, int, int], stream: Literal["clips", "images"], *, norm: bool
) -> Source:
    """`source` as a classifier of `stream` has it, with attention windows of (d, h, w) tokens; of images (1, h, w).

    Clips from images: `inflate`. Images from clips: the two frames' patch embeddings are added, which is what a still
    clip is given, and tables keep their rows of zero distance in time. Other depths of the window: `resize_tables`. A
    `norm` that came after the decoders (`Source.masked`) stays only with `norm`, as in the official code (quirk C).
    Raises WeightsError for tables of another height or width of window.
    """
    state, (depth, height, width) = dict(source.state), window
    wanted, other = ("patch_embed.", "patch_embed_2d.") if stream == "clips" else ("patch_embed_2d.", "patch_embed.")
    if stream == "images" or f"{wanted}proj.weight" not in state:
        depth = 1
    for key in [k for k in state if k.endswith("relative_position_bias_table")]:
        old = _depth(key, state[key], height, width)
        if old != depth:
            state |= resize_tables({key: state[key]}, (old, height, width), (depth, height, width))
    left = []
    if f"{wanted}proj.weight" in state:
        left += [k for k in state if k.startswith(other)]
    elif stream == "clips":
        state = inflate(state, window)
    else:
        planar = {k: v.sum(2) if v.ndim == 5 else v for k, v in state.items() if k.startswith(other)}
        state |= {k.replace(other, wanted): v for k, v in planar.items()}
    if source.masked and not norm:
        left += [k for k in state if k.startswith("norm.")]
    state = {k: v for k, v in state.items() if not k.startswith(other) and k not in left}
    return replace(source, state=state, dropped=(*left, *source.dropped))


def inflate(state: Mapping[str, Tensor], window_size: tuple[int, int, int]) -> State:
    """2D to 3D: the weights of a model of images (window (1, h, w)) for one with clips (window (d, h, w)).

    The video patch embedding repeats the image one over the two frames of a patch, divided by two; bias tables repeat
    over all 2d - 1 temporal distances (official `inflate_weights`). The video decoder has no 2D counterpart: it stays
    out, as do tables of another spatial window, which raise WeightsError.
    """
    out = dict(state)
    frames = 2
    depth, height, width = window_size
    rows = (2 * height - 1) * (2 * width - 1)
    for key, value in state.items():
        if key == "patch_embed_2d.proj.weight":
            out["patch_embed.proj.weight"] = value.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
        elif key.startswith("patch_embed_2d."):
            out[key.replace("patch_embed_2d.", "patch_embed.")] = value.clone()
        elif key.endswith("relative_position_bias_table"):
            if value.shape[0] != rows:
                raise WeightsError(
                    f"{key} has {value.shape[0]} rows; the table of a 2D window {height}x{width} has {rows}"
                )
            out[key] = value.repeat(2 * depth - 1, 1)
    return out


def resize_tables(state: Mapping[str, Tensor], old: tuple[int, int, int], new: tuple[int, int, int]) -> State:
    """Bias tables of window `old` for window `new` by trilinear interpolation (spec: 8x7x7 to 16x7x7 for SSv2).

    Of a depth of 1 only the rows of zero distance in time are left, as they are.
    """
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


def _depth(key: str, table: Tensor, height: int, width: int) -> int:
    """Of the window with this height and width that `table` is for, from its rows for 2d - 1 distances in time."""
    rows = (2 * height - 1) * (2 * width - 1)
    distances, rest = divmod(table.shape[0], rows)
    if rest or distances % 2 == 0:
        raise WeightsError(
            f"{key} has {table.shape[0]} rows, which is no odd multiple of the {rows} of a window {height}x{width}: it "
            "is of another height or width of window, and only the depth can be converted"
        )
    return (distances + 1) // 2
