"""Checkpoints of several processes: whole tensors (DDP) and shards (FSDP2) restore each other, and one process both."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ENVIRONMENT, ROOT, same_tensors, train, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bevt.train import checkpoint
from bevt.train.checkpoint import CheckpointError, Checkpoints
from bevt.train.distributed import World, join_world

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")

KINDS = ("ddp", "fsdp")


def distributed(kind: str, seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """`trained`'s model in two processes, before its first step."""
    model, _ = trained(seed, steps=0)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The tensors of all processes in one, as `checkpoint.load` has them: without its help."""

    def full(value: torch.Tensor) -> torch.Tensor:
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()

    named = {name.removeprefix("module."): value for name, value in model.named_parameters()}
    return {
        "model": {name: full(value) for name, value in named.items()},
        "optimizer": {
            name: {key: full(state) for key, state in optimizer.state[value].items()} for name, value in named.items()
        },
    }


def processes(folder: Path) -> None:
    """What each of two processes does: `folder/one` is there; the others are written, and what is in them, in `.pt`."""
    world = join_world()

    def keep(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tensors = whole(model, optimizer)
        if world.main:
            torch.save(tensors, folder / f"{name}.pt")

    for seed, kind in enumerate(KINDS):
        model, optimizer = distributed(kind, seed)
        train(model, optimizer, 2)
        writer = Checkpoints(folder / kind, world, keep=2)
        writer.save(1, model, optimizer, {"kind": kind})
        keep(kind, model, optimizer)
        train(model, optimizer, 1)
        writer.wait()
        if kind == "fsdp":
            fail_on_one_disk(folder / kind, writer, world, model, optimizer)
    for kind in KINDS:
        for source in ("one", *KINDS):
            model, optimizer = distributed(kind, seed=7)
            checkpoint.restore(folder / source / "last", model, optimizer)
            keep(f"{source}_in_{kind}", model, optimizer)
            train(model, optimizer, 1)  # goes on
    world.close()


def fail_on_one_disk(
    folder: Path, writer: Checkpoints, world: World, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """The second process cannot write: both are told, and the checkpoint before stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not world.main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    writer.save(2, model, optimizer, {})
    with pytest.raises(CheckpointError, match="step_00000002: File too large"):
        writer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    world.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step_00000001"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, and one before them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    writer = Checkpoints(folder / "one", World(0, 1, torch.device("cpu")), keep=1)
    writer.save(1, *trained(seed=5), {})
    writer.wait()
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_reads_what_two_wrote(folder: Path, kind: str) -> None:
    """Bit for bit, by `load` and by `restore`."""
    path = folder / kind / "last"
    model, optimizer = trained(seed=7, steps=0)
    checkpoint.restore(path, model, optimizer)
    same_tensors(torch.load(folder / f"{kind}.pt"), model, optimizer)
    saved = checkpoint.load(path)
    same_tensors(saved, model, optimizer)
    assert saved["kind"] == kind


def test_both_processes_write(folder: Path) -> None:
    """Shards, or a part of the tensors that both have."""
    for kind in KINDS:
        assert {path.name for path in (folder / kind / "last").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["one", *KINDS])
def test_two_processes_read_what_others_wrote(folder: Path, source: str, kind: str) -> None:
    """Bit for bit."""
    model, optimizer = trained(seed=7, steps=0)
    checkpoint.restore(folder / source / "last", model, optimizer)
    same_tensors(torch.load(folder / f"{source}_in_{kind}.pt"), model, optimizer)


if __name__ == "__main__":
    processes(Path(sys.argv[1]))
