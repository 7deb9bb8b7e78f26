"""One process or many under torchrun: who am I, and how gradients meet."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bevt.models.bevt import MaskedInput, MaskedTokens
from bevt.models.video_swin import SwinBlock
from bevt.models.vit import Block

T = TypeVar("T")


class _Whole(nn.Module):
    """What DDP wraps: in a pass of one stream it sees every parameter, so that it need not search for unused ones.

    Those of the other stream have their gradients from an earlier pass.
    """

    def __init__(self, model: MaskedTokens) -> None:
        super().__init__()
        self.model = model
        self.complete = True
        """Whether gradients are exchanged in this pass."""

    def forward(self, **inputs: MaskedInput) -> dict[str, Tensor]:
        """As the model's."""
        out = self.model(**inputs)
        if self.complete:
            others = [stream for stream in self.model.streams if stream not in inputs]
            idle = [p for stream in others for p in self.model.own_parameters(stream)]
            for stream in inputs:
                out[f"loss_{stream}"] = cast(Tensor, _Touch.apply(out[f"loss_{stream}"], *idle))
        return out


class _Touch(torch.autograd.Function):
    """Its first argument, as if it depended on the others: their gradient is None, which DDP takes for done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.others


def shard(tensor: Tensor) -> Tensor:
    """What this process holds of it: of a sharded one its shard, else all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(
    model: nn.Module, world: World, parallel: Literal["ddp", "fsdp"], make: Callable[[], nn.Module]
) -> nn.Module | None:
    """`model` with whole parameters in the first process, where it is sharded in one that `make` makes.

    None in the others, which take part in gathering them.
    """
    state: dict[str, Any] = {}
    sharded = world.size > 1 and parallel == "fsdp"
    if sharded:
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not world.main:
        return None
    if sharded:
        from bevt.models import weights  # here: it reads files, for which a GPU machine need not have the packages

        model = make()
        weights.load(model, state)
    return model


@dataclass(frozen=True)
class World:
    """One process among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    waiting: dist.ProcessGroup | None = None
    """For `barrier`: a group without the others' time limit, since one process may look at files for hours."""
    checkpointing: dist.ProcessGroup | None = None
    """For `Checkpoints`: a group that only its writing thread uses."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module, parallel: Literal["ddp", "fsdp"]) -> nn.Module:
        """`model` with gradients averaged over all processes; itself where there is one.

        `fsdp` shards it in place: each block, and part of one stream, is gathered for its own turn alone.
        """
        if self.size == 1:
            return model
        if parallel == "ddp":
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            whole = _Whole(model) if isinstance(model, MaskedTokens) else model
            # Buffers are MoBY's queues, which all processes fill alike.
            return DistributedDataParallel(
                whole, device_ids=device_ids, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        # That its outputs may be views matters to whoever changes them in place, which nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.size,))
        for part in model.modules():
            if isinstance(part, (SwinBlock, Block)):
                fully_shard(part, mesh=mesh)
        if isinstance(model, MaskedTokens):
            for own in (part for stream in model.streams for part in model.own_parts(stream)):
                fully_shard(own, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def synchronising(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """The context of a forward and backward pass of one stream, the `last` of a step or not.

        With DDP gradients stay on their process until the last pass; with FSDP each pass adds to the shards.
        """
        if not isinstance(model, DistributedDataParallel):
            return nullcontext()
        if isinstance(model.module, _Whole):
            model.module.complete = last
        return nullcontext() if last else cast(AbstractContextManager[None], model.no_sync())

    def norms(self, gradients: list[Tensor]) -> Tensor:
        """(gradients,) their norms, whole also where each process has a shard."""
        if not isinstance(gradients[0], DTensor):
            return torch.stack(torch._foreach_norm(gradients))
        local = torch.stack(torch._foreach_norm(list(map(shard, gradients)))).double() ** 2
        dist.all_reduce(local)
        return local.sqrt().to(gradients[0].dtype)

    def mean(self, values: Tensor) -> Tensor:
        """`values` averaged over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def concatenate(self, values: Tensor, dim: int) -> Tensor:
        """`values` of all processes, joined along `dim` in the order of their ranks."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts, dim)

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

    def gather(self, item: T) -> list[T]:
        """Every process's `item`, by rank, on every process; the processes meet on the CPU."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.waiting)
        return items

    def collect(self, item: T) -> list[T] | None:
        """Every process's `item`, by rank, on the first; None on the others."""
        if self.size == 1:
            return [item]
        items: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(item, items, dst=0, group=self.waiting)
        return items

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
    waiting = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return World(rank, size, device, waiting, checkpointing=dist.new_group(backend="gloo"))
