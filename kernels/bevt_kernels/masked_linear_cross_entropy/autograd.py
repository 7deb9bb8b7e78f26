"""The derivative of `masked_linear_cross_entropy_forward`: its backward op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bevt_kernels.masked_linear_cross_entropy import ops
from bevt_kernels.registration import differentiable, refuse_second_derivative

forward = ops.forward


class MaskedLinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, bias, targets, index, impl) -> (loss, accuracy); only the loss takes a gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, impl = inputs
        with torch._C._AutoDispatchBelowAutograd():
            loss, accuracy = ops.forward(*tensors, impl)
        ctx.save_for_backward(*tensors)
        ctx.impl = impl
        ctx.mark_non_differentiable(accuracy)
        ctx.set_materialize_grads(False)
        return loss, accuracy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("masked_linear_cross_entropy")
        if grads[0] is None:  # nothing depends on the loss
            return (None,) * 6
        return *ops.backward(grads[0], *ctx.saved_tensors, ctx.impl), None, None, None


differentiable(ops.forward, MaskedLinearCrossEntropy)
