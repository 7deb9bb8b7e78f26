"""`conv3x3`: the public function. It checks its arguments, resolves the implementation and calls the op."""

from __future__ import annotations

import torch
from torch import Tensor

from bevt_kernels.conv3x3 import reference
from bevt_kernels.conv3x3.ops import op
from bevt_kernels.registration import (
    autocast_dtype,
    require,
    require_same_device,
    require_same_dtype,
    require_tensors,
)
from bevt_kernels.select import Spec, resolve


def outputs_adjacent(weight: Tensor) -> Tensor:
    """A copy of the weight (N, C, 3, 3) in the layout that native reads in place."""
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool = False, impl: str = "auto") -> Tensor:
    """A 3x3 convolution with stride 1 and a border of zeros, as frozen encoders have them.

    Args:
        x: (M, C, H, W); native: float32, copied unless channels-last.
        weight: (N, C, 3, 3), in the dtype of `x`. Native copies it unless its outputs are adjacent in memory
            (`outputs_adjacent`).
        bias: (N,), likewise.
        relu: convolve max(x, 0).
        impl: "auto", "reference" (`torch.nn.functional.conv2d`, whatever it takes) or "native" (float32 on a CPU, no
            gradient); see `bevt_kernels.resolve`. Under autocast "auto" is what can serve autocast's dtype, and native
            computes in float32.

    Returns:
        (M, N, H, W); native: channels-last. Native is Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308): a
        quarter of the products, and larger rounding errors than a direct convolution's (README.md has figures).
        NaN and infinity spread over their tile of 4x4 outputs.

    Raises:
        ValueError: a shape, dtype or device that does not fit. NoImplementation (a ValueError): `impl` cannot serve.
    """
    require_tensors(x=x, weight=weight, bias=bias)
    require(
        x.dim() == 4 and weight.dim() == 4 and weight.shape[1:] == (x.shape[1], 3, 3),
        f"x must be (M, C, H, W) and weight (N, C, 3, 3), got {tuple(x.shape)} and {tuple(weight.shape)}",
    )
    require(
        min(*x.shape[1:], len(weight)) > 0,
        f"all axes but the batch must be above 0, got x {tuple(x.shape)} and weight {tuple(weight.shape)}",
    )
    require(
        tuple(bias.shape) == (weight.shape[0],),
        f"bias must be ({weight.shape[0]},), one number a row of weight, got {tuple(bias.shape)}",
    )
    tensors = {"x": x, "weight": weight, "bias": bias}
    require_same_device(**tensors)
    autocast = autocast_dtype(x.device.type)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    dtype = autocast if autocast and impl == "auto" else x.dtype
    name = resolve("conv3x3", impl, Spec(x.device.type, dtype, needs_grad))
    if not autocast or name == "native":
        require_same_dtype(**tensors)
    return reference.conv3x3(x, weight, bias, relu) if name == "reference" else op(x, weight, bias, relu, name)
