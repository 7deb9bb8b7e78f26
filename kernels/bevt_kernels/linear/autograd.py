"""The derivative of `linear_forward`: its backward op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bevt_kernels.linear import ops
from bevt_kernels.registration import differentiable, refuse_second_derivative

forward = ops.forward


class Linear(torch.autograd.Function):
    """(x, weight, bias, impl) -> (..., N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = ops.forward(x, weight, bias, impl)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.impl = x.shape, impl
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("linear")
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        found = ops.backward(
            grads[0], grads[0].new_empty(()).expand(ctx.shape) if x is None else x, weight, wanted, ctx.impl
        )
        return *(grad if want else None for grad, want in zip(found, wanted)), None


differentiable(ops.forward, Linear)
