"""Checkpoints: complete or absent, never half written, and refused with a reason where they do not fit."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from bevt.config import UserError

FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged or of another run; the message names the file and what to do."""


def save(folder: Path, step: int, payload: dict[str, Any], keep: int) -> Path:
    """Write `payload` as `folder/step_%08d.pt` and point `last.pt` at it; older ones than the newest `keep` go.

    The file appears under its name only after its bytes are on disk (fsync, then rename): a kill at any moment leaves
    the previous checkpoint whole. Raises CheckpointError where it cannot be written (a full disk, say).
    """
    path = folder / f"step_{step:08d}.pt"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for orphan in folder.glob("*.part"):  # of a kill while one was written
            orphan.unlink()
        try:
            with part.open("wb") as f:
                torch.save({"format": FORMAT, "step": step, **payload}, f)
                f.flush()
                os.fsync(f.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        link = folder / "last.part"
        link.symlink_to(path.name)
        link.replace(folder / "last.pt")
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}; make room or mend the folder, then continue with --resume"
        ) from error
    for old in _steps(folder)[:-keep]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def load(path: Path) -> dict[str, Any]:
    """The payload of a checkpoint, on the CPU. No pickled code is executed.

    Raises CheckpointError for a file that is absent, damaged, or not a checkpoint of this project.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is no checkpoint, or was cut short")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no checkpoint of this project: it holds more than tensors and plain data, "
            "and pickled code is never run"
        ) from error
    except Exception as error:  # torch raises a different type for every kind of damage
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of this project (format {FORMAT}); "
            "to convert one of another see bevt.models.weights"
        )
    return payload


def _steps(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step_*.pt") if re.fullmatch(r"step_\d{8}\.pt", p.name)]
    return sorted(found)
