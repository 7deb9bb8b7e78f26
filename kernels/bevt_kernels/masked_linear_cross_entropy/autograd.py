"""The derivative of the op `masked_linear_cross_entropy`: gradients computed in the forward pass, and one scaling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bevt_kernels.masked_linear_cross_entropy import ops
from bevt_kernels.registration import differentiable, refuse_second_derivative, require

op = ops.op


def scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """`grad` times the 0-dimensional `scale`, in float32 at least, and then in `dtype`."""
    factor = scale.view((1,) * grad.dim())  # with dimensions: a scalar would be rounded to a half grad's dtype
    return (grad.mul_(factor) if in_place else torch.mul(grad, factor)).to(dtype)


class MaskedLinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, bias, targets, index, output_mask, impl) -> (loss, accuracy); only the loss takes a gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, accuracy, *kept = ops.forward(*inputs)
        ctx.save_for_backward(inputs[4], *kept)
        ctx.dtypes, ctx.output_mask = [x.dtype for x in inputs[:3]], list(inputs[5])
        ctx.mark_non_differentiable(accuracy)
        ctx.set_materialize_grads(False)
        return loss, accuracy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("masked_linear_cross_entropy")
        if grads[0] is None:  # nothing depends on the loss
            return (None,) * 7
        for name, wanted, given in zip(("hidden", "weight", "bias"), ctx.needs_input_grad, ctx.output_mask):
            require(given or not wanted, f"{name} needs a gradient that output_mask = {ctx.output_mask} left out")
        index, *kept = ctx.saved_tensors
        scale = grads[0] / (index != -1).sum().clamp(min=1)
        # In place where nobody can ask for them again: a copy of the weight's would be the largest tensor of all. A
        # compiler, which traces with tensors of its own type, decides itself what is in place.
        again = (
            torch._C._autograd._get_current_graph_task_keep_graph()
            or type(grads[0]) is not Tensor
            or torch._C._functorch.is_batchedtensor(grads[0])
        )
        results = (
            scaled(grad, scale, dtype, in_place=not again) if wanted else None
            for grad, dtype, wanted in zip(kept, ctx.dtypes, ctx.needs_input_grad)
        )
        return *results, None, None, None, None


differentiable(op, MaskedLinearCrossEntropy)
