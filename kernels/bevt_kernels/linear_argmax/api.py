"""`linear_argmax`: the public function. It checks its arguments, resolves the implementation and calls the op."""

from __future__ import annotations

from torch import Tensor

from bevt_kernels.linear_argmax.ops import op
from bevt_kernels.registration import require, require_same_device, require_tensors, statistics_dtype
from bevt_kernels.select import Spec, resolve


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str = "auto") -> Tensor:
    """The class with the largest logit of x W^T + b in each row, without writing the (M, V) logits.

    Args:
        x: (M, C) float32, bfloat16, float16 or float64; any strides.
        weight: (V, C), in the dtype of `x` or in float32.
        bias: (V,), likewise.
        impl: "auto", "reference", "native" or "triton"; see `bevt_kernels.resolve`.

    Returns:
        (M,) int64. Logits are formed and compared in float32 (float64 for float64), also under autocast; ties go to the
        lowest class and a NaN wins, as in torch.argmax. Implementations add in different orders, so two classes whose
        logits are within rounding of each other may change places. No gradient.

    Raises:
        ValueError: a shape, dtype or device that does not fit. NoImplementation (a ValueError): `impl` cannot serve.
    """
    require_tensors(x=x, weight=weight, bias=bias)
    require(
        x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1],
        f"x must be (M, C) and weight (V, C), got {tuple(x.shape)} and {tuple(weight.shape)}",
    )
    require(weight.shape[0] > 0, "weight has no classes: its first axis is 0")
    require(
        tuple(bias.shape) == (weight.shape[0],),
        f"bias must be ({weight.shape[0]},), one number a row of weight, got {tuple(bias.shape)}",
    )
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(
            tensor.dtype in (x.dtype, statistics_dtype(x.dtype)),
            f"{name} must be {x.dtype}, as x, or {statistics_dtype(x.dtype)}; got {tensor.dtype}",
        )
    require_same_device(x=x, weight=weight, bias=bias)
    name = resolve("linear_argmax", impl, Spec(x.device.type, x.dtype))
    return op(x, weight, bias, name)
