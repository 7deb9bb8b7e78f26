"""Checkpoints by torch.distributed.checkpoint (DCP): complete or absent, and refused with a reason if they don't fit.

A checkpoint is a folder `step_%08d`. DCP's files in it hold the tensors, `model.NAME` and `optimizer.NAME.STATE`, by
names that do not depend on how many processes wrote them, whole (DDP) or in shards (FSDP2, DTensor): any number reads
them again. `state.json` holds all else. The optimizer's hyper-parameters are not kept: the configuration has them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture
from torch.optim import Optimizer

from bevt.config import UserError
from bevt.train.distributed import World

FORMAT = 2
STATE, METADATA = "state.json", ".metadata"

_log = logging.getLogger("bevt.train")
# DCP's warning that one process without a group is one process; the writing thread cannot be given filters of its own.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged or of another run; the message names the file and what to do."""


class Checkpoints:
    """Writes the checkpoints of a run, all processes together, while training goes on; `last` points at the newest.

    A checkpoint appears under its name once the bytes of every process are on disk (fsync, then rename): a kill at any
    moment leaves the previous one whole. Then older ones than the newest `keep` go. Several machines need one file
    system.
    """

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self.newest = latest(folder)
        """What a run continues from; after `save` what is being written."""
        self._writing: Future[Metadata] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        plain: Mapping[str, Any],
        others: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Begin to write the checkpoint of `step`, as everything is at this moment; `plain` is what JSON can hold,
        `others` further tensors, by names like `average.NAME`.

        First waits for the one before. Where that failed, it waits for this one too, and raises CheckpointError where
        that fails as well. One that is there stays.
        """
        failure = self._outcome()
        path = self.folder / f"step_{step:08d}"
        if path != self.newest:
            state = {"format": FORMAT, "step": step, **plain}
            saving = dcp.async_save(
                {**_tensors(model, optimizer if optimizer.state else None), **(others or {})},
                storage_writer=_Writer(path, state, self.keep),
                process_group=self.world.checkpointing,
                no_dist=self.world.size == 1,
            )
            self._writing, self.newest = cast("Future[Metadata]", saving), path
        if failure:
            self.wait()
            _log.warning("%s; %s could be written", failure, path)
        return path

    @property
    def writing(self) -> bool:
        """One was begun whose outcome nobody has asked for, in all processes."""
        return self._writing is not None

    @property
    def failed(self) -> bool:
        """What was begun cannot be written, as this process knows already."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until what was begun is there, in all processes; CheckpointError in all where it cannot be written."""
        if failure := self._outcome():
            raise failure

    def _outcome(self) -> CheckpointError | None:
        """Waits; why what was begun cannot be written, if so."""
        if self._writing is None:
            return None
        error = self._writing.exception()
        self._writing = None
        if error is None:
            return None
        assert self.newest is not None
        if self.world.main:
            shutil.rmtree(self.newest.with_suffix(".part"), ignore_errors=True)
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        said = reason.strerror if isinstance(reason, OSError) else f"{type(reason).__name__}: {_line(reason)}"
        failure = CheckpointError(
            f"cannot write {self.newest}: {said}; make room or mend the folder, then continue with --resume"
        )
        failure.__cause__, self.newest = reason, latest(self.folder)
        return failure

    def close(self) -> None:
        """`wait`, where the run may end by another error, which must not be hidden: a failure is logged."""
        try:
            self.wait()
        except CheckpointError as error:
            _log.warning("%s", error)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. CheckpointError where all are single files (format 1)."""
    steps = _steps(folder)
    if not steps and (old := _steps(folder, ".pt")):
        raise CheckpointError(
            f"{old[-1]} is of format 1, a single file, which is no longer read: "
            "continue with the version that wrote it, or start a new run in another folder"
        )
    return steps[-1] if steps else None


def read_state(path: Path) -> dict[str, Any]:
    """All of a checkpoint but its tensors, of which is checked that they are there and not cut short.

    Raises CheckpointError for one that is absent, damaged, or not of this project. No pickled code is executed.
    """
    return _open(path)[0]


def load(path: Path, *, optimizer: bool = True) -> dict[str, Any]:
    """`read_state`, and the tensors on the CPU: `model` {name: tensor}, `optimizer` {name: {state: tensor}}, and what a
    task adds, as `average` {name: tensor}.

    Without `optimizer` its tensors are not read. Raises CheckpointError as `read_state`.
    """
    state, metadata = _open(path, whole=True)
    tensors = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype)
        for name, kept in _kept(metadata).items()
        if optimizer or not name.startswith("optimizer.")
    }
    _read(path, metadata, tensors)
    whole: dict[str, Any] = {**state, "model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, name = name.partition(".")
        if group == "optimizer":
            parameter, _, key = name.rpartition(".")
            whole[group].setdefault(parameter, {})[key] = tensor
        else:
            whole.setdefault(group, {})[name] = tensor
    return whole


def restore(path: Path, model: nn.Module, optimizer: Optimizer, others: Mapping[str, Tensor] | None = None) -> None:
    """Read a checkpoint into `model`, `optimizer` and `others`, in place; of sharded ones each process its own shards.

    Raises CheckpointError as `read_state`, and for a model or optimizer whose tensors are others.
    """
    _, metadata = _open(path, whole=True)
    kept = {name: tensor.size for name, tensor in _kept(metadata).items()}
    begun = any(name.startswith("optimizer.") for name in kept)  # not so before the first step
    tensors = {**_tensors(model, optimizer if begun else None), **(others or {})}
    own = {name: tensor.shape for name, tensor in tensors.items()}
    if differing := [name for name in {**own, **kept} if own.get(name) != kept.get(name)]:
        was, now = (tuple(each[differing[0]]) if differing[0] in each else "none" for each in (kept, own))
        raise CheckpointError(
            f"{path} is of another model: {len(differing)} tensors differ, the first is {differing[0]}, {was} for {now}"
        )
    _read(path, metadata, tensors)


def _tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """The tensors themselves, by their names in a checkpoint. Gives an optimizer that has no state yet one of zeros."""
    tensors = {f"model.{name}": value for name, value in get_model_state_dict(model).items()}
    states = get_optimizer_state_dict(model, optimizer)["state"] if optimizer else {}
    for name, state in cast("dict[str, dict[str, Tensor]]", states).items():
        tensors.update({f"optimizer.{name}.{key}": value for key, value in state.items()})
    return cast("dict[str, Tensor]", tensors)


class _Writer(dcp.FileSystemWriter):
    """DCP's, into `PATH.part`; in `finish`, once all processes have written, the first one makes it PATH."""

    def __init__(self, path: Path, state: dict[str, Any], keep: int) -> None:
        self.part = path.with_suffix(".part")
        super().__init__(self.part)
        self.final, self.state, self.keep = path, state, keep

    def storage_meta(self) -> None:
        """None: it would pickle this machine's path, by a class whose module depends on Python's version."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder is made once, by the first process:

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for orphan in self.part.parent.glob("*.part"):  # of a kill while one was written
            _remove(orphan)
        self.part.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:  # torch.save hides the file's OSError behind one of its own
            reason: BaseException | None = error
            while reason and not isinstance(reason, OSError):
                reason = reason.__cause__ or reason.__context__
            raise reason or error from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        files = {path.name: _checksum(path) for path in self.part.glob("*.distcp")}
        (self.part / STATE).write_text(json.dumps({**self.state, "files": files}, indent=1))
        for path in (self.part / METADATA, self.part / STATE, self.part):
            _sync(path)
        folder = self.final.parent
        self.part.rename(self.final)
        link = folder / "last.part"
        link.symlink_to(self.final.name)
        link.replace(folder / "last")
        _sync(folder)
        for old in _steps(folder)[: -self.keep]:
            _remove(old.rename(old.with_suffix(".part")))  # never half a checkpoint under a whole one's name


class _Reader(dcp.FileSystemReader):
    """DCP's, with metadata that was read by `_open`."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


