"""What every tokenizer here needs: checks of its inputs, and weights read from files without running their code."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bevt.config import UserError


class TokenizerError(UserError):
    """Weights that are damaged, unsafe or of another model; the message names the file and what is wrong with it."""


def check_pixels(pixels: Tensor, downsample: int) -> None:
    """Raise ValueError (shape) or TypeError (dtype) where `pixels` is no (M, 3, H, W) float tensor that can be encoded.

    H and W are multiples of `downsample`. The range [0, 1] is not looked at: that would read the device on every call.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be (M, 3, H, W), got {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise TypeError(f"pixels must be float in [0, 1], got {pixels.dtype}; divide uint8 by 255 first")
    h, w = pixels.shape[2:]
    if h % downsample or w % downsample or not h or not w:
        raise ValueError(f"pixels must have a height and width that are multiples of {downsample}, got {h} x {w}")


def check_weights(tensors: dict[str, Tensor], expected: dict[str, torch.Size], path: str | Path, what: str) -> None:
    """Raise TokenizerError, listing every missing, unexpected and mis-shaped name, unless `tensors` fits `expected`."""
    faults = [f"missing {k} {tuple(s)}" for k, s in expected.items() if k not in tensors]
    faults += [f"unexpected {k} {tuple(t.shape)}" for k, t in tensors.items() if k not in expected]
    faults += [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(s)}"
        for k, s in expected.items()
        if k in tensors and tensors[k].shape != s
    ]
    if faults:
        raise TokenizerError(f"{path} does not hold the weights of {what}:\n  " + "\n  ".join(faults))


def check_file(path: str | Path) -> Path:
    """`path` as a Path; FileNotFoundError where it is no file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"no file {path}")
    return path


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file. FileNotFoundError; TokenizerError for damage."""
    path = check_file(path)
    try:
        with safe_open(str(path), framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise TokenizerError(f"{path} is not a whole safetensors file: {error}") from error


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `tensors`; the file appears whole or not at all. OSError where the folder cannot be written."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} in")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(unfinished), metadata)
        unfinished.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


# Files of torch.save. A pickle is a program whose only reach into Python is the names it asks for; here every name
# resolves to one of the stand-ins below, or the file is refused. torch.load(weights_only=True) cannot do this: it
# rejects a whole module in the format before 1.6, whose module classes are persistent ids.


class _Shell:
    """In place of a module (or device) of the file: keeps the state it is given, does nothing."""

    def __init__(self, *args: Any) -> None:
        pass


class _View(NamedTuple):
    """In place of a tensor of the file: where its numbers lie."""

    storage: tuple[str, torch.dtype, int]  # key, dtype, elements
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _view(storage: tuple[str, torch.dtype, int], offset: int, size: Any, stride: Any, *_: Any) -> _View:
    return _View(storage, offset, tuple(size), tuple(stride))


def _same(data: Any, *_: Any) -> Any:
    return data


_STAND_INS: dict[str, Any] = {
    **dict.fromkeys(
        (
            "dall_e.encoder.Encoder",
            "dall_e.encoder.EncoderBlock",
            "dall_e.utils.Conv2d",
            "torch.nn.modules.container.Sequential",
            "torch.nn.modules.activation.ReLU",
            "torch.nn.modules.pooling.MaxPool2d",
            "torch.nn.modules.linear.Identity",
            "torch.device",
        ),
        _Shell,
    ),
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,  # as protocol 2 spells it
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}


class _RefusedError(ValueError):
    """The file asks for a name that is not in the list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise _RefusedError(f"it asks for {module}.{name}, which no DALL-E encoder needs; it was not run") from None

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # (the word, class, source file, source): the format before 1.6
            return pid[1]
        kind, dtype, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(v is not None for v in view):
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")
        return (key, dtype, numel)


def read_pickle(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file in which torch.save put a DALL-E encoder as a whole module, or any state dict, by dotted name.

    Runs none of the file's code. Reads both of torch.save's formats (zip; the one before 1.6). FileNotFoundError;
    TokenizerError where the file is damaged, holds something else, or asks for a name outside the list (which one).
    """
    path = check_file(path)
    try:
        with path.open("rb") as f:
            zipped = f.read(4) == b"PK\x03\x04"
            f.seek(0)
            root, storages = _read_zip(f) if zipped else _read_legacy(f)
        return {name: _tensor(view, storages) for name, view in _walk(root)}
    except _RefusedError as error:
        raise TokenizerError(f"{path} was refused: {error}") from None
    except OSError:
        raise
    except Exception as error:  # damaged bytes surface as almost any error of the unpickler; all mean the same
        raise TokenizerError(
            f"{path} is damaged, or not a file of torch.save with a DALL-E encoder or a state dict: "
            f"{type(error).__name__}: {error}"
        ) from error


def _read_zip(f: IO[bytes]) -> tuple[Any, dict[str, bytes]]:
    """The stand-in tree, and the bytes of its storages."""
    with zipfile.ZipFile(f) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = index.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
            raise ValueError(f"its byte order is not this machine's ({sys.byteorder})")
        with archive.open(index) as pickled:
            root = _Unpickler(pickled).load()
        data = f"{folder}data/"
        names = (name for name in archive.namelist() if name.startswith(data))
        return root, {name.removeprefix(data): archive.read(name) for name in names}


def _read_legacy(f: IO[bytes]) -> tuple[Any, dict[str, bytes]]:
    """The same of the format before 1.6: five pickles, then (int64 count, numbers) of each storage in listed order."""
    magic, protocol = _Unpickler(f).load(), _Unpickler(f).load()
    if (magic, protocol) != (0x1950A86A20F9469CFC6C, 1001):
        raise ValueError("it does not start as torch.save's files do")
    if _Unpickler(f).load()["little_endian"] != (sys.byteorder == "little"):
        raise ValueError(f"its byte order is not this machine's ({sys.byteorder})")
    root = _Unpickler(f).load()
    item_size = {view.storage[0]: view.storage[1].itemsize for _, view in _walk(root)}
    storages = {}
    for key in _Unpickler(f).load():
        (count,) = struct.unpack("=q", f.read(8))
        storages[key] = f.read(count * item_size[key])
    return root, storages


def _walk(root: Any, prefix: str = "") -> Iterator[tuple[str, _View]]:
    """Name and place of every tensor in a module tree or a state dict."""
    if isinstance(root, _Shell):
        for name, parameter in vars(root).get("_parameters", {}).items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, child in vars(root).get("_modules", {}).items():
            yield from _walk(child, f"{prefix}{name}.")
    elif isinstance(root, dict) and all(isinstance(value, _View) for value in root.values()):
        yield from root.items()
    else:
        raise ValueError(f"it holds a {type(root).__name__} that is neither a module nor a state dict")


def _tensor(view: _View, storages: dict[str, bytes]) -> Tensor:
    key, dtype, numel = view.storage
    data = storages[key]
    if len(data) != numel * dtype.itemsize:
        raise ValueError(f"storage {key} has {len(data)} bytes, expected {numel * dtype.itemsize}")
    return torch.frombuffer(bytearray(data), dtype=dtype).as_strided(view.size, view.stride, view.offset)
