"""One process or many under torchrun: who am I, and how gradients meet."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """One process among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    waiting: dist.ProcessGroup | None = None
    """For `barrier`: a group without the others' time limit, since one process may look at files for hours."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over all processes; itself where there is one."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def without_sync(self, model: nn.Module, skip: bool) -> AbstractContextManager[None]:
        """A context in which backward leaves gradients on this process, if `skip`: until a step's last micro-batch."""
        if skip and isinstance(model, DistributedDataParallel):
            return cast(AbstractContextManager[None], model.no_sync())
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """`values` averaged over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def all(self, flag: Tensor) -> Tensor:
        """Whether `flag`, a bool scalar on the device, is set on all processes; it stays on the device."""
        if self.size == 1:
            return flag
        unset = (~flag).float()
        dist.all_reduce(unset)
        return unset == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process. The processes meet on the CPU: no device is waited for."""
        if self.size == 1:
            return flag
        total = torch.tensor(float(flag))
        dist.all_reduce(total)
        return bool(total.item())

    def broadcast(self, text: str) -> str:
        """The first process's `text`, on every process."""
        if self.size == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, group=self.waiting)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(self.waiting)

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


def join_world() -> World:
    """The world that torchrun's environment describes; one process without it. NCCL for GPUs, gloo for CPUs."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, size, device)
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store over its restarts, in which new processes would find the addresses of the dead
        # (PyTorch issue 135712). Its agents count restarts by themselves: between nodes the numbers can differ, so
        # there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has to be set, as `bevt slurm` does.
        kept = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", kept)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(rank, size, device, dist.new_group(backend="gloo", timeout=timedelta(days=7)))
