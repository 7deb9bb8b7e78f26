"""Checkpoints: whole or absent, and refused in one clear line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bevt.train import checkpoint
from bevt.train.checkpoint import CheckpointError


def payload(value: float) -> dict[str, Any]:
    """Something to save."""
    return {"model": {"w": torch.full((100,), value)}, "config": {"window": [1, 2]}}


def names(folder: Path) -> list[str]:
    """What lies there."""
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    """What was saved, with the step; `last.pt` is it."""
    path = checkpoint.save(tmp_path / "new", 7, payload(1.0), keep=3)
    assert path.name == "step_00000007.pt"
    for name in (path, tmp_path / "new" / "last.pt"):
        saved = checkpoint.load(name)
        assert saved["step"] == 7
        assert saved["config"] == {"window": [1, 2]}
        assert torch.equal(saved["model"]["w"], torch.ones(100))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Two of four, by step and not by time; files of other names stay."""
    (tmp_path / "step_best.pt").write_text("mine")
    for step in (3, 10, 200, 100000000 - 1):
        checkpoint.save(tmp_path, step, payload(step), keep=2)
    assert names(tmp_path) == ["last.pt", "step_00000200.pt", "step_99999999.pt", "step_best.pt"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_99999999.pt"
    assert os.readlink(tmp_path / "last.pt") == "step_99999999.pt"


def test_latest_of_nothing(tmp_path: Path) -> None:
    """No folder, and a folder with a part of a checkpoint only."""
    assert checkpoint.latest(tmp_path / "absent") is None
    (tmp_path / "step_00000001.part").write_text("")
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_failing_write_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """A disk that fills up while the second is written."""
    checkpoint.save(tmp_path, 1, payload(1.0), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(moment, full)
        with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002\.pt: No space left on device; "):
            checkpoint.save(tmp_path, 2, payload(2.0), keep=1)
    assert names(tmp_path) == ["last.pt", "step_00000001.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
    checkpoint.save(tmp_path, 2, payload(2.0), keep=1)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2


class Code:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def damage(path: Path, how: str) -> None:
    """Make `path` something that is no checkpoint."""
    checkpoint.save(path.parent, 1, payload(1.0), keep=1).rename(path)
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("no checkpoint")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "code":
        torch.save({"format": 1, "model": Code()}, path)
    elif how == "foreign":
        torch.save({"state_dict": {"w": torch.zeros(3)}}, path)
    elif how == "list":
        torch.save([torch.zeros(3)], path)
    elif how == "zeros":
        path.write_bytes(data[:64] + bytes(400) + data[464:])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("absent", "no checkpoint at "),
        ("cut", "is no checkpoint, or was cut short"),
        ("empty", "is no checkpoint, or was cut short"),
        ("text", "is no checkpoint, or was cut short"),
        ("folder", "is no checkpoint, or was cut short"),
        ("zeros", "cannot be read as a checkpoint"),
        ("code", "holds more than tensors and plain data, and pickled code is never run"),
        ("foreign", "is no checkpoint of this project"),
        ("list", "is no checkpoint of this project"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, why: str) -> None:
    """One plain line that names the file; nothing in it is run."""
    monkeypatch.chdir(tmp_path)
    damage(tmp_path / "file.pt", how)
    with pytest.raises(CheckpointError, match=why) as caught:
        checkpoint.load(tmp_path / "file.pt")
    assert str(tmp_path / "file.pt") in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    assert not (tmp_path / "ran").exists()