_ALLOWED: dict[tuple[str, str], Any] = {
    (each.__module__, each.__qualname__): each
    for each in (
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
        dcp_metadata.TensorProperties,
        dcp_metadata.ChunkStorageMetadata,
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
        torch.serialization._get_layout,
    )
}
"""What metadata of tensors is made of, beside data types; not `BytesStorageMetadata`: DCP would unpickle the bytes."""


class _RefusedError(ValueError):
    """The file asks for a name that is not in the list."""


class _Unpickler(pickle.Unpickler):
    """Of DCP's `.metadata`: knows its classes, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]


OF_FILES = (
    "With files of weights `bevt finetune`, `bevt test` and VideoMAE's pretraining can begin, BEVT's pretraining only "
    "with checkpoints"
)


def _open(path: Path, *, whole: bool = False) -> tuple[dict[str, Any], Metadata]:
    """Plain state and metadata of a checkpoint whose files are all there and long enough; `whole`: as written."""
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint: it is a file and not a folder. {OF_FILES}")
    for name in (STATE, METADATA):
        if not (path / name).is_file():
            last = path / "checkpoints" / "last"
            hint = f"; {last} is one" if last.exists() else ""
            if (path / "model.safetensors").exists():
                hint = f"; {path / 'model.safetensors'} is a file of weights. {OF_FILES}"
            raise CheckpointError(f"{path} is no checkpoint, or was cut short: it has no file {name}{hint}")
    try:
        state = json.loads((path / STATE).read_text())
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is no checkpoint of this project (format {FORMAT}); "
                "to convert one of another see bevt.models.weights"
            )
        with (path / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        _check_files(path, metadata)
        files = state.pop("files")
        for name in sorted(files) if whole else ():
            if _checksum(path / name) != files[name]:
                raise CheckpointError(f"{path} is damaged: {name} is not as it was written")
    except CheckpointError:
        raise
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} is no checkpoint of this project, or is damaged: {METADATA} asks for {_line(error)}, and holds "
            "more than the places of tensors; pickled code is never run"
        ) from error
    except Exception as error:  # damaged bytes surface as almost any error
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_line(error)}") from error
    return state, metadata


def _check_files(path: Path, metadata: Metadata) -> None:
    """Raise CheckpointError unless every tensor is complete and lies in files of this folder that are long enough."""
    sizes: dict[str, int] = {}
    for name, tensor in _kept(metadata).items():
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise CheckpointError(f"{path} is damaged: its parts of {name} are not the whole tensor")
        for chunk in tensor.chunks:
            place: _StorageInfo = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            file = place.relative_path
            if not re.fullmatch(r"__\d+_\d+\.distcp", file):
                raise CheckpointError(f"{path} is damaged: {METADATA} names a file {file!r}")
            if file not in sizes:
                sizes[file] = (path / file).stat().st_size if (path / file).is_file() else -1
            needed = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            if sizes[file] < 0:
                raise CheckpointError(f"{path} is damaged: it has no file {file}")
            if place.offset < 0 or place.length < needed or sizes[file] < place.offset + place.length:
                raise CheckpointError(f"{path} is damaged: {file} was cut short ({sizes[file]} bytes)")


def _kept(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint; all that `_Unpickler` lets in."""
    return cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)


def _read(path: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, each process for itself."""
    try:
        dcp.load(cast("dict[str, Any]", tensors), storage_reader=_Reader(path, metadata), no_dist=True)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_line(reason)}") from reason


def _line(error: BaseException) -> str:
    """The first sentence of a message that may have many lines."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _steps(folder: Path, suffix: str = "") -> list[Path]:
    found = folder.glob(f"step_*{suffix}")
    return sorted(path for path in found if re.fullmatch(r"step_\d{8}", path.name.removesuffix(suffix)))


def _checksum(path: Path) -> int:
    """CRC-32 of a file, 1 GB/s and more."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(2**24):
            crc = zlib.crc32(piece, crc)
    return crc


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
