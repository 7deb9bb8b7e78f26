"""`masked_linear_cross_entropy`: the public function. Checks, resolves the implementation, calls the op."""

from __future__ import annotations

import torch
from torch import Tensor

from bevt_kernels.masked_linear_cross_entropy.autograd import op
from bevt_kernels.registration import require, require_same_device, require_tensors, statistics_dtype
from bevt_kernels.select import Spec, resolve


def masked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a linear layer over selected rows, and its top-1 accuracy, without whole logits.

    Where a gradient will be wanted, this call computes it: the backward pass only scales what the call has kept.

    Args:
        hidden: (M, C) float32, bfloat16, float16 or float64. Under autocast it is cast as a linear layer would.
        weight: (V, C), in the dtype of `hidden` or in float32; products are in the dtype of `hidden`, softmax and sums
            in float32. A float32 weight beside low-precision `hidden` gets its gradient unrounded.
        bias: (V,), likewise.
        targets: (K,) int64 classes. What an unused slot holds does not matter.
        index: (K,) int64 rows of `hidden`, or -1 for an unused slot: K is a fixed capacity, so shapes stay static.
            A row may occur more than once.
        impl: "auto", "reference", "native" or "triton"; see `bevt_kernels.resolve`.

    Returns:
        (loss, accuracy): 0-dimensional float32 (float64 for float64) on the inputs' device; no host sync on an
        accelerator. No used slot: loss, accuracy and gradients are 0. The loss is differentiable once in `hidden`,
        `weight` and `bias`.

    Raises:
        ValueError: a shape, dtype or device that does not fit; on the CPU also an index or target out of range in a
            used slot. On CUDA, where looking would cost a sync, that makes the loss NaN ("triton") or is a device-side
            assertion ("reference"). NoImplementation (a ValueError): `impl` cannot serve. NotImplementedError: a
            second derivative. torch.func's transforms (grad, vjp, jvp) are not supported: RuntimeError.
    """
    require_tensors(hidden=hidden, weight=weight, bias=bias, targets=targets, index=index)
    device = hidden.device.type
    if hidden.dtype != torch.float64 and _has_autocast(device) and torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    _check(hidden, weight, bias, targets, index)
    output_mask = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight, bias)]
    spec = Spec(device, hidden.dtype, any(output_mask), classes=len(weight))
    name = resolve("masked_linear_cross_entropy", impl, spec)
    return op(hidden, weight, bias, targets, index, output_mask, name)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    """The compiler of torch 2.11 cannot trace the question."""
    return torch.amp.is_autocast_available(device)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor) -> None:
    """Raise ValueError where the arguments do not fit together."""
    require(
        hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1],
        f"hidden must be (M, C) and weight (V, C), got {tuple(hidden.shape)} and {tuple(weight.shape)}",
    )
    require(weight.shape[0] > 0, "weight has no classes: its first axis is 0")
    require(
        tuple(bias.shape) == (weight.shape[0],),
        f"bias must be ({weight.shape[0]},), one number a row of weight, got {tuple(bias.shape)}",
    )
    require(
        index.dim() == 1 and index.shape == targets.shape,
        f"index and targets must be (K,), got {tuple(index.shape)} and {tuple(targets.shape)}",
    )
    require(
        index.dtype == targets.dtype == torch.int64,
        f"index and targets must be int64, got {index.dtype} and {targets.dtype}",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(
            tensor.dtype in (hidden.dtype, statistics_dtype(hidden.dtype)),
            f"{name} must be as hidden, {hidden.dtype}, or {statistics_dtype(hidden.dtype)}; got {tensor.dtype}",
        )
    require_same_device(hidden=hidden, weight=weight, bias=bias, targets=targets, index=index)
