"""`linear`: the public function. It checks its arguments, resolves the implementation and calls the op."""

from __future__ import annotations

import torch
from torch import Tensor

from bevt_kernels.linear import reference
from bevt_kernels.linear.autograd import forward
from bevt_kernels.registration import (
    autocast_dtype,
    require,
    require_same_device,
    require_same_dtype,
    require_tensors,
)
from bevt_kernels.select import Spec, resolve


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """The linear layer x W^T + b.

    Args:
        x: (..., C); native: float32, any strides (copied unless rows are adjacent).
        weight: (N, C), in the dtype of `x`.
        bias: (N,), likewise, or None.
        impl: "auto", "reference" (`torch.nn.functional.linear`, whatever it takes) or "native" (float32 on a CPU); see
            `bevt_kernels.resolve`. Under autocast "auto" is what can serve autocast's dtype.

    Returns:
        (..., N). Native: once differentiable; in float32 also under autocast, 16-bit `x` included. An element is the
        same to the last bit for any number of rows around it and any number of threads, and so is its gradient in `x`;
        those of the weight and the bias are the same for any number of threads.

    Raises:
        ValueError: a shape, dtype or device that does not fit. NoImplementation (a ValueError): `impl` cannot serve.
            Native: NotImplementedError for a second derivative, RuntimeError under torch.func's grad and jvp.
    """
    require_tensors(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    require(
        x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1],
        f"x must be (..., C) and weight (N, C), got {tuple(x.shape)} and {tuple(weight.shape)}",
    )
    if bias is not None:
        require(
            tuple(bias.shape) == (weight.shape[0],),
            f"bias must be ({weight.shape[0]},), one number a row of weight, got {tuple(bias.shape)}",
        )
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    require_same_device(**tensors)
    dtype, autocast = x.dtype, autocast_dtype(x.device.type)
    if autocast and impl == "auto":
        dtype = autocast
    elif autocast and impl == "native" and dtype.itemsize == 2:
        x, dtype = x.float(), torch.float32
        tensors["x"] = x
    name = resolve("linear", impl, Spec(x.device.type, dtype))
    if not autocast or name == "native":
        require_same_dtype(**tensors)
    return reference.linear(x, weight, bias) if name == "reference" else forward(x, weight, bias, name)
