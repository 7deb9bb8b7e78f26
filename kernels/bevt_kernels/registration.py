"""How an op becomes a `torch.library` op (schema, kernel, fake, autograd, FLOP formula), and checks that ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("bevt_kernels", "DEF")


def define(
    name: str,
    schema: str,
    implementations: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> torch._ops.OpOverload:
    """Register the op `bevt_kernels::name` and return it.

    The schema's last argument is `str impl`, the key into `implementations`, which get the arguments before it. They
    run with autocast off: an op's arithmetic is what its documentation says, wherever it is called. `fake` gets the
    same arguments and returns empty outputs; `flops` gets shapes in the place of tensors.
    """
    LIBRARY.define(name + schema)

    def kernel(*args: Any) -> Any:
        *inputs, impl = args
        if impl not in implementations:
            raise ValueError(
                f"bevt_kernels::{name} has no implementation {impl!r}; it has {', '.join(implementations)}"
            )
        first = next(arg for arg in inputs if isinstance(arg, Tensor))
        # device_of: Triton launches on the current GPU, which need not be the tensors'.
        with torch.autocast(first.device.type, enabled=False), torch.cuda.device_of(first):
            return implementations[impl](*inputs)

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bevt_kernels::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)
    packet = getattr(torch.ops.bevt_kernels, name)
    register_flop_formula(packet)(lambda *args, out_shape=None, **kwargs: flops(*args[:-1]))
    return packet.default


def differentiable(op: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> None:
    """Make `function` the derivative of `op`. Its forward calls `op` under `torch._C._AutoDispatchBelowAutograd()`.

    Registered on the dispatcher rather than called from the API, so that a compiler traces the op as one node and the
    op is differentiable however it is called.
    """
    LIBRARY.impl(op.name(), function.apply, "Autograd")


def refuse_second_derivative(name: str) -> None:
    """For a backward formula: gradient mode is on there only under `create_graph=True`. Raises NotImplementedError."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name} has no second derivative: differentiate without create_graph=True")


def chunks(items: int, numbers_per_item: int, device: torch.device) -> Iterator[slice]:
    """Slices of `range(items)` that make about 2**20 numbers each on the CPU, 2**24 elsewhere.

    4 MB of float32 stay in the outer caches of a CPU: 16 windows x 4 heads of 392 tokens, forward and backward, took
    126 ms against 202 ms in one piece (one thread, Zen 3).
    A GPU needs fewer, larger kernels: 2**24 is 2048 rows of 8192 logits.
    """
    step = max(1, (2**20 if device.type == "cpu" else 2**24) // max(1, numbers_per_item))
    for start in range(0, items, step):
        yield slice(start, min(start + step, items))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where sums and softmax are taken: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_tensors(**tensors: object) -> None:
    """Raise ValueError, naming it, where an argument is no dense tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be dense, got layout {tensor.layout}: call to_dense() first")


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on this type of device; None where it is off."""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def require_same_dtype(**tensors: Tensor) -> None:
    """Raise ValueError, naming the tensor, where one has another dtype than the first."""
    (first, x), *others = tensors.items()
    for name, tensor in others:
        require(tensor.dtype == x.dtype, f"{name} must be {x.dtype}, as {first}, got {tensor.dtype}")


def require_same_device(**tensors: Tensor) -> None:
    """Raise ValueError, naming each tensor's device, where they are not all on one."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {listed}")
