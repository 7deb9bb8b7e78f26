"""State dicts from files, and files that hold none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from swins import equal
from torch import nn

from bevt.models import weights
from bevt.models.names import WeightsError

STATE = {"norm.weight": torch.arange(4.0), "norm.bias": torch.ones(4)}


@pytest.mark.parametrize("key", ["", "state_dict", "model", "model_state"])
@pytest.mark.parametrize("zipped", [True, False], ids=["", "before torch 1.6"])
def test_a_state_dict_is_read_wherever_it_lies(tmp_path: Path, key: str, zipped: bool) -> None:
    wrapped = {f"module.{k}": v for k, v in STATE.items()}
    held = {key: wrapped, "epoch": 3, "optimizer": {"state": {}}} if key else wrapped
    torch.save(held, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert equal(weights.read_file(tmp_path / "w.pth"), STATE)


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert equal(weights.read_file(tmp_path / "w.safetensors"), STATE)


class CfgNode(dict):
    """As yacs defines it: a dictionary with attributes."""

    def __init__(self, items: dict[str, Any]) -> None:
        super().__init__(items)
        self.__dict__["__immutable__"] = True


def test_the_configuration_in_a_checkpoint_of_swin_does_not_hinder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yacs = ModuleType("yacs.config")
    yacs.CfgNode = CfgNode  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(CfgNode, "__module__", "yacs.config")
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        torch.save({"model": STATE, "config": CfgNode({"MODEL": CfgNode({"SWIN": [2, 2]})})}, tmp_path / "w.pth")
    assert equal(weights.read_file(tmp_path / "w.pth"), STATE)


class Malicious:
    """Whose unpickling makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def _damaged(path: Path) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("w.pth", lambda path: None, r"no file .*w\.pth"),
        ("w.pth", lambda path: path.mkdir(), r"w\.pth is a folder, not a file"),
        ("w.pth", _damaged, r"w\.pth cannot be read as a file of weights: .*cut short"),
        ("w.pth", lambda path: path.write_bytes(b""), r"cannot be read as a file of weights: EOFError"),
        ("w.bin", lambda path: path.write_bytes(b"no weights"), r"cannot be read as a file of weights"),
        ("w.safetensors", lambda path: torch.save(STATE, path), r"cannot be read .* nor safetensors under that suffix"),
        ("w.pth", lambda path: torch.save({"model": Malicious()}, path), r"asks for \w+\.mkdir, .*weights_only=False"),
        ("w.pth", lambda path: torch.save(nn.Linear(2, 2), path), r"asks for torch\.nn\.modules\.linear\.Linear, and"),
        ("w.pth", lambda path: torch.save([torch.ones(1)], path), r"holds no state dict, but a list"),
        ("w.pth", lambda path: torch.save({"model": {}}, path), r"holds no tensors"),
        ("w.pth", lambda path: torch.save({"epoch": 3, **STATE}, path), r"no state dict: epoch are not tensors"),
    ],
    ids=["missing", "folder", "cut", "empty", "text", "suffix", "code", "module", "list", "no tensors", "a number"],
)
def test_files_that_hold_no_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, write: Callable[[Path], Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=message):
        weights.read_file(tmp_path / name)
    assert not (tmp_path / "ran").exists()
