"""`linear`: the public function. It checks its arguments, resolves the implementation and calls the op."""

from __future__ import annotations

import torch
from torch import Tensor

from bevt_kernels.linear import reference
from bevt_kernels.linear.autograd import forward
from bevt_kernels.registration import require, require_same_device, require_tensors
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
            NotImplementedError (native): a second derivative.
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
    device, dtype = x.device.type, x.dtype
    if device == "cpu" and torch.is_autocast_enabled("cpu"):
        if impl == "auto":
            dtype = torch.get_autocast_dtype("cpu")
        elif impl == "native" and dtype.itemsize == 2:
            x, dtype = x.float(), torch.float32
    name = resolve("linear", impl, Spec(device, dtype))
    if name == "reference":
        return reference.linear(x, weight, bias)
    tensors = {"x": x, "weight": weight, **({} if bias is None else {"bias": bias})}
    for what, tensor in tensors.items():
        require(tensor.dtype == torch.float32, f"{what} must be float32, as x, got {tensor.dtype}")
    require_same_device(**tensors)
    return forward(x, weight, bias, name)
